//! A semaphore that is fair to parties: each has a queue of its own, and the queues take turns.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

/// The rule for how much one party may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Share {
    /// A party may hold everything.
    All,
    /// No more than is free: a party alone may hold half of everything, and each further one half of what the others
    /// leave. There is always something left for a newcomer (Choudhury and Hahne, "Dynamic queue length thresholds
    /// for shared-memory packet switches", 1998).
    AsMuchAsIsFree,
}

/// Units that parties share.
pub(crate) struct FairSemaphore<K: Eq + Hash + Copy> {
    state: Arc<Mutex<State<K>>>,
}

/// Units that are held, and given back when this is dropped.
pub(crate) struct Grant<K: Eq + Hash + Copy> {
    state: Arc<Mutex<State<K>>>,
    key: K,
    units: usize,
}

struct State<K> {
    free: usize,
    share: Share,
    parties: HashMap<K, Party>,
    /// Parties that wait, the one whose turn is next first.
    turns: VecDeque<K>,
}

#[derive(Default)]
struct Party {
    held: usize,
    waiting: VecDeque<Waiter>,
    /// Entries of `waiting` for which nobody waits any more. None of them is the first.
    abandoned: usize,
}

struct Waiter {
    units: usize,
    granted: oneshot::Sender<()>,
}

impl Party {
    /// Drops abandoned requests in front, and those behind once they are more than the others: thousands that give up
    /// together cost no more than as many steps each of which takes the same time.
    fn drop_abandoned(&mut self) {
        while self.waiting.front().is_some_and(|waiter| waiter.granted.is_closed()) {
            self.waiting.pop_front();
            self.abandoned -= 1;
        }
        if self.abandoned > self.waiting.len() / 2 {
            self.waiting.retain(|waiter| !waiter.granted.is_closed());
            self.abandoned = 0;
        }
    }
}

impl<K: Eq + Hash + Copy> FairSemaphore<K> {
    pub(crate) fn new(units: usize, share: Share) -> FairSemaphore<K> {
        let state = State { free: units, share, parties: HashMap::new(), turns: VecDeque::new() };
        FairSemaphore { state: Arc::new(Mutex::new(state)) }
    }

    /// Waits for units. More than a party may ever hold would be waited for in vain.
    pub(crate) async fn acquire(&self, key: K, units: usize) -> Grant<K> {
        let granted = lock(&self.state).ask(key, units);
        let mut waiting = Waiting { state: &self.state, key, units, granted };
        if let Some(granted) = &mut waiting.granted {
            // The sender is kept until it grants.
            let _ = granted.await;
        }
        waiting.granted = None;
        Grant { state: self.state.clone(), key, units }
    }
}

/// A request for units that may be given up at any time: units that were granted meanwhile are given back.
struct Waiting<'a, K: Eq + Hash + Copy> {
    state: &'a Arc<Mutex<State<K>>>,
    key: K,
    units: usize,
    granted: Option<oneshot::Receiver<()>>,
}

impl<K: Eq + Hash + Copy> Drop for Waiting<'_, K> {
    fn drop(&mut self) {
        let Some(granted) = &mut self.granted else { return };
        let mut state = lock(self.state);
        granted.close();
        if granted.try_recv().is_ok() {
            state.release(self.key, self.units);
        } else {
            state.give_up(self.key);
        }
    }
}

impl<K: Eq + Hash + Copy> Grant<K> {
    /// Gives all but so many units back.
    pub(crate) fn shrink(&mut self, units: usize) {
        if units < self.units {
            lock(&self.state).release(self.key, self.units - units);
            self.units = units;
        }
    }
}

impl<K: Eq + Hash + Copy> Drop for Grant<K> {
    fn drop(&mut self) {
        lock(&self.state).release(self.key, self.units);
    }
}

