//! Results of calls.

use std::{collections::BTreeSet, time::Duration};

use super::{Exchange, Grant, Stand};
use crate::{
    AskId, CallId, Content, CredentialId, Fault, Fetched, Found, Output, Place, ReferenceId, StageFault,
    Staged,
    calls::Call,
    flights::{Flight, Kind, Target},
    timers::Timer,
};

/// Times that an ask begins again because its files were gone or had changed when they were to be staged.
const RETRIES: u32 = 2;

impl<P: Clone> Exchange<P> {
    pub(super) fn looked_up(&mut self, id: CallId, result: Result<Found, Fault>, now: Duration) {
        let Some((call, flight)) = self.end(id, Kind::Lookup) else { return };
        let (Target::Lookup(access), Some(flight)) = (call.target, flight) else { return };
        let limit = self.limits.adapter_bytes;
        let result = match result {
            Ok(found) if found.bytes > limit => Err(Fault::TooLarge { bytes: found.bytes, limit }),
            result => result,
        };
        match result {
            Ok(found) => {
                self.grants.insert(access, Grant { found, expires: now + found.fresh_for });
                flight.waiters.into_iter().for_each(|ask| self.granted(ask, found, now));
            }
            Err(fault) => {
                if matches!(fault, Fault::NotFound(_) | Fault::Denied(_)) {
                    self.grants.remove(access);
                }
                self.fail_access(&flight.waiters, &fault, now);
            }
        }
    }

    /// Remembers a failure for each reference and credential of these asks, and fails them.
    fn fail_access(&mut self, asks: &BTreeSet<AskId>, fault: &Fault, now: Duration) {
        let accesses = asks.iter().filter_map(|ask| Some(self.asks.get(ask)?.access()));
        let accesses: BTreeSet<_> = accesses.collect();
        accesses.into_iter().for_each(|access| self.access_failures.add(access, fault.clone(), now));
        asks.iter().for_each(|&ask| self.fail(ask, fault.clone()));
    }

    pub(super) fn progress(&mut self, id: CallId, bytes: u64, now: Duration) {
        let Some(call) = self.calls.running.get(&id) else { return };
        let limit = call.reserved;
        if call.target.kind() == Kind::Fetch && !call.in_place && bytes > limit {
            self.abort(id, Fault::TooLarge { bytes, limit }, now);
        }
    }

    pub(super) fn fetched(&mut self, id: CallId, result: Result<Fetched, Fault>, now: Duration) {
        let Some((call, flight)) = self.end(id, Kind::Fetch) else { return };
        let (Target::Fetch(version), in_place) = (call.target, call.in_place) else { return };
        let result = result.and_then(|fetched| {
            let (bytes, limit) = (fetched.bytes, call.reserved);
            if in_place || bytes <= limit {
                return Ok(fetched);
            }
            self.refuse_on_disk(fetched.content);
            Err(Fault::TooLarge { bytes, limit })
        });
        if let Ok(Fetched { content, bytes }) = result {
            self.versions.insert(version, content);
            if self.disk.is_leaving(content) && !in_place {
                // It may have come before the removal or after it, so it is removed once more and fetched again.
                self.refuse_on_disk(content);
            } else if !in_place && !self.disk.has(content) {
                self.disk.load(content, bytes, 0);
            }
        }
        let Some(flight) = self.flight_of(&call, flight, result.is_ok()) else { return };
        match result {
            Ok(Fetched { content, .. }) => {
                for ask in flight.waiters {
                    if let Some(state) = self.asks.get_mut(&ask) {
                        state.content = Some(content);
                    }
                    self.advance(ask, now);
                }
            }
            Err(fault @ Fault::Denied(_)) => self.denied(flight, &fault, now),
            Err(Fault::Changed) => flight.waiters.into_iter().for_each(|ask| self.look_up_again(ask, now)),
            Err(fault) => self.fail_access(&flight.waiters, &fault, now),
        }
    }

