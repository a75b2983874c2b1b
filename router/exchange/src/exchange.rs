//! The exchange's state, and how inputs reach it. The way of an ask is in `asks`, results of calls are in `answers`,
//! and which call is made next is in `pump`.

mod answers;
mod asks;
mod check;
mod joins;
mod pump;
mod session;
mod together;

use std::{
    collections::{BTreeMap, HashMap},
    mem,
    time::Duration,
};

use crate::{
    Ask, AskId, Content, Fault, Found, Input, Limits, Output, Resident, Slot, Stats, Tier, TierStats,
    Version,
    backoff::Backoff,
    calls::Calls,
    flights::{Access, Arrival, Flight, Kind, Target},
    lru::Lru,
    queue::Queue,
    tenants::{HostBytes, Turns},
    tier::Copies,
    timers::{Timer, Timers},
};
use together::{Group, GroupId};

/// A credential may read a reference.
#[derive(Debug, Clone, Copy)]
struct Grant {
    found: Found,
    expires: Duration,
}

/// The point that an ask has reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    /// It has been looked up, and waits until its group is promised room.
    Together,
    /// It waits for the result of a call.
    Waiting(Target),
    /// It has its lease.
    Leased(Content),
}

/// An ask that has not ended.
#[derive(Debug)]
struct AskState<P> {
    ask: Ask<P>,
    arrival: Arrival,
    stand: Stand,
    /// Others that need their leases at the same time.
    group: Option<GroupId>,
    /// The version that it was granted.
    found: Option<Found>,
    /// The content of this version, once it is known.
    content: Option<Content>,
    /// The copy on the disk that it holds, so that it can be staged.
    disk_lease: Option<Content>,
    /// While it is looked up: the content to which its reference led last time.
    expected: Option<Content>,
    /// Times that its files were gone when they were to be staged.
    retries: u32,
}

impl<P> AskState<P> {
    fn access(&self) -> Access {
        (self.ask.reference, self.ask.credential)
    }
}

/// An adapter in the device tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SlotState {
    ready: bool,
    /// Whether the load has a lease on the host copy.
    leased: bool,
}

/// Decides where adapters live.
///
/// Every ask ends once: with [`Output::Failed`], or with [`Input::Release`]. Every call that is told is answered once,
/// also if it is aborted; calls to the ranks end with their session.
#[derive(Debug)]
pub struct Exchange<P> {
    limits: Limits,
    asks: BTreeMap<AskId, AskState<P>>,
    flights: BTreeMap<Target, Flight<P>>,
    groups: BTreeMap<GroupId, Group>,
    queue: Queue,
    calls: Calls,
    timers: Timers,
    grants: Lru<Access, Grant>,
    /// Contents of versions that have been fetched.
    versions: Lru<Version, Content>,
    /// Exact sizes in host memory of contents that have been staged.
    host_sizes: Lru<Content, u64>,
    access_failures: Backoff<Access>,
    stage_failures: Backoff<Content>,
    disk: Copies,
    host: Copies,
    host_bytes: HostBytes,
    /// For calls, by kind, and for promises to groups.
    turns: [Turns; 3],
    group_turns: Turns,
    /// How many asks that are looked up are expected to need a content.
    wanted: HashMap<Content, u32>,
    device: BTreeMap<Content, SlotState>,
    device_stats: TierStats,
    attached: bool,
    arrivals: Arrival,
    outputs: Vec<Output<P>>,
}