fn lock<K>(state: &Mutex<State<K>>) -> MutexGuard<'_, State<K>> {
    // Counts are changed as a whole or not at all.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<K: Eq + Hash + Copy> State<K> {
    /// Takes units at once, or returns what to wait for.
    fn ask(&mut self, key: K, units: usize) -> Option<oneshot::Receiver<()>> {
        let waits = self.parties.get(&key).is_some_and(|party| !party.waiting.is_empty());
        if !waits && self.fits(key, units) {
            self.take(key, units);
            return None;
        }
        let (granted, wait) = oneshot::channel();
        if !waits {
            self.turns.push_back(key);
        }
        self.parties.entry(key).or_default().waiting.push_back(Waiter { units, granted });
        Some(wait)
    }

    fn fits(&self, key: K, units: usize) -> bool {
        let held = match self.share {
            Share::All => 0,
            Share::AsMuchAsIsFree => self.parties.get(&key).map_or(0, |party| party.held),
        };
        held + units <= self.free
    }

    fn take(&mut self, key: K, units: usize) {
        self.free -= units;
        self.parties.entry(key).or_default().held += units;
    }

    fn release(&mut self, key: K, units: usize) {
        self.free += units;
        if let Some(party) = self.parties.get_mut(&key) {
            party.held -= units;
        }
        self.forget(key);
        self.grant();
    }

    /// Gives what is free to parties in turn, until no party's next request fits.
    fn grant(&mut self) {
        let mut passed = 0;
        while passed < self.turns.len() {
            let Some(key) = self.turns.pop_front() else { return };
            let next = self.parties.get(&key).and_then(|party| party.waiting.front());
            let Some(units) = next.map(|waiter| waiter.units) else { continue };
            self.turns.push_back(key);
            if !self.fits(key, units) {
                passed += 1;
                continue;
            }
            passed = 0;
            let Some(party) = self.parties.get_mut(&key) else { continue };
            let waiter = party.waiting.pop_front();
            party.drop_abandoned();
            if waiter.is_some_and(|waiter| waiter.granted.send(()).is_ok()) {
                self.take(key, units);
            }
            self.forget(key);
        }
    }

    /// Notes that nobody waits for a request any more. What waited behind it may fit.
    fn give_up(&mut self, key: K) {
        if let Some(party) = self.parties.get_mut(&key) {
            party.abandoned += 1;
            party.drop_abandoned();
        }
        self.forget(key);
        self.grant();
    }

    /// Forgets a party that does not wait, and altogether if it holds nothing either.
    fn forget(&mut self, key: K) {
        let Some(party) = self.parties.get(&key) else { return };
        if party.waiting.is_empty() {
            if party.held == 0 {
                self.parties.remove(&key);
            }
            self.turns.retain(|waiting| *waiting != key);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, future::join_all};

    use super::*;

    fn try_acquire<K: Eq + Hash + Copy>(
        semaphore: &FairSemaphore<K>,
        key: K,
        units: usize,
    ) -> Option<Grant<K>> {
        semaphore.acquire(key, units).now_or_never()
    }

    fn free<K: Eq + Hash + Copy>(semaphore: &FairSemaphore<K>) -> usize {
        lock(&semaphore.state).free
    }

    #[tokio::test]
    async fn queues_take_turns() {
        let semaphore = FairSemaphore::new(1, Share::All);
        let first = semaphore.acquire('a', 1).await;
        let order = Mutex::new(Vec::new());
        let wait = async |key, number| {
            let _grant = semaphore.acquire(key, 1).await;
            order.lock().unwrap().push((key, number));
        };
        let many = join_all((1..=3).map(|number| wait('a', number)));
        let few = join_all([wait('b', 1), wait('c', 1), wait('b', 2)]);
        let release = async { drop(first) };
        futures::join!(many, few, release);
        let expected = [('a', 1), ('b', 1), ('c', 1), ('a', 2), ('b', 2), ('a', 3)];
        assert_eq!(*order.lock().unwrap(), expected);
        assert_eq!((free(&semaphore), lock(&semaphore.state).parties.len()), (1, 0));
    }

    #[tokio::test]
    async fn one_party_leaves_something_to_a_newcomer() {
        let semaphore = FairSemaphore::new(64, Share::AsMuchAsIsFree);
        let take = |key| std::iter::from_fn(|| try_acquire(&semaphore, key, 2)).collect::<Vec<_>>();
        let first = take(1);
        assert_eq!(first.len(), 16, "a half");
        let second = take(2);
        assert_eq!(second.len(), 8, "a half of the rest");
        assert_eq!(take(3).len(), 4);
        assert!(try_acquire(&semaphore, 4, 16).is_some(), "a newcomer may have all that is free");
        drop((first, second));
        assert_eq!((free(&semaphore), lock(&semaphore.state).parties.len()), (64, 0));
    }

    #[tokio::test]
    async fn whoever_gives_up_leaves_nothing_behind() {
        let semaphore = FairSemaphore::new(4, Share::All);
        let held = semaphore.acquire('a', 3).await;
        let large = semaphore.acquire('a', 4);
        let small = semaphore.acquire('a', 1);
        futures::pin_mut!(small);
        {
            futures::pin_mut!(large);
            assert!(large.as_mut().now_or_never().is_none());
            assert!(small.as_mut().now_or_never().is_none(), "not before the one in front of it");
        }
        let small = small.await;
        assert_eq!(free(&semaphore), 0);
        let granted = semaphore.acquire('b', 3);
        {
            futures::pin_mut!(granted);
            assert!(granted.as_mut().now_or_never().is_none());
            drop(held);
            assert_eq!(free(&semaphore), 0, "it is granted, though nobody has looked yet");
        }
        assert_eq!(free(&semaphore), 3);
        drop(small);
        assert_eq!((free(&semaphore), lock(&semaphore.state).parties.len()), (4, 0));
    }

    // Not within tokio, which lets a task wait after 128 polls.
    #[test]
    fn those_that_give_up_do_not_pile_up() {
        const MANY: usize = 1000;
        // The numbers of those that give up, in order.
        let orders: [Vec<usize>; 10] = [
            (0..MANY).collect(),
            (0..MANY).rev().collect(),
            (1..MANY).collect(),
            (1..MANY).rev().collect(),
            (0..MANY - 1).collect(),
            (0..MANY).step_by(2).collect(),
            (0..MANY).step_by(2).rev().collect(),
            (0..MANY).map(|i| i * 7 % MANY).collect(),
            (MANY / 4..MANY / 2).chain((0..MANY / 4).rev()).collect(),
            Vec::new(),
        ];
        for order in orders {
            let semaphore = FairSemaphore::new(1, Share::All);
            let held = try_acquire(&semaphore, 'a', 1);
            let mut waiting: Vec<_> = (0..MANY).map(|_| Some(Box::pin(semaphore.acquire('a', 1)))).collect();
            for waiter in waiting.iter_mut().flatten() {
                assert!(waiter.now_or_never().is_none());
            }
            let mut left = MANY;
            for number in &order {
                left -= usize::from(waiting[*number].take().is_some());
                let queued = lock(&semaphore.state).parties[&'a'].waiting.len();
                assert!((left..=2 * left + 1).contains(&queued), "{queued} for {left}");
            }
            drop(held);
            // The others get their turns in order.
            for waiter in waiting.iter_mut().flatten() {
                assert!(waiter.now_or_never().is_some());
            }
            drop(waiting);
            assert_eq!((free(&semaphore), lock(&semaphore.state).parties.len()), (1, 0));
        }
    }

    #[tokio::test]
    async fn a_grant_can_be_shrunk() {
        let semaphore = FairSemaphore::new(8, Share::All);
        let mut grant = semaphore.acquire('a', 8).await;
        grant.shrink(2);
        grant.shrink(5);
        let rest = try_acquire(&semaphore, 'b', 6);
        assert!(rest.is_some());
        drop((grant, rest));
        assert_eq!((free(&semaphore), lock(&semaphore.state).parties.len()), (8, 0));
    }
}
