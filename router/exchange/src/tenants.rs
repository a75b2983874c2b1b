//! The order in which tenants take turns: by what they hold, and of those that hold as much, by what they have had.

use std::{cmp::Ordering, collections::HashMap};

use crate::{Tenant, lru::Lru};

/// Virtual time of a turn for a tenant of weight 1.
const TURN: u64 = 1 << 20;

/// What a tenant holds of something, relative to its weight.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    held: u64,
    weight: u32,
}

impl Share {
    pub(crate) fn new(held: u64, tenant: Tenant) -> Self {
        Self { held, weight: tenant.weight.max(1) }
    }

    /// Compares `held / weight` exactly.
    pub(crate) fn compare(&self, other: &Share) -> Ordering {
        let cross = |share: &Share, weight: u32| u128::from(share.held) * u128::from(weight);
        cross(self, other.weight).cmp(&cross(other, self.weight))
    }
}

/// Counts the turns that each tenant has had, divided by its weight. A tenant that comes back after a pause starts from
/// the present, so that nobody saves up turns.
#[derive(Debug)]
pub(crate) struct Turns {
    had: Lru<u64, u64>,
    /// The virtual time at which the last turn began.
    now: u64,
}

impl Turns {
    pub(crate) fn new(remembered: usize) -> Self {
        Self { had: Lru::new(remembered), now: 0 }
    }

    /// The virtual time of a tenant's next turn.
    pub(crate) fn next(&self, tenant: u64) -> u64 {
        let had = self.had.peek(tenant).copied();
        had.unwrap_or_default().max(self.now)
    }

    pub(crate) fn take(&mut self, tenant: Tenant) {
        let begun = self.next(tenant.id);
        self.now = begun;
        let turn = (TURN / u64::from(tenant.weight.max(1))).max(1);
        self.had.insert(tenant.id, begun + turn);
    }
}

/// Bytes of host memory that asks of each tenant have leased, or that are reserved for them. What several asks lease
/// counts for each.
#[derive(Debug, Default)]
pub(crate) struct HostBytes(HashMap<u64, u64>);

impl HostBytes {
    pub(crate) fn of(&self, tenant: u64) -> u64 {
        self.0.get(&tenant).copied().unwrap_or_default()
    }

    pub(crate) fn add(&mut self, tenant: u64, bytes: u64) {
        if bytes > 0 {
            *self.0.entry(tenant).or_default() += bytes;
        }
    }

    pub(crate) fn subtract(&mut self, tenant: u64, bytes: u64) {
        if let Some(held) = self.0.get_mut(&tenant) {
            *held -= bytes;
            if *held == 0 {
                self.0.remove(&tenant);
            }
        }
    }

    pub(crate) fn check(&self, mut expected: HashMap<u64, u64>) {
        expected.retain(|_, bytes| *bytes > 0);
        let mut held = self.0.clone();
        held.retain(|_, bytes| *bytes > 0);
        assert_eq!(held, expected, "host memory by tenant");
    }
}