    /// A copy was made on the disk that cannot stay.
    fn refuse_on_disk(&mut self, content: Content) {
        if !self.disk.has(content) {
            self.disk.refuse(content);
            self.outputs.push(Output::Delete(content));
        }
    }

    /// The credential with which a fetch was made may not read the version any more. Asks with others go on.
    fn denied(&mut self, flight: Flight<P>, fault: &Fault, now: Duration) {
        let Some(credential) = flight.owner().map(|owner| owner.credential) else { return };
        let with = |ask: &AskId, credential: CredentialId| {
            self.asks.get(ask).is_some_and(|state| state.ask.credential == credential)
        };
        let (denied, others): (BTreeSet<_>, BTreeSet<_>) =
            flight.waiters.into_iter().partition(|ask| with(ask, credential));
        for ask in &denied {
            if let Some(state) = self.asks.get(ask) {
                self.grants.remove(state.access());
            }
        }
        self.fail_access(&denied, fault, now);
        others.into_iter().for_each(|ask| self.advance(ask, now));
    }

    pub(super) fn staged(&mut self, id: CallId, result: Result<Staged, StageFault>, now: Duration) {
        let Some((call, flight)) = self.end(id, Kind::Stage) else { return };
        let Target::Stage(content) = call.target else { return };
        let limit = call.reserved;
        let result = match result {
            Ok(Staged { host_bytes: bytes, .. }) if bytes > limit => {
                self.host.refuse(content);
                self.outputs.push(Output::Unstage(content));
                Err(StageFault::NeedsRoom { bytes })
            }
            result => result,
        };
        if let Ok(Staged { host_bytes, slot_bytes }) = result {
            self.stage_failures.clear(content);
            self.host_sizes.insert(content, host_bytes);
            self.host.load(content, host_bytes, slot_bytes);
        }
        let Some(flight) = self.flight_of(&call, flight, result.is_ok()) else { return };
        match result {
            Ok(_) => flight.waiters.into_iter().for_each(|ask| self.advance(ask, now)),
            Err(StageFault::NeedsRoom { bytes }) if bytes > limit => {
                self.host_sizes.insert(content, bytes);
                flight.waiters.into_iter().for_each(|ask| self.restart(ask, now));
            }
            Err(StageFault::NeedsRoom { .. }) => {
                let fault =
                    Fault::Unavailable("the ranks contradict each other about an adapter's size".into());
                self.fail_stage(content, &flight, &fault, now);
            }
            Err(StageFault::Gone) => self.gone(content, flight, now),
            Err(StageFault::Failed(fault)) => self.fail_stage(content, &flight, &fault, now),
        }
    }

    fn fail_stage(&mut self, content: Content, flight: &Flight<P>, fault: &Fault, now: Duration) {
        self.stage_failures.add(content, fault.clone(), now);
        flight.waiters.iter().for_each(|&ask| self.fail(ask, fault.clone()));
    }

    /// The files of a content were not where they should be, or have changed: what is known of them is void.
    fn gone(&mut self, content: Content, flight: Flight<P>, now: Duration) {
        let Some(place) = flight.owner().map(|owner| owner.place) else { return };
        match place {
            Place::InPlace(version) => _ = self.versions.remove(version),
            Place::Cache => {
                self.disk.forget(content);
                self.void_disk_leases(content, now);
            }
        }
        for ask in flight.waiters {
            let Some(state) = self.asks.get_mut(&ask) else { continue };
            if state.found.is_some_and(|found| place == Place::InPlace(found.version)) {
                self.look_up_again(ask, now);
                continue;
            }
            state.retries += 1;
            if state.retries > RETRIES {
                self.fail(ask, Fault::Changed);
            } else {
                self.restart(ask, now);
            }
        }
    }

