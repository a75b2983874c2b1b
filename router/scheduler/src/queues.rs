//! Who is next: requests wait first come, first served with those of the same adapter, and adapters take turns by how
//! much service they have had.
//!
//! Service is counted in virtual tokens, as in "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024):
//! each adapter has a counter of the work done for it, the least is served next, and an adapter that comes back after
//! having had nothing to do starts from the present (the virtual time of start-time fair queueing, Goyal et al. 1996),
//! so that nobody saves up for a burst.

mod order;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use crate::{
    Adapter, AdapterKey,
    sequence::{Arrival, Sequence},
};
use order::Order;

/// An adapter whose requests have waited for so long without one being admitted goes before all others.
pub const OVERDUE: Duration = Duration::from_secs(5);

/// Index of a queue. Reused after the queue is gone.
pub(crate) type QueueId = u32;

/// Whether requests of an adapter can be admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Residency {
    /// It is in a slot. The base model always is ready.
    Ready,
    /// It needs a slot.
    Absent,
    /// It is on its way into a slot, or its slot is promised to another.
    Held,
}

/// The requests of one adapter.
#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) adapter: Option<Adapter>,
    residency: Residency,
    waiting: BTreeMap<Arrival, Sequence>,
    /// Virtual tokens.
    pub(crate) service: u64,
    /// When one was admitted last, or when the first came to wait.
    since: Duration,
    /// Sequences that have been admitted and have not ended.
    users: usize,
}

impl Queue {
    fn key(&self) -> Option<AdapterKey> {
        self.adapter.map(|adapter| adapter.key)
    }
}

/// All queues: of adapters with waiting or running requests, and of those that still owe.
#[derive(Debug, Default)]
pub(crate) struct Queues {
    queues: Vec<Queue>,
    /// Of `queues`, those that are closed.
    vacant: Vec<QueueId>,
    /// Looked up only, never iterated.
    by_adapter: HashMap<Option<AdapterKey>, QueueId>,
    ready: Order,
    absent: Order,
    waiting: usize,
    /// Service of whoever was admitted last: the present, for those who come.
    virtual_time: u64,
    /// The most service that any queue has had.
    most: u64,
    /// Queues with no requests and more service than the present. The others are as good as new, and are dropped.
    debtors: BTreeSet<(u64, QueueId)>,
}

impl Queues {
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// The queue of `adapter`; of that `residency` if it is new.
    pub(crate) fn open(&mut self, adapter: Option<Adapter>, residency: Residency) -> QueueId {
        let key = adapter.map(|adapter| adapter.key);
        if let Some(&id) = self.by_adapter.get(&key) {
            return id;
        }
        let queue = Queue {
            adapter,
            residency,
            waiting: BTreeMap::new(),
            service: self.virtual_time,
            since: Duration::ZERO,
            users: 0,
        };
        let id = if let Some(id) = self.vacant.pop() {
            self.queues[id as usize] = queue;
            id
        } else {
            self.queues.push(queue);
            (self.queues.len() - 1) as QueueId
        };
        self.by_adapter.insert(key, id);
        id
    }

    /// Adds a sequence to the queue it names.
    pub(crate) fn push(&mut self, sequence: Sequence, now: Duration) {
        let (id, present) = (sequence.queue, self.virtual_time);
        let queue = self.get_mut(id);
        if queue.waiting.is_empty() {
            let service = queue.service;
            queue.service = service.max(present);
            queue.since = now;
            self.debtors.remove(&(service, id));
        }
        self.get_mut(id).waiting.insert(sequence.arrival, sequence);
        self.waiting += 1;
        self.list(id);
    }

    /// The queue to serve next of those with that residency and requests waiting.
    pub(crate) fn pick(&mut self, residency: Residency, now: Duration) -> Option<QueueId> {
        let (queues, order) = match residency {
            Residency::Ready => (&self.queues, &mut self.ready),
            Residency::Absent => (&self.queues, &mut self.absent),
            Residency::Held => return None,
        };
        let service = |id: QueueId| queues[id as usize].service;
        order.overdue(now).or_else(|| order.least_served(service))
    }

    /// How readily an adapter gives its slot to a queue, if at all: the more, the more service it has had than that one,
    /// and to one that is overdue the later its own requests came to wait. Whoever yields most is given nothing in turn:
    /// a slot does not go from hand to hand.
    pub(crate) fn yields(&self, key: AdapterKey, to: QueueId, now: Duration) -> Option<(Duration, u64)> {
        let owner = self.by_adapter.get(&Some(key)).map(|&id| self.get(id));
        let service = owner.map_or(0, |owner| owner.service);
        let wants = self.get(to);
        if !self.overdue(to, now) {
            return (service > wants.service).then_some((Duration::ZERO, service));
        }
        let waits = owner.filter(|owner| !owner.waiting.is_empty());
        let since = waits.map_or(Duration::MAX, |owner| owner.since);
        (since > wants.since).then_some((since, service))
    }

    /// Whether the queue has been waiting for as long as anybody should.
    fn overdue(&self, id: QueueId, now: Duration) -> bool {
        now.saturating_sub(self.get(id).since) >= OVERDUE
    }

    /// The request that a picked queue would give next.
    pub(crate) fn peek(&self, id: QueueId) -> Option<&Sequence> {
        self.get(id).waiting.values().next()
    }

    /// Takes the request that `peek` shows: it is admitted.
    pub(crate) fn pop(&mut self, id: QueueId, now: Duration) -> Option<Sequence> {
        let queue = self.get_mut(id);
        let (_, sequence) = queue.waiting.pop_first()?;
        queue.since = now;
        queue.users += 1;
        let service = queue.service;
        self.waiting -= 1;
        self.virtual_time = self.virtual_time.max(service);
        self.list(id);
        self.forgive();
        Some(sequence)
    }

