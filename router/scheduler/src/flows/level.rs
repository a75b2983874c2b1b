//! One level of fair queueing. Tenants are the members of the outer level, and the flows of a tenant those of an
//! inner one.

use std::collections::BTreeSet;

use super::{Residency, order::Order};

/// Picks the next member by the service that each has had.
///
/// The counters are those of VTC ("Fairness in Serving Large Language Models", Sheng et al., OSDI 2024). A member that
/// comes back after a pause starts from the virtual time of start-time fair queueing (Goyal et al., 1996), so that
/// nobody saves up for a burst.
#[derive(Debug, Default)]
pub(super) struct Level {
    /// Members with waiting requests that can be admitted.
    ready: Order,
    /// Members with waiting requests whose adapter needs a slot.
    absent: Order,
    /// Service of the member that was admitted last: the virtual time, from which newcomers start.
    virtual_time: u64,
    /// The most service that any member has had.
    most: u64,
    /// Members without requests whose service is above the virtual time. Others without requests are as good as new,
    /// and are forgotten.
    indebted: BTreeSet<(u64, u32)>,
}

impl Level {
    /// The order of members whose requests have that residency, if such members are in one.
    pub(super) fn order(&mut self, residency: Residency) -> Option<&mut Order> {
        match residency {
            Residency::Ready => Some(&mut self.ready),
            Residency::Absent => Some(&mut self.absent),
            Residency::Loading | Residency::Draining => None,
        }
    }

    pub(super) fn virtual_time(&self) -> u64 {
        self.virtual_time
    }

    /// A member without waiting requests has one again. Returns the service that it starts from.
    pub(super) fn arrive(&mut self, id: u32, service: u64) -> u64 {
        self.indebted.remove(&(service, id));
        service.max(self.virtual_time)
    }

    /// A member is admitted.
    pub(super) fn admit(&mut self, service: u64) {
        self.virtual_time = self.virtual_time.max(service);
    }

    /// A member's service has grown.
    pub(super) fn charge(&mut self, service: u64) {
        self.most = self.most.max(service);
    }

    /// Resets all counters to the same service. To be called when nobody waits: past service then keeps nobody waiting.
    pub(super) fn reset_debts(&mut self) {
        self.virtual_time = self.most;
    }

    /// A member has no requests. Returns whether it can be forgotten; if not, `pop_settled` will return it.
    pub(super) fn leave(&mut self, id: u32, service: u64) -> bool {
        let settled = service <= self.virtual_time;
        if !settled {
            self.indebted.insert((service, id));
        }
        settled
    }

    /// A member that was indebted and can be forgotten now.
    pub(super) fn pop_settled(&mut self) -> Option<u32> {
        let &(service, _) = self.indebted.first()?;
        if service > self.virtual_time {
            return None;
        }
        self.indebted.pop_first().map(|(_, id)| id)
    }

    pub(super) fn is_indebted(&self, id: u32, service: u64) -> bool {
        self.indebted.contains(&(service, id))
    }

    /// Panics unless exactly the given members, in order of their index, are in the two orders.
    pub(super) fn check(&self, ready: &[u32], absent: &[u32]) {
        assert_eq!(self.ready.ids().collect::<Vec<_>>(), ready, "members that can be admitted");
        assert_eq!(self.absent.ids().collect::<Vec<_>>(), absent, "members that need a slot");
        self.ready.check();
        self.absent.check();
    }
}
