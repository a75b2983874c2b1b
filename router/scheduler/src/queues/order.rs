//! Queues by who is next.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{OVERDUE, QueueId};

/// Queues by service and by how long they have waited.
///
/// Service only grows, and does so with every token, so it is read again when a queue comes first: what is listed is
/// never more than what is true, hence a first whose entry is true is the least served.
#[derive(Debug, Default)]
pub(super) struct Order {
    by_service: BTreeSet<(u64, Duration, QueueId)>,
    by_wait: BTreeSet<(Duration, QueueId)>,
    listed: BTreeMap<QueueId, (u64, Duration)>,
}

impl Order {
    pub(super) fn insert(&mut self, id: QueueId, service: u64, since: Duration) {
        self.by_service.insert((service, since, id));
        self.by_wait.insert((since, id));
        self.listed.insert(id, (service, since));
    }

    pub(super) fn remove(&mut self, id: QueueId) {
        if let Some((service, since)) = self.listed.remove(&id) {
            self.by_service.remove(&(service, since, id));
            self.by_wait.remove(&(since, id));
        }
    }

    /// The queue that has waited longest, if that is too long.
    pub(super) fn overdue(&self, now: Duration) -> Option<QueueId> {
        let &(since, id) = self.by_wait.first()?;
        (now.saturating_sub(since) >= OVERDUE).then_some(id)
    }

    /// The queue with the least service; of several, the one that has waited longest.
    pub(super) fn least_served(&mut self, service: impl Fn(QueueId) -> u64) -> Option<QueueId> {
        loop {
            let &(listed, since, id) = self.by_service.first()?;
            let current = service(id);
            if current == listed {
                return Some(id);
            }
            self.remove(id);
            self.insert(id, current, since);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.listed.len()
    }

    /// Queues listed, in order of their index.
    pub(super) fn ids(&self) -> impl Iterator<Item = QueueId> + '_ {
        self.listed.keys().copied()
    }

    /// Panics unless the three views agree.
    pub(super) fn check(&self) {
        assert_eq!(self.by_service.len(), self.listed.len(), "queues by service");
        assert_eq!(self.by_wait.len(), self.listed.len(), "queues by wait");
        for (&id, &(service, since)) in &self.listed {
            assert!(self.by_service.contains(&(service, since, id)), "queue {id} by service");
            assert!(self.by_wait.contains(&(since, id)), "queue {id} by wait");
        }
    }
}
