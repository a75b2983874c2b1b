//! Metrics of adapters on their way to the ranks.

use std::time::Instant;

use exchange::{Fault, Stats, TierStats};
use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge,
    histogram,
};

/// The kinds of calls that are made for an ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallKind {
    /// A question to a source.
    Lookup,
    /// A copy to the disk, or the hashing of a folder.
    Fetch,
    /// A copy into host memory.
    Stage,
}

impl CallKind {
    const ALL: [CallKind; 3] = [CallKind::Lookup, CallKind::Fetch, CallKind::Stage];

    fn name(self) -> &'static str {
        match self {
            CallKind::Lookup => "lookup",
            CallKind::Fetch => "fetch",
            CallKind::Stage => "stage",
        }
    }
}

/// The metrics of adapters.
pub(crate) struct AdapterMetrics {
    pub(crate) downloaded_bytes: Counter,
    asks: Timed,
    calls: [Timed; 3],
    tiers: [TierMetrics; 3],
    waiting: Gauge,
    leased: Gauge,
    /// Running and queued calls of each kind.
    under_way: [[Gauge; 2]; 3],
}

impl AdapterMetrics {
    /// Makes the handles with the current recorder.
    pub(super) fn new() -> AdapterMetrics {
        describe();
        let call = |kind: CallKind| Timed {
            duration: histogram!("lorax_adapter_call_duration_seconds", "kind" => kind.name()),
            failures: Failures::new(
                |fault| counter!("lorax_adapter_call_failures_total", "kind" => kind.name(), "error" => fault),
            ),
        };
        let under_way = |kind: CallKind| {
            ["running", "queued"]
                .map(|state| gauge!("lorax_adapter_calls", "kind" => kind.name(), "state" => state))
        };
        AdapterMetrics {
            downloaded_bytes: counter!("lorax_adapter_downloaded_bytes_total"),
            asks: Timed {
                duration: histogram!("lorax_adapter_ask_duration_seconds"),
                failures: Failures::new(
                    |fault| counter!("lorax_adapter_ask_failures_total", "error" => fault),
                ),
            },
            calls: CallKind::ALL.map(call),
            tiers: ["disk", "host", "device"].map(TierMetrics::new),
            waiting: gauge!("lorax_adapter_asks", "state" => "waiting"),
            leased: gauge!("lorax_adapter_asks", "state" => "leased"),
            under_way: CallKind::ALL.map(under_way),
        }
    }

    /// Begins to count an ask.
    pub(crate) fn ask(&self) -> Counted<'_> {
        Counted { timed: &self.asks, begun: Instant::now(), ended: false }
    }

    /// Begins to count a call.
    pub(crate) fn call(&self, kind: CallKind) -> Counted<'_> {
        Counted { timed: &self.calls[kind as usize], begun: Instant::now(), ended: false }
    }

    /// Publishes what the exchange knows.
    pub(crate) fn publish(&self, stats: &Stats) {
        for (metrics, stats) in self.tiers.iter().zip([&stats.disk, &stats.host, &stats.device]) {
            metrics.publish(stats);
        }
        self.waiting.set(stats.waiting as f64);
        self.leased.set(stats.leased as f64);
        for (kind, [running, queued]) in self.under_way.iter().enumerate() {
            running.set(stats.running[kind] as f64);
            queued.set(stats.queued[kind] as f64);
        }
    }
}

/// Something that takes time and may fail.
struct Timed {
    duration: Histogram,
    failures: Failures,
}

/// Something that is under way.
pub(crate) struct Counted<'a> {
    timed: &'a Timed,
    begun: Instant,
    ended: bool,
}

impl Counted<'_> {
    /// Counts its end, and its fault if it has failed.
    pub(crate) fn end(mut self, fault: Option<&Fault>) {
        self.ended = true;
        if let Some(fault) = fault {
            self.timed.failures.of(fault).increment(1);
        }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.timed.duration.record(self.begun.elapsed());
        if !self.ended {
            self.timed.failures.abandoned.increment(1);
        }
    }
}

/// Failures by the kind of fault.
struct Failures {
    not_found: Counter,
    denied: Counter,
    unavailable: Counter,
    ranks: Counter,
    invalid: Counter,
    too_large: Counter,
    slow: Counter,
    changed: Counter,
    /// It was given up before its end: its client has left, or the session has ended.
    abandoned: Counter,
}

