//! How asks join flights and leave them.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    time::Duration,
};

use super::{AskState, Exchange, Stand};
use crate::{
    AskId, Place,
    flights::{Flight, Owner, Target},
};

impl<P: Clone> Exchange<P> {
    /// Makes an ask wait for a call, which is made unless the last one like it failed not long ago.
    pub(super) fn join(&mut self, id: AskId, target: Target, bytes: u64, now: Duration) {
        let Some(state) = self.asks.get_mut(&id) else { return };
        state.stand = Stand::Waiting(target);
        let group = state.group;
        let promised = self.has_promise(group, target.kind());
        if let Some(flight) = self.flights.get_mut(&target) {
            flight.waiters.insert(id);
            flight.promised |= promised;
            if flight.call.is_none() {
                self.own(id, target);
            }
            return;
        }
        let Some(state) = self.asks.get(&id) else { return };
        let failure = match target {
            Target::Stage(content) => self.stage_failures.current(content, now),
            _ => self.access_failures.current(state.access(), now),
        };
        if let Some(fault) = failure.cloned() {
            return self.fail(id, fault);
        }
        let owners = BTreeMap::new();
        let (short, overtaken, waiters, call) = (false, 0, [id].into(), None);
        let flight = Flight { owners, bytes, promised, short, overtaken, waiters, call };
        self.flights.insert(target, flight);
        self.own(id, target);
    }

    /// Lets a queued flight begin in the name of an ask, unless another ask in the same lane is ahead.
    fn own(&mut self, id: AskId, target: Target) {
        let (Some(flight), Some(state)) = (self.flights.get_mut(&target), self.asks.get(&id)) else { return };
        let owner = Self::owner(state);
        if let Entry::Vacant(entry) = flight.owners.entry(owner.lane()) {
            self.queue.push(owner.tenant, owner.source, owner.arrival, target);
            entry.insert(owner);
        }
    }

    fn owner(state: &AskState<P>) -> Owner<P> {
        let place = match state.found {
            Some(found) if found.in_place => Place::InPlace(found.version),
            _ => Place::Cache,
        };
        Owner::new(&state.ask, state.arrival, place)
    }

    /// An ask waits for a flight no longer. A call that is running goes on, because whoever asks again joins it; one
    /// that is not is made in the name of another ask, or not at all.
    pub(super) fn leave(&mut self, id: AskId, target: Target) {
        let Some(flight) = self.flights.get_mut(&target) else { return };
        flight.waiters.remove(&id);
        if flight.call.is_some() {
            return;
        }
        let owned = flight.owners.iter().find(|(_, owner)| owner.ask == id);
        if let Some((&lane, owner)) = owned {
            self.queue.remove(lane, owner.arrival, target);
            flight.owners.remove(&lane);
            let asks = &self.asks;
            let is_in_lane = |ask: &AskId| {
                asks.get(ask).is_some_and(|state| (state.ask.tenant.id, state.ask.source) == lane)
            };
            let next = flight.waiters.iter().copied().find(is_in_lane);
            next.into_iter().for_each(|ask| self.own(ask, target));
        }
        if self.flights.get(&target).is_some_and(|flight| flight.waiters.is_empty()) {
            self.flights.remove(&target);
        }
    }

    /// Takes a flight out of the queue. Its owners stay.
    pub(super) fn dequeue(&mut self, target: Target) {
        for (&lane, owner) in self.flights.get(&target).into_iter().flat_map(|flight| &flight.owners) {
            self.queue.remove(lane, owner.arrival, target);
        }
    }

    /// Puts a flight whose call has ended without a result back into the queue, if somebody still waits for it.
    pub(super) fn requeue(&mut self, target: Target) {
        let Some(flight) = self.flights.get_mut(&target) else { return };
        flight.call = None;
        flight.owners.clear();
        let waiters: Vec<_> = flight.waiters.iter().copied().collect();
        if waiters.is_empty() {
            self.flights.remove(&target);
        }
        waiters.into_iter().for_each(|ask| self.own(ask, target));
    }
}