    /// A copy is gone from the disk, and so are the leases on it. Pins have it fetched again; other asks that have their
    /// leases fail. Those that wait for a stage are the caller's to go on with.
    fn void_disk_leases(&mut self, content: Content, now: Duration) {
        let holders = self.asks.iter_mut().filter(|(_, state)| state.disk_lease == Some(content));
        let void = holders.map(|(&id, state)| {
            state.disk_lease = None;
            (id, matches!(state.stand, Stand::Leased(_)), state.ask.pin)
        });
        let void: Vec<_> = void.collect();
        for (id, _, pin) in void.into_iter().filter(|(_, leased, _)| *leased) {
            match pin {
                true => self.advance(id, now),
                false => self.fail(id, Fault::Changed),
            }
        }
    }

    /// The version that an ask was granted is not there any more.
    fn look_up_again(&mut self, ask: AskId, now: Duration) {
        let Some(state) = self.asks.get_mut(&ask) else { return };
        state.retries += 1;
        let access = state.access();
        // The room of a group was promised for the versions that its asks had been granted.
        let ends = state.retries > RETRIES || state.group.is_some();
        self.grants.remove(access);
        if ends {
            self.fail(ask, Fault::Changed);
        } else {
            self.look_up(ask, None, now);
        }
    }

    /// The flight whose asks a result is for: the call's own, or one that waits for an aborted call to end, which need
    /// not be made if that has succeeded late.
    fn flight_of(&mut self, call: &Call, own: Option<Flight<P>>, succeeded: bool) -> Option<Flight<P>> {
        if !call.aborted || !succeeded {
            return own;
        }
        self.dequeue(call.target);
        self.flights.remove(&call.target)
    }

    /// Ends a call, and takes its flight unless that goes on without it.
    fn end(&mut self, id: CallId, kind: Kind) -> Option<(Call, Option<Flight<P>>)> {
        if self.calls.running.get(&id)?.target.kind() != kind {
            return None;
        }
        let call = self.end_call(id)?;
        let flight = if call.aborted { None } else { self.flights.remove(&call.target) };
        Some((call, flight))
    }

    /// Gives back what a call holds.
    pub(super) fn end_call(&mut self, id: CallId) -> Option<Call> {
        let call = self.calls.end(id)?;
        self.timers.remove(call.slow_at, Timer::Slow(id));
        self.timers.remove(call.deadline, Timer::Call(id));
        match call.target {
            Target::Lookup(_) => {}
            Target::Fetch(_) => self.disk.unreserve(call.reserved),
            Target::Stage(content) => {
                self.host.unreserve(call.reserved);
                self.host_bytes.subtract(call.tenant, call.reserved);
                if !call.in_place {
                    self.disk.release(content, false);
                }
            }
        }
        Some(call)
    }

    /// Fails a call that has taken too long or too much. It keeps its permit and its room until it is answered.
    pub(super) fn abort(&mut self, id: CallId, fault: Fault, now: Duration) {
        let Some(target) = self.give_up(id) else { return };
        let Some(flight) = self.flights.remove(&target) else { return };
        match target {
            Target::Stage(content) => self.fail_stage(content, &flight, &fault, now),
            _ => self.fail_access(&flight.waiters, &fault, now),
        }
    }

    /// Aborts the lookups of a reference that are running, because they may have seen it before it changed. They are made
    /// again for those who wait for them.
    pub(super) fn look_up_anew(&mut self, reference: ReferenceId) {
        let is_of =
            |call: &Call| matches!(call.target, Target::Lookup((looked_up, _)) if looked_up == reference);
        let lookups = self.calls.running.iter().filter(|(_, call)| is_of(call));
        let lookups: Vec<_> = lookups.map(|(&id, _)| id).collect();
        for id in lookups {
            let target = self.give_up(id);
            target.into_iter().for_each(|target| self.requeue(target));
        }
    }

    /// Aborts a call, unless it is aborted already. Returns what it was about.
    fn give_up(&mut self, id: CallId) -> Option<Target> {
        let call = self.calls.abort(id)?;
        let (target, deadline) = (call.target, call.deadline);
        self.timers.remove(deadline, Timer::Call(id));
        self.outputs.push(Output::Abort(id));
        Some(target)
    }
}
