//! Admissions out of turn, for flows that have waited long.

use std::time::Duration;

/// A flow is overdue when none of its waiting requests has been admitted for this long.
pub const OVERDUE: Duration = Duration::from_secs(5);

/// Overdue flows get at most one in so many virtual tokens out of turn.
pub const AGED_SHARE: u64 = 8;

/// Overdue flows get at most one in so many slots out of turn. The service that they have then counts, so that shares
/// stay equal, and a large part keeps waits short where there are many more adapters than slots.
pub const AGED_SLOTS: u64 = 4;

/// The debt that must be paid before the next overdue flow is served out of turn.
///
/// An admission out of turn that costs `c` virtual tokens is paid by `AGED_SHARE * c` tokens of service, whoever gets
/// them, and the next one waits for that. The cost is the most that the request can need; what it turns out not to
/// need is given back at its end. Nothing is saved up while nobody is overdue. So of the virtual tokens of any
/// period, at most one in `AGED_SHARE`, and one request beside, are served out of turn; and the first of the overdue
/// flows is served after `AGED_SHARE` times the cost of the one before it.
#[derive(Debug, Default)]
pub(super) struct Aging {
    tokens: u64,
    slots: u64,
}

impl Aging {
    pub(super) fn may_admit(&self) -> bool {
        self.tokens == 0
    }

    pub(super) fn may_load(&self) -> bool {
        self.slots == 0
    }

    /// A request was admitted out of turn that can cost so many tokens.
    pub(super) fn admit(&mut self, cost: u64) {
        self.tokens = AGED_SHARE.saturating_mul(cost);
    }

    /// A request that was admitted out of turn has ended with so many tokens of its cost unused.
    pub(super) fn refund(&mut self, unused: u64) {
        self.serve(AGED_SHARE.saturating_mul(unused));
    }

    /// Counts tokens of service, whoever got them.
    pub(super) fn serve(&mut self, tokens: u64) {
        self.tokens = self.tokens.saturating_sub(tokens);
    }

    /// A flow got a slot, out of turn or in turn.
    pub(super) fn load(&mut self, aged: bool) {
        self.slots = if aged { AGED_SLOTS - 1 } else { self.slots.saturating_sub(1) };
    }
}