    /// Takes a request from the middle of its queue.
    pub(crate) fn remove(&mut self, id: QueueId, arrival: Arrival) -> Option<Sequence> {
        let sequence = self.get_mut(id).waiting.remove(&arrival)?;
        self.waiting -= 1;
        self.list(id);
        self.forgive();
        self.retire(id);
        Some(sequence)
    }

    /// Takes all waiting requests of an adapter, oldest first.
    pub(crate) fn remove_all(&mut self, key: AdapterKey) -> Vec<Sequence> {
        if !self.waits(key) {
            return Vec::new();
        }
        let id = self.by_adapter[&Some(key)];
        let removed: Vec<_> = std::mem::take(&mut self.get_mut(id).waiting).into_values().collect();
        self.waiting -= removed.len();
        self.list(id);
        self.forgive();
        self.retire(id);
        removed
    }

    /// An admitted sequence has ended.
    pub(crate) fn leave(&mut self, id: QueueId) {
        self.get_mut(id).users -= 1;
        self.forgive();
        self.retire(id);
    }

    /// Counts work done for the queue, in virtual tokens.
    pub(crate) fn charge(&mut self, id: QueueId, tokens: u64) {
        let queue = self.get_mut(id);
        queue.service += tokens;
        let service = queue.service;
        self.most = self.most.max(service);
    }

    pub(crate) fn set_residency(&mut self, key: AdapterKey, residency: Residency) {
        let Some(&id) = self.by_adapter.get(&Some(key)) else { return };
        self.unlist(id);
        self.get_mut(id).residency = residency;
        self.list(id);
    }

    /// How many adapters with requests waiting need a slot.
    pub(crate) fn absent(&self) -> usize {
        self.absent.len()
    }

    /// Whether requests of the adapter wait.
    pub(crate) fn waits(&self, key: AdapterKey) -> bool {
        self.by_adapter.get(&Some(key)).is_some_and(|&id| !self.get(id).waiting.is_empty())
    }

    pub(crate) fn get(&self, id: QueueId) -> &Queue {
        &self.queues[id as usize]
    }

    fn get_mut(&mut self, id: QueueId) -> &mut Queue {
        &mut self.queues[id as usize]
    }

    fn unlist(&mut self, id: QueueId) {
        self.ready.remove(id);
        self.absent.remove(id);
    }

    /// Puts the queue where `pick` finds it, if there is something to find.
    fn list(&mut self, id: QueueId) {
        let queue = &self.queues[id as usize];
        let order = match queue.residency {
            Residency::Ready => &mut self.ready,
            Residency::Absent => &mut self.absent,
            Residency::Held => return,
        };
        order.remove(id);
        if !queue.waiting.is_empty() {
            order.insert(id, queue.service, queue.since);
        }
    }

    /// While nobody waits nobody is kept waiting by what others have had: all debts are void.
    fn forgive(&mut self) {
        if self.waiting == 0 {
            self.virtual_time = self.most;
        }
        while self.debtors.first().is_some_and(|&(service, _)| service <= self.virtual_time) {
            let Some((_, id)) = self.debtors.pop_first() else { break };
            self.close(id);
        }
    }

    /// Drops a queue without requests, or remembers what it owes.
    fn retire(&mut self, id: QueueId) {
        let queue = self.get(id);
        let service = queue.service;
        if queue.users > 0 || !queue.waiting.is_empty() {
            return;
        }
        if service > self.virtual_time {
            self.debtors.insert((service, id));
        } else {
            self.close(id);
        }
    }

    fn close(&mut self, id: QueueId) {
        let key = self.get(id).key();
        self.by_adapter.remove(&key);
        self.vacant.push(id);
    }

    /// The waiting requests.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.queues.iter().flat_map(|queue| queue.waiting.values())
    }

    /// Panics unless every queue is where it belongs, has the given `residency`, and counts as users those of
    /// `admitted`, the queues of all admitted sequences.
    pub(crate) fn check(
        &self,
        admitted: impl Iterator<Item = QueueId>,
        residency: impl Fn(AdapterKey) -> Residency,
    ) {
        let mut users = vec![0; self.queues.len()];
        admitted.for_each(|id| users[id as usize] += 1);
        let (mut ready, mut absent, mut waiting) = (Vec::new(), Vec::new(), 0);
        for (id, queue) in (0..).zip(&self.queues) {
            let open = self.by_adapter.get(&queue.key()) == Some(&id);
            assert_ne!(open, self.vacant.contains(&id), "queue {id} is open or vacant");
            assert!(open || queue.waiting.is_empty(), "closed queue {id} has requests");
            assert_eq!(users[id as usize], if open { queue.users } else { 0 }, "users of queue {id}");
            let truth = queue.key().map_or(Residency::Ready, &residency);
            assert!(!open || queue.residency == truth, "queue {id} is {:?}, not {truth:?}", queue.residency);
            let idle = open && queue.users == 0 && queue.waiting.is_empty();
            assert_eq!(self.debtors.contains(&(queue.service, id)) && open, idle, "debtor {id}");
            assert!(queue.waiting.values().all(|sequence| sequence.queue == id), "requests of queue {id}");
            waiting += queue.waiting.len();
            match queue.residency {
                _ if queue.waiting.is_empty() => {}
                Residency::Ready => ready.push(id),
                Residency::Absent => absent.push(id),
                Residency::Held => {}
            }
        }
        assert_eq!(self.waiting, waiting, "waiting requests");
        assert_eq!(self.ready.ids().collect::<Vec<_>>(), ready, "queues that can be admitted");
        assert_eq!(self.absent.ids().collect::<Vec<_>>(), absent, "queues that need a slot");
        self.ready.check();
        self.absent.check();
    }
}
