//! Which call is made next.

use std::time::Duration;

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

/// Others may take room ahead of a flight that does not fit until they have had this many times its bytes.
const OVERTAKING: u64 = 4;

/// Flights of one tenant at one source that are looked at for one that fits.
const LOOK_AHEAD: usize = 8;

/// Whether a flight can begin.
enum Fit {
    Now,
    /// When copies that are being removed are gone.
    Soon,
    /// When leases end.
    Later,
    /// When something else has ended that concerns this flight alone.
    Held,
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

    /// The next flight that can begin. Tenants take turns by what they hold for their weight, and then by what they have
    /// had; the flights of a tenant begin in the order of arrival. A flight that does not fit is overtaken for a while.
    fn next(&mut self, kind: Kind) -> Option<(Target, LaneKey)> {
        if kind == Kind::Stage && !self.attached {
            return None;
        }
        let permits = |lane: &&Lane| self.calls.permits(kind, lane.source, lane.tenant.id);
        let lanes = self.queue.lanes(kind).filter(permits);
        let mut lanes: Vec<_> = lanes
            .filter_map(|lane| {
                let first = lane.flights.first()?.0;
                let key = (lane.tenant.id, lane.source);
                let flights = lane.flights.iter().take(LOOK_AHEAD);
                let targets: Vec<_> = flights.map(|&(_, target)| (target, key)).collect();
                let turn = (self.turns.next(kind, lane.tenant.id), first);
                Some((self.share(kind, lane), turn, targets))
            })
            .collect();
        lanes.sort_by(|(a, turn, _), (b, other, _)| a.compare(b).then(turn.cmp(other)));
        let (mut waiting, mut closed) = (Vec::new(), false);
        for (target, lane) in lanes.into_iter().flat_map(|(_, _, targets)| targets) {
            let (bytes, overtaken) =
                self.flights.get(&target).map_or((0, 0), |flight| (flight.bytes, flight.overtaken));
            // One that takes no room is not in the way of those that wait for it. One may wait in several lanes.
            if closed && bytes > 0 || waiting.contains(&target) {
                continue;
            }
            match self.fit(target) {
                Fit::Now => {
                    for passed in waiting {
                        let passed = self.flights.get_mut(&passed);
                        passed.into_iter().for_each(|flight| flight.overtaken += bytes);
                    }
                    return Some((target, lane));
                }
                Fit::Soon => closed = true,
                Fit::Later => {
                    closed = overtaken >= OVERTAKING.saturating_mul(bytes);
                    waiting.push(target);
                }
                Fit::Held => {}
            }
        }
        None
    }

    fn share(&self, kind: Kind, lane: &Lane) -> Share {
        let held = match kind {
            Kind::Stage => self.host_bytes.of(lane.tenant.id),
            _ => self.calls.of_tenant(kind, lane.tenant.id).into(),
        };
        Share::new(held, lane.tenant)
    }

    /// Whether there is room for a flight. Makes room if that can be done.
    fn fit(&mut self, target: Target) -> Fit {
        let Some(flight) = self.flights.get(&target) else { return Fit::Held };
        let leaving = match target {
            Target::Lookup(_) => false,
            Target::Fetch(version) => {
                let waiting = flight.waiters.first().and_then(|ask| self.asks.get(ask)?.content);
                let content = waiting.or_else(|| self.versions.peek(version).copied());
                content.is_some_and(|content| self.disk.is_leaving(content))
            }
            Target::Stage(content) => self.host.is_leaving(content),
        };
        if leaving || self.calls.is_ending(target) {
            return Fit::Held;
        }
        let copies = match target.kind() {
            Kind::Lookup => return Fit::Now,
            Kind::Fetch => &mut self.disk,
            Kind::Stage => &mut self.host,
        };
        match copies.room(flight.bytes, |content| self.wanted.contains_key(&content)) {
            Room::Free => Fit::Now,
            Room::Coming => Fit::Soon,
            Room::Full => Fit::Later,
            Room::Evict(victims) => {
                for (content, wanted) in victims {
                    copies.evict(content, wanted);
                    self.outputs.push(match target.kind() {
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
        self.turns.take(kind, owner.tenant);
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
                Output::Stage { call, content, place: owner.place, max_bytes: reserved, payload }
            }
        });
    }
}
