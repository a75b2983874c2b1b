//! The members of a level of fair queueing by who is next.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// Members by service; of several with the same service, the one that has waited longest comes first.
///
/// Service only grows, and does so with every token, so the order is brought up to date when a member comes first: what
/// is recorded is never more than the true service, hence a first member whose record is true is the least served.
#[derive(Debug, Default)]
pub(super) struct Order {
    by_service: BTreeSet<(u64, Duration, u32)>,
    /// The service that `by_service` records for each member.
    recorded: BTreeMap<u32, (u64, Duration)>,
}

impl Order {
    pub(super) fn insert(&mut self, id: u32, service: u64, since: Duration) {
        self.remove(id);
        self.by_service.insert((service, since, id));
        self.recorded.insert(id, (service, since));
    }

    /// Makes `id` a member, or not.
    pub(super) fn set(&mut self, id: u32, member: bool, service: u64, since: Duration) {
        match member {
            true => self.insert(id, service, since),
            false => self.remove(id),
        }
    }

    pub(super) fn remove(&mut self, id: u32) {
        if let Some((service, since)) = self.recorded.remove(&id) {
            self.by_service.remove(&(service, since, id));
        }
    }

    /// The member with the least service, which `service` tells.
    pub(super) fn least_served(&mut self, service: impl Fn(u32) -> u64) -> Option<u32> {
        loop {
            let &(recorded, since, id) = self.by_service.first()?;
            let current = service(id);
            if current == recorded {
                return Some(id);
            }
            self.insert(id, current, since);
        }
    }

    /// The `nth` member by the recorded service.
    pub(super) fn nth(&self, nth: usize) -> Option<u32> {
        self.by_service.iter().nth(nth).map(|&(_, _, id)| id)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_service.is_empty()
    }

    /// The members, in order of their index.
    pub(super) fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.recorded.keys().copied()
    }

    /// Panics unless both views agree.
    pub(super) fn check(&self) {
        assert_eq!(self.by_service.len(), self.recorded.len(), "members by service");
        for (&id, &(service, since)) in &self.recorded {
            assert!(self.by_service.contains(&(service, since, id)), "member {id} by service");
        }
    }
}
