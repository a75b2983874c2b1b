//! Which call is made next.

use std::{collections::BTreeSet, time::Duration};

use super::Exchange;
use crate::{
    Output, Place,
    calls::Call,
    flights::{Kind, LaneKey, Target},
    queue::Lane,
    tenants::Share,
    tier::Room,
    timers::Timer,
};

/// Flights of one tenant at one source that are looked at for one that fits, of those that nothing holds up but room.
const LOOK_AHEAD: usize = 8;

/// Whether a flight can begin.
enum Fit {
    Now,
    /// When copies that are being removed are gone.
    Soon,
    /// When leases end.
    Later,
}

impl<P: Clone> Exchange<P> {
    /// Makes all calls for which there are permits and room.
    pub(super) fn pump(&mut self, now: Duration) {
        for kind in Kind::ALL {
            while let Some((target, lane)) = self.next(kind) {
                self.begin(target, lane, now);
            }
        }
    }

    /// The next flight that can begin. A flight that does not fit is overtaken for a while.
    fn next(&mut self, kind: Kind) -> Option<(Target, LaneKey)> {
        if kind == Kind::Stage && !self.attached {
            return None;
        }
        let candidates = self.candidates(kind);
        let mut closed = false;
        for &(target, lane) in &candidates {
            let Some(flight) = self.flights.get(&target) else { continue };
            let (bytes, next) = (flight.bytes, flight.is_next());
            // One that takes no room is not in the way of those that wait for it.
            if closed && bytes > 0 {
                continue;
            }
            match self.fit(kind, bytes) {
                Fit::Now => {
                    self.count_overtaking(&candidates, bytes);
                    return Some((target, lane));
                }
                Fit::Soon => closed = true,
                Fit::Later => closed = next,
            }
            self.flights.get_mut(&target).into_iter().for_each(|flight| flight.short = true);
        }
        None
    }

    /// Flights that have permits, in the order in which they should begin, with the lanes in which they wait: first those
    /// whose room is promised, then those that have been overtaken for long enough. Otherwise tenants take turns by what they hold for their weight, and
    /// then by what they have had; the flights of a tenant come in the order of arrival.
    fn candidates(&self, kind: Kind) -> Vec<(Target, LaneKey)> {
        let permits = |lane: &&Lane| self.calls.permits(kind, lane.source, lane.tenant.id);
        let lanes = self.queue.lanes(kind).filter(permits);
        let mut lanes: Vec<_> = lanes
            .filter_map(|lane| {
                let turn = (self.turns[kind as usize].next(lane.tenant.id), lane.flights.first()?.0);
                Some((self.share(kind, lane), turn, lane))
            })
            .collect();
        lanes.sort_by(|(a, turn, _), (b, other, _)| a.compare(b).then(turn.cmp(other)));
        let candidates = lanes.into_iter().flat_map(|(_, _, lane)| {
            let key = (lane.tenant.id, lane.source);
            let able = lane.flights.iter().filter(|&&(_, target)| !self.is_held(target));
            able.take(LOOK_AHEAD).map(move |&(_, target)| (target, key))
        });
        let mut candidates: Vec<_> = candidates.collect();
        candidates.sort_by_key(|(target, _)| match self.flights.get(target) {
            Some(flight) if flight.promised => 0,
            Some(flight) if flight.is_next() => 1,
            _ => 2,
        });
        candidates
    }

    /// Whether a flight cannot begin before something has ended that concerns it alone: an aborted call like it, which may
    /// hang, or the removal of its copy.
    fn is_held(&self, target: Target) -> bool {
        let leaving = match target {
            Target::Lookup(_) => false,
            Target::Fetch(version) => {
                let waiter = self.flights.get(&target).and_then(|flight| flight.waiters.first());
                let waiting = waiter.and_then(|ask| self.asks.get(ask)?.content);
                let content = waiting.or_else(|| self.versions.peek(version).copied());
                content.is_some_and(|content| self.disk.is_leaving(content))
            }
            Target::Stage(content) => self.host.is_leaving(content),
        };
        leaving || self.calls.is_ending(target)
    }

    /// So many bytes of room are given to one, while others did not fit.
    fn count_overtaking(&mut self, candidates: &[(Target, LaneKey)], bytes: u64) {
        let targets: BTreeSet<_> = candidates.iter().map(|&(target, _)| target).collect();
        for target in targets {
            if let Some(flight) = self.flights.get_mut(&target).filter(|flight| flight.short) {
                flight.overtaken = flight.overtaken.saturating_add(bytes);
            }
        }
    }

    fn share(&self, kind: Kind, lane: &Lane) -> Share {
        let held = match kind {
            Kind::Stage => self.host_bytes.of(lane.tenant.id),
            _ => self.calls.of_tenant(kind, lane.tenant.id).into(),
        };
        Share::new(held, lane.tenant)
    }

    /// Whether there are so many bytes of room for a call of a kind. Makes room if that can be done.
    fn fit(&mut self, kind: Kind, bytes: u64) -> Fit {
        let copies = match kind {
            Kind::Lookup => return Fit::Now,
            Kind::Fetch => &mut self.disk,
            Kind::Stage => &mut self.host,
        };
        match copies.room(bytes, |content| self.wanted.contains_key(&content)) {
            Room::Free => Fit::Now,
            Room::Coming => Fit::Soon,
            Room::Full => Fit::Later,
            Room::Evict(victims) => {
                for (content, wanted) in victims {
                    copies.evict(content, wanted);
                    self.outputs.push(match kind {
                        Kind::Stage => Output::Unstage(content),
                        _ => Output::Delete(content),
                    });
                }
                Fit::Soon
            }
        }
    }

    /// Makes a call in the name of the ask that waits for it in a lane.
    fn begin(&mut self, target: Target, lane: LaneKey, now: Duration) {
        self.dequeue(target);
        let Some(flight) = self.flights.get_mut(&target) else { return };
        flight.owners.retain(|&key, _| key == lane);
        let Some(owner) = flight.owners.values().next() else { return };
        let (kind, reserved) = (target.kind(), flight.bytes);
        let (tenant, source) = lane;
        self.turns[kind as usize].take(owner.tenant);
        let slow_at = now + self.limits.slow_after;
        let deadline = now + self.calls.budget(kind).deadline;
        let (slow, aborted, in_place) = (false, false, owner.place != Place::Cache);
        let call = Call { target, tenant, source, reserved, slow_at, deadline, slow, aborted, in_place };
        let call = self.calls.begin(call);
        self.timers.add(slow_at, Timer::Slow(call));
        self.timers.add(deadline, Timer::Call(call));
        flight.call = Some(call);
        let payload = owner.payload.clone();
        self.outputs.push(match target {
            Target::Lookup(_) => Output::Lookup { call, payload },
            Target::Fetch(version) => {
                self.disk.reserve(reserved);
                Output::Fetch { call, version, max_bytes: reserved, payload }
            }
            Target::Stage(content) => {
                self.host.reserve(reserved);
                self.host_bytes.add(tenant, reserved);
                if !in_place {
                    // The files are read until the call has ended, whether anybody waits for it or not.
                    self.disk.lease(content, false);
                }
                Output::Stage { call, content, place: owner.place, max_bytes: reserved, payload }
            }
        });
    }
}
