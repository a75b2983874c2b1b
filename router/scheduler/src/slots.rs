//! Adapter slots: which adapter is in which slot, and which may leave.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use crate::{Adapter, AdapterKey, flows::Residency};

/// An adapter keeps its slot for this many virtual tokens of work, however many others want it, so that the cost of a
/// load is spread over them.
pub(crate) const SLICE: u64 = 1024;

/// The state of an occupied slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The shards copy the adapter. This cannot be undone: the slot stays taken until they have answered.
    Loading,
    /// Requests may use it.
    Ready,
    /// Promised to another adapter: no request is admitted to it any more.
    Draining,
}

#[derive(Debug)]
struct Slot {
    adapter: Adapter,
    state: State,
    /// Admitted sequences of the adapter: they pin the slot.
    users: u32,
    /// Virtual tokens of work since it was loaded.
    earned: u64,
    /// Time of its first use since it was loaded.
    used_since: Option<Duration>,
    /// Tick at which its last user left, which is its key in `idle`.
    idle_since: u64,
    /// Steps since it had work last, as far as others waited for slots.
    idle_steps: u32,
}

/// The places for adapters that are to be loaded.
#[derive(Debug)]
pub(crate) struct Placement {
    /// A slot for each of them.
    pub(crate) slots: Vec<u32>,
    /// Slots to empty for them, `slots` included unless they are empty, with what they held.
    pub(crate) evicted: Vec<(u32, AdapterKey)>,
}

/// Who would miss an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Nobody waits for it.
    None,
    /// Requests wait for it that need other slots, too, which have not been given to them.
    Wanted,
    /// Requests can begin with it, as soon as what is on its way to slots is there.
    Needed,
}

/// An adapter that must leave its slot.
#[derive(Debug)]
pub(crate) struct Drained {
    pub(crate) key: AdapterKey,
    /// Whether no sequence uses the slot any more.
    pub(crate) free: bool,
}

/// The need for a slot, which decides the slots that may be given for it.
#[derive(Debug)]
pub(crate) enum Need<F> {
    /// An adapter leaves when it has had its [`SLICE`] and others wait for it, too, or when it has used its slot for the
    /// cycle time. One that nobody waits for leaves by itself when its last sequence ends.
    Turn { now: Duration, cycle_time: Duration, is_wanted: F },
    /// A tenant without a seat needs not wait for slices. Slots that nobody uses come first, because they are free at once.
    /// An adapter that has not been used since it was loaded comes next, if that was ahead of the seats of a tenant that has
    /// several, which this tells; then those in use.
    FirstSeat { is_ahead: F },
}

impl<F: Fn(AdapterKey) -> bool> Need<F> {
    /// The readiness of a slot to be given; none if it is not. A slot that was loaded for somebody who has not used it yet
    /// stays in general: otherwise it would be loaded again for the same request.
    fn rank(&self, slot: &Slot) -> Option<u8> {
        let is_used = slot.earned > 0;
        match self {
            Self::Turn { now, cycle_time, is_wanted } => {
                let had_cycle = slot.used_since.is_some_and(|since| now.saturating_sub(since) >= *cycle_time);
                let had_slice = slot.earned >= SLICE && is_wanted(slot.adapter.key);
                (is_used && (had_slice || had_cycle)).then_some(0)
            }
            Self::FirstSeat { is_ahead } => match (slot.users, is_used) {
                (0, true) => Some(2),
                (0, false) => is_ahead(slot.adapter.key).then_some(1),
                _ => is_used.then_some(0),
            },
        }
    }
}

/// All slots.
#[derive(Debug)]
pub(crate) struct Slots {
    slots: Vec<Option<Slot>>,
    empty: Vec<u32>,
    /// Ready or draining, without users; least recently used first.
    idle: BTreeSet<(u64, u32)>,
    /// Looked up only, never iterated.
    by_key: HashMap<AdapterKey, u32>,
    /// Of all adapters in slots. Wider than the bytes of one, so that the sum of any that shards report is exact.
    bytes: u128,
    /// 0 for no bound.
    max_bytes: u64,
    /// Counts how often a slot became idle: the clock of `idle_since`.
    ticks: u64,
    /// Adapters that have been evicted.
    pub(crate) evictions: u64,
    /// Steps that slots have been without work, beside the first of each.
    pub(crate) idle_steps: u64,
}

impl Slots {
    pub(crate) fn new(count: u32, max_bytes: u64) -> Self {
        Self {
            slots: (0..count).map(|_| None).collect(),
            empty: (0..count).rev().collect(),
            idle: BTreeSet::new(),
            by_key: HashMap::new(),
            bytes: 0,
            max_bytes,
            ticks: 0,
            evictions: 0,
            idle_steps: 0,
        }
    }

