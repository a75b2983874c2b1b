//! The invariants.

use std::collections::{BTreeSet, HashMap};

use super::{Exchange, Stand};
use crate::{
    Tier,
    flights::{Kind, Target},
    timers::Timer,
};

impl<P> Exchange<P> {
    /// Asserts every invariant: asks, calls, copies, bytes and leases are each accounted for exactly once, and no bound
    /// is exceeded. Takes time in proportion to all there is; meant for tests and for idle moments.
    ///
    /// # Panics
    /// If one is broken.
    pub fn check(&self) {
        self.calls.check();
        self.check_flights();
        self.check_groups();
        self.check_leases();
        self.check_timers();
        self.grants.check();
        self.versions.check();
        self.host_sizes.check();
        self.access_failures.check();
        self.stage_failures.check();
        let mut wanted = HashMap::new();
        for content in self.asks.values().filter_map(|state| state.expected) {
            *wanted.entry(content).or_default() += 1;
        }
        assert_eq!(self.wanted, wanted, "contents that are expected to be needed");
    }

    fn check_flights(&self) {
        let (mut waiting, mut places) = (0, 0);
        for (target, flight) in &self.flights {
            for ask in &flight.waiters {
                let stand = self.asks.get(ask).map(|state| state.stand);
                assert_eq!(stand, Some(Stand::Waiting(*target)), "{ask:?} waits for its flight");
            }
            waiting += flight.waiters.len();
            for (&(tenant, source), owner) in &flight.owners {
                let lanes = self.queue.lanes(target.kind());
                let lanes = lanes.filter(|lane| (lane.tenant.id, lane.source) == (tenant, source));
                let queued = lanes.filter(|lane| lane.flights.contains(&(owner.arrival, *target))).count();
                assert_eq!(queued, usize::from(flight.call.is_none()), "{target:?} is queued or runs");
                places += queued;
            }
            match flight.call {
                None => {
                    let tenant =
                        |ask| self.asks.get(ask).map(|state| (state.ask.tenant.id, state.ask.source));
                    let lanes: BTreeSet<_> = flight.waiters.iter().filter_map(tenant).collect();
                    assert_eq!(flight.owners.keys().copied().collect::<BTreeSet<_>>(), lanes, "{target:?}");
                    let known = flight.owners.values().all(|owner| flight.waiters.contains(&owner.ask));
                    assert!(known && !lanes.is_empty(), "somebody waits for {target:?}");
                }
                Some(call) => {
                    let call = self.calls.running.get(&call).expect("a flight's call runs");
                    assert_eq!((call.target, call.aborted), (*target, false), "the flight of a call");
                    assert_eq!((call.reserved, flight.owners.len()), (flight.bytes, 1), "room of {target:?}");
                }
            }
        }
        assert_eq!(self.queue.len(), places, "places in the queue");
        let asks = self.asks.values().filter(|state| matches!(state.stand, Stand::Waiting(_))).count();
        assert_eq!(waiting, asks, "every ask waits for one flight, or has its lease");
        let running = self.flights.values().filter(|flight| flight.call.is_some()).count();
        let aborted = self.calls.running.values().filter(|call| call.aborted).count();
        assert_eq!(running + aborted, self.calls.running.len(), "calls");
        let targets: BTreeSet<_> = self.calls.running.values().map(|call| call.target).collect();
        assert_eq!(targets.len(), self.calls.running.len(), "equal calls are made once");
    }

    fn check_leases(&self) {
        let (mut disk, mut host) = (HashMap::new(), HashMap::new());
        let mut bytes: HashMap<u64, u64> = HashMap::new();
        for state in self.asks.values() {
            let pin = u32::from(state.ask.pin);
            let leased = matches!(state.stand, Stand::Leased(_));
            if let Some(content) = state.disk_lease {
                let (leases, pins): &mut (u32, u32) = disk.entry(content).or_default();
                *leases += 1;
                *pins += if leased { pin } else { 0 };
            }
            if let (Stand::Leased(content), Tier::Host) = (state.stand, state.ask.tier) {
                let (leases, pins): &mut (u32, u32) = host.entry(content).or_default();
                *leases += 1;
                *pins += pin;
                let size = self.host.sizes(content).map_or(0, |(bytes, _)| bytes);
                *bytes.entry(state.ask.tenant.id).or_default() += size;
            }
        }
        for (content, _) in self.device.iter().filter(|(_, slot)| slot.leased) {
            host.entry(*content).or_default().0 += 1;
        }
        for call in self.calls.running.values().filter(|call| !call.in_place) {
            if let Target::Stage(content) = call.target {
                disk.entry(content).or_default().0 += 1;
            }
        }
        let of_kind = |kind| self.calls.running.values().filter(move |call| call.target.kind() == kind);
        for call in of_kind(Kind::Stage) {
            *bytes.entry(call.tenant).or_default() += call.reserved;
        }
        let reserved = |kind| of_kind(kind).map(|call| call.reserved).sum();
        self.disk.check(&disk, reserved(Kind::Fetch));
        self.host.check(&host, reserved(Kind::Stage));
        self.host_bytes.check(bytes);
        assert!(self.attached || of_kind(Kind::Stage).next().is_none(), "stages without a session");
    }

    fn check_timers(&self) {
        for (at, timer) in self.timers.iter() {
            let due = match timer {
                Timer::Ask(id) => self.asks.get(id).map(|state| state.ask.deadline),
                Timer::Call(id) => self.calls.running.get(id).map(|call| call.deadline),
                Timer::Slow(id) => self.calls.running.get(id).map(|call| call.slow_at),
            };
            assert_eq!(due, Some(*at), "{timer:?}");
        }
        let calls = self.calls.running.values().filter(|call| !call.aborted).count();
        let deadlines = self.timers.iter().filter(|(_, timer)| matches!(timer, Timer::Call(_))).count();
        assert_eq!(deadlines, calls, "deadlines of calls");
    }
}