impl<P: Clone> Exchange<P> {
    /// An exchange that knows of no adapter and has no session.
    ///
    /// # Panics
    /// If a budget is zero.
    pub fn new(limits: Limits) -> Self {
        limits.assert_positive();
        let remembered = limits.remembered;
        let (first, longest) = (limits.first_backoff, limits.longest_backoff);
        Self {
            asks: BTreeMap::new(),
            flights: BTreeMap::new(),
            groups: BTreeMap::new(),
            queue: Queue::default(),
            calls: Calls::new(limits),
            timers: Timers::default(),
            grants: Lru::new(remembered),
            versions: Lru::new(remembered),
            host_sizes: Lru::new(remembered),
            access_failures: Backoff::new(first, longest, remembered),
            stage_failures: Backoff::new(first, longest, remembered),
            disk: Copies::new(limits.disk_bytes),
            host: Copies::new(limits.host_bytes),
            host_bytes: HostBytes::default(),
            turns: Kind::ALL.map(|_| Turns::new(remembered)),
            group_turns: Turns::new(remembered),
            wanted: HashMap::new(),
            device: BTreeMap::new(),
            device_stats: TierStats::default(),
            attached: false,
            arrivals: 0,
            outputs: Vec::new(),
            limits,
        }
    }

    /// Takes an input, and returns what follows from it. Timers that are due by now go first.
    pub fn handle(&mut self, input: Input<P>, now: Duration) -> Vec<Output<P>> {
        while let Some(timer) = self.timers.due(now) {
            self.expire(timer, now);
        }
        match input {
            Input::Ask(ask) => self.ask(ask, None, now),
            Input::AskTogether(asks) => self.ask_together(asks, now),
            Input::Release(id) => self.release(id),
            Input::LookedUp { call, result } => self.looked_up(call, result, now),
            Input::Progress { call, bytes } => self.progress(call, bytes, now),
            Input::Fetched { call, result } => self.fetched(call, result, now),
            Input::Staged { call, result } => self.staged(call, result, now),
            Input::Deleted(content) => self.disk.removed(content),
            Input::Unstaged(content) => self.host.removed(content),
            Input::OnDisk { content, bytes, versions } => self.on_disk(content, bytes, &versions),
            Input::Slot { content, slot } => self.slot(content, slot),
            Input::Attached { host } => self.attach(&host, now),
            Input::Detached => self.detach(now),
            Input::Reload(reference) => {
                self.grants.retain(|&(granted, _)| granted != reference);
                self.access_failures.retain(|&(failed, _)| failed != reference);
                self.look_up_anew(reference);
            }
            Input::Evict(content) => self.evict(content),
            Input::Tick => {}
        }
        self.promise_room(now);
        self.pump(now);
        mem::take(&mut self.outputs)
    }

    fn expire(&mut self, timer: Timer, now: Duration) {
        match timer {
            Timer::Ask(id) => self.fail(id, Fault::Slow),
            Timer::Slow(call) => self.calls.slow_down(call),
            Timer::Call(call) => self.abort(call, Fault::Slow, now),
        }
    }

    /// The time by which [`Input::Tick`] should come if no other input does.
    pub fn next_timer(&self) -> Option<Duration> {
        self.timers.next()
    }

    /// The gauges and counters as they are now.
    pub fn stats(&self) -> Stats {
        let leased = self.asks.values().filter(|ask| matches!(ask.stand, Stand::Leased(_))).count();
        let queued = |kind| {
            let queued =
                |(target, flight): &(&Target, &Flight<P>)| target.kind() == kind && flight.call.is_none();
            self.flights.iter().filter(queued).count()
        };
        let ready = self.device.values().filter(|slot| slot.ready).count();
        Stats {
            disk: self.disk.stats(),
            host: self.host.stats(),
            device: TierStats { copies: ready, ..self.device_stats },
            waiting: self.asks.len() - leased,
            leased,
            running: self.calls.count_running(),
            queued: Kind::ALL.map(queued),
        }
    }

    /// The copies on a tier that can be used, by content.
    pub fn residents(&self, tier: Tier) -> Vec<Resident> {
        self.copies(tier).residents()
    }

    /// The state of an adapter in the device tier.
    pub fn slot_of(&self, content: Content) -> Slot {
        match self.device.get(&content) {
            None => Slot::Empty,
            Some(SlotState { ready: true, .. }) => Slot::Ready,
            Some(SlotState { ready: false, .. }) => Slot::Loading,
        }
    }
}

impl<P> Exchange<P> {
    fn copies(&self, tier: Tier) -> &Copies {
        match tier {
            Tier::Disk => &self.disk,
            Tier::Host => &self.host,
        }
    }
}