    /// Takes over an adapter that is in a slot already, ready. Returns false if it cannot stay there: the slot or the
    /// adapter is known already, or it does not fit.
    pub(crate) fn adopt(&mut self, slot: u32, adapter: Adapter) -> bool {
        let known = self.by_key.contains_key(&adapter.key);
        let fits = self.holds(self.bytes + u128::from(adapter.bytes));
        let Some(index) = self.empty.iter().position(|&empty| empty == slot) else { return false };
        if known || !fits {
            return false;
        }
        self.empty.remove(index);
        self.fill(slot, adapter, State::Ready, SLICE);
        self.rest(slot);
        true
    }

    fn fill(&mut self, slot: u32, adapter: Adapter, state: State, earned: u64) {
        self.slots[slot as usize] =
            Some(Slot { adapter, state, users: 0, earned, used_since: None, idle_since: 0, idle_steps: 0 });
        self.by_key.insert(adapter.key, slot);
        self.bytes += u128::from(adapter.bytes);
    }

    /// Whether adapters of so many bytes in all fit.
    fn holds(&self, bytes: u128) -> bool {
        self.max_bytes == 0 || bytes <= u128::from(self.max_bytes)
    }

    pub(crate) fn residency(&self, key: AdapterKey) -> Residency {
        match self.by_key.get(&key).and_then(|&slot| self.slots[slot as usize].as_ref()) {
            None => Residency::Absent,
            Some(slot) => match slot.state {
                State::Ready => Residency::Ready,
                State::Loading => Residency::Loading,
                State::Draining => Residency::Draining,
            },
        }
    }

    /// Adapters ready and adapters loading.
    pub(crate) fn count(&self) -> (usize, usize) {
        let loading = self.occupied().filter(|(_, slot)| slot.state == State::Loading).count();
        (self.by_key.len() - loading, loading)
    }

    /// Starts to load absent adapters if there is room for all of them, or if room can be made by evicting idle adapters
    /// that nobody [needs](Wish) or whose slots are promised.
    pub(crate) fn place(
        &mut self,
        adapters: &[Adapter],
        wish: impl Fn(AdapterKey) -> Wish,
    ) -> Option<Placement> {
        let evicted = self.victims(adapters, wish)?;
        for &(slot, key) in &evicted {
            self.clear(slot, key);
        }
        self.evictions += evicted.len() as u64;
        let slots = self.empty.split_off(self.empty.len() - adapters.len());
        slots.iter().zip(adapters).for_each(|(&slot, &adapter)| self.fill(slot, adapter, State::Loading, 0));
        Some(Placement { slots, evicted })
    }

    /// The slots to empty for more adapters: those that nobody waits for first, the least recently used of them first.
    /// `None` if there is no such set.
    fn victims(
        &self,
        adapters: &[Adapter],
        wish: impl Fn(AdapterKey) -> Wish,
    ) -> Option<Vec<(u32, AdapterKey)>> {
        let bytes: u128 = adapters.iter().map(|adapter| u128::from(adapter.bytes)).sum();
        let fits = |count: usize, freed: u128| {
            self.empty.len() + count >= adapters.len() && self.holds(self.bytes - freed + bytes)
        };
        let idle = self.idle.iter().filter_map(|&(_, id)| Some((id, self.slots[id as usize].as_ref()?)));
        let (unwanted, others): (Vec<_>, Vec<_>) =
            idle.partition(|(_, slot)| wish(slot.adapter.key) == Wish::None);
        let may_leave = |(_, slot): &(u32, &Slot)| {
            slot.state == State::Draining || wish(slot.adapter.key) == Wish::Wanted
        };
        let (mut victims, mut freed) = (Vec::new(), 0);
        let mut candidates = unwanted.into_iter().chain(others.into_iter().filter(may_leave));
        while !fits(victims.len(), freed) {
            let (id, slot) = candidates.next()?;
            victims.push((id, slot.adapter.key));
            freed += u128::from(slot.adapter.bytes);
        }
        Some(victims)
    }

    /// The load of `key` into `slot` has ended well. Returns false if no such load is under way.
    pub(crate) fn ready(&mut self, slot: u32, key: AdapterKey) -> bool {
        if !self.is_loading(slot, key) {
            return false;
        }
        if let Some(entry) = &mut self.slots[slot as usize] {
            entry.state = State::Ready;
        }
        self.rest(slot);
        true
    }

    /// The load of `key` into `slot` has failed, so the slot is empty. Returns false if no such load is under way.
    pub(crate) fn failed(&mut self, slot: u32, key: AdapterKey) -> bool {
        let loading = self.is_loading(slot, key);
        if loading {
            self.clear(slot, key);
        }
        loading
    }

    /// Pins the slot of a ready adapter for one more sequence.
    pub(crate) fn pin(&mut self, key: AdapterKey, now: Duration) -> Option<u32> {
        let id = *self.by_key.get(&key)?;
        let slot = self.slots[id as usize].as_mut()?;
        if slot.users == 0 {
            self.idle.remove(&(slot.idle_since, id));
        }
        slot.users += 1;
        slot.used_since.get_or_insert(now);
        Some(id)
    }