impl Failures {
    fn new(counter: impl Fn(&'static str) -> Counter) -> Failures {
        Failures {
            not_found: counter("not_found"),
            denied: counter("denied"),
            unavailable: counter("unavailable"),
            ranks: counter("ranks"),
            invalid: counter("invalid"),
            too_large: counter("too_large"),
            slow: counter("slow"),
            changed: counter("changed"),
            abandoned: counter("abandoned"),
        }
    }

    fn of(&self, fault: &Fault) -> &Counter {
        match fault {
            Fault::NotFound(_) => &self.not_found,
            Fault::Denied(_) => &self.denied,
            Fault::Unavailable(_) => &self.unavailable,
            Fault::Ranks(_) | Fault::SessionLost | Fault::Duplicate => &self.ranks,
            Fault::Invalid(_) => &self.invalid,
            Fault::TooLarge { .. } | Fault::PinsFull(_) => &self.too_large,
            Fault::Slow => &self.slow,
            Fault::Changed => &self.changed,
        }
    }
}

/// The metrics of a tier.
struct TierMetrics {
    copies: Gauge,
    used: Gauge,
    leaving: Gauge,
    reserved: Gauge,
    pinned: Gauge,
    hits: Counter,
    misses: Counter,
    loads: Counter,
    loaded_bytes: Counter,
    evictions: Counter,
    needed_evictions: Counter,
}

impl TierMetrics {
    fn new(tier: &'static str) -> TierMetrics {
        let bytes = |state| gauge!("lorax_adapter_tier_bytes", "tier" => tier, "state" => state);
        TierMetrics {
            copies: gauge!("lorax_adapter_tier_copies", "tier" => tier),
            used: bytes("used"),
            leaving: bytes("leaving"),
            reserved: bytes("reserved"),
            pinned: bytes("pinned"),
            hits: counter!("lorax_adapter_tier_hits_total", "tier" => tier),
            misses: counter!("lorax_adapter_tier_misses_total", "tier" => tier),
            loads: counter!("lorax_adapter_tier_loads_total", "tier" => tier),
            loaded_bytes: counter!("lorax_adapter_tier_loaded_bytes_total", "tier" => tier),
            evictions: counter!("lorax_adapter_tier_evictions_total", "tier" => tier),
            needed_evictions: counter!("lorax_adapter_tier_needed_evictions_total", "tier" => tier),
        }
    }

    fn publish(&self, stats: &TierStats) {
        for (gauge, value) in [
            (&self.copies, stats.copies as u64),
            (&self.used, stats.bytes),
            (&self.leaving, stats.leaving_bytes),
            (&self.reserved, stats.reserved_bytes),
            (&self.pinned, stats.pinned_bytes),
        ] {
            gauge.set(value as f64);
        }
        for (counter, value) in [
            (&self.hits, stats.hits),
            (&self.misses, stats.misses),
            (&self.loads, stats.loads),
            (&self.loaded_bytes, stats.loaded_bytes),
            (&self.evictions, stats.evictions),
            (&self.needed_evictions, stats.needed_evictions),
        ] {
            counter.absolute(value);
        }
    }
}

fn describe() {
    describe_histogram!(
        "lorax_adapter_ask_duration_seconds",
        "Seconds from a request's ask for its adapter until that was in host memory, or failed."
    );
    describe_counter!("lorax_adapter_ask_failures_total", "Asks for adapters that have failed, by why.");
    describe_histogram!(
        "lorax_adapter_call_duration_seconds",
        "Seconds that a question to a source, a copy to the disk, or a copy into host memory took."
    );
    describe_counter!("lorax_adapter_call_failures_total", "Such calls that have failed, by why.");
    describe_counter!("lorax_adapter_downloaded_bytes_total", "Bytes of adapters that sources have sent.");
    describe_gauge!("lorax_adapter_asks", "Asks for adapters that wait, or that keep one in host memory.");
    describe_gauge!("lorax_adapter_calls", "Calls that run, or that wait for a permit or for room.");
    describe_gauge!("lorax_adapter_tier_copies", "Adapters on a tier.");
    describe_gauge!("lorax_adapter_tier_bytes", "Bytes of adapters on a tier, by state.");
    describe_counter!("lorax_adapter_tier_hits_total", "Asks that found their adapter on a tier.");
    describe_counter!("lorax_adapter_tier_misses_total", "Asks that looked on a tier and did not find it.");
    describe_counter!("lorax_adapter_tier_loads_total", "Adapters that were copied to a tier.");
    describe_counter!("lorax_adapter_tier_loaded_bytes_total", "Bytes of these.");
    describe_counter!(
        "lorax_adapter_tier_evictions_total",
        "Adapters that were removed from a tier for others."
    );
    describe_counter!(
        "lorax_adapter_tier_needed_evictions_total",
        "Of these, adapters that a request was about to need."
    );
}