    pub(crate) fn unpin(&mut self, slot: u32) {
        let Some(entry) = &mut self.slots[slot as usize] else { return };
        entry.users -= 1;
        if entry.users == 0 {
            self.rest(slot);
        }
    }

    /// Counts work done for the adapter in `slot`, in virtual tokens.
    pub(crate) fn charge(&mut self, slot: u32, tokens: u64) {
        if let Some(entry) = &mut self.slots[slot as usize] {
            entry.earned += tokens;
        }
    }

    /// Promises a slot to one of the `wanting` adapters that have none. The slot is one whose adapter [may leave](Need)
    /// and for which `yields` returns a value; of several, the one with the greatest. No more slots drain than are wanted,
    /// nor more than a quarter of all, so that the others keep the batch full.
    pub(crate) fn drain<R: Ord>(
        &mut self,
        wanting: usize,
        need: &Need<impl Fn(AdapterKey) -> bool>,
        yields: impl Fn(AdapterKey) -> Option<R>,
    ) -> Option<Drained> {
        let draining = self.occupied().filter(|(_, s)| s.state == State::Draining && s.users > 0).count();
        let may_wait = draining < (self.slots.len() / 4).max(1).min(wanting);
        let (_, _, id) = self
            .occupied()
            .filter(|(_, slot)| slot.state == State::Ready && (may_wait || slot.users == 0))
            .filter_map(|(id, slot)| Some((need.rank(slot)?, yields(slot.adapter.key)?, id)))
            .max()?;
        let slot = self.slots[id as usize].as_mut()?;
        slot.state = State::Draining;
        Some(Drained { key: slot.adapter.key, free: slot.users == 0 })
    }

    /// Gives promised slots back to their adapters, because nobody wants them any more. Returns the adapters.
    pub(crate) fn undrain(&mut self) -> Vec<AdapterKey> {
        let draining = self.slots.iter_mut().flatten().filter(|slot| slot.state == State::Draining);
        draining
            .map(|slot| {
                slot.state = State::Ready;
                slot.adapter.key
            })
            .collect()
    }

    /// Counts a step in which some slots have work, while adapters are `wanting` for slots or not.
    pub(crate) fn count_step(&mut self, wanting: bool, works: impl Fn(u32, AdapterKey) -> bool) {
        for (id, slot) in (0..).zip(&mut self.slots) {
            let Some(slot) = slot else { continue };
            let idle = wanting && slot.state != State::Loading && !works(id, slot.adapter.key);
            slot.idle_steps = if idle { slot.idle_steps + 1 } else { 0 };
            self.idle_steps += u64::from(slot.idle_steps > 1);
        }
    }

    fn is_loading(&self, slot: u32, key: AdapterKey) -> bool {
        let entry = self.slots.get(slot as usize).and_then(Option::as_ref);
        entry.is_some_and(|entry| entry.state == State::Loading && entry.adapter.key == key)
    }

    fn occupied(&self) -> impl Iterator<Item = (u32, &Slot)> {
        (0..).zip(&self.slots).filter_map(|(id, slot)| Some((id, slot.as_ref()?)))
    }

    fn rest(&mut self, slot: u32) {
        self.ticks += 1;
        self.idle.insert((self.ticks, slot));
        if let Some(entry) = &mut self.slots[slot as usize] {
            entry.idle_since = self.ticks;
        }
    }

    fn clear(&mut self, slot: u32, key: AdapterKey) {
        if let Some(entry) = self.slots[slot as usize].take() {
            self.idle.remove(&(entry.idle_since, slot));
            self.bytes -= u128::from(entry.adapter.bytes);
            self.by_key.remove(&key);
            self.empty.push(slot);
        }
    }

    /// Panics unless every slot is accounted for and pinned by as many as `pins`, the slots of all admitted sequences,
    /// says.
    pub(crate) fn check(&self, pins: impl Iterator<Item = (u32, AdapterKey)>) {
        let mut users = vec![0; self.slots.len()];
        for (slot, key) in pins {
            users[slot as usize] += 1;
            assert_eq!(self.by_key.get(&key), Some(&slot), "a pinned adapter stays in its slot");
        }
        let mut bytes = 0;
        let mut idle = 0;
        for (id, slot) in self.occupied() {
            assert_eq!(slot.users, users[id as usize], "slot {id}: users counted and found");
            assert_eq!(self.by_key.get(&slot.adapter.key), Some(&id), "slot {id} is found by its adapter");
            let rests = slot.users == 0 && slot.state != State::Loading;
            assert_eq!(self.idle.contains(&(slot.idle_since, id)), rests, "slot {id} is idle");
            assert!(slot.users == 0 || slot.state != State::Loading, "slot {id} is used before it is ready");
            idle += usize::from(rests);
            bytes += u128::from(slot.adapter.bytes);
        }
        assert_eq!(self.idle.len(), idle, "idle slots");
        assert_eq!(self.empty.len() + self.by_key.len(), self.slots.len(), "slots");
        assert_eq!(self.bytes, bytes, "bytes in slots");
        assert!(self.holds(bytes), "{bytes} bytes in slots");
    }
}
