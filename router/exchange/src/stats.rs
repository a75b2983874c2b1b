//! Gauges and counters, for metrics.

use crate::Content;

/// The state of a tier, and what has happened on it. For the device tier, bytes are not counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierStats {
    /// Copies that can be used.
    pub copies: usize,
    /// Bytes of these.
    pub bytes: u64,
    /// Bytes of copies that are being removed.
    pub leaving_bytes: u64,
    /// Bytes reserved for copies that are being made.
    pub reserved_bytes: u64,
    /// Bytes of copies that are pinned.
    pub pinned_bytes: u64,
    /// Asks that found their adapter here, and looked no further.
    pub hits: u64,
    /// Asks that did not.
    pub misses: u64,
    /// Copies made.
    pub loads: u64,
    /// Bytes of these.
    pub loaded_bytes: u64,
    /// Copies evicted.
    pub evictions: u64,
    /// Of these, copies that an ask or a waiting request was about to need.
    pub needed_evictions: u64,
}

/// The exchange's gauges and counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// The cache on the disk.
    pub disk: TierStats,
    /// Host memory.
    pub host: TierStats,
    /// Device slots.
    pub device: TierStats,
    /// Asks that have no lease yet.
    pub waiting: usize,
    /// Asks that have one.
    pub leased: usize,
    /// Calls that are running: lookups, fetches, stages.
    pub running: [usize; 3],
    /// Calls that wait for a permit or for room, by kind.
    pub queued: [usize; 3],
}

/// A copy on a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resident {
    /// The adapter.
    pub content: Content,
    /// Its bytes there.
    pub bytes: u64,
    /// Leases on it.
    pub leases: u32,
    /// Of these, pins.
    pub pins: u32,
}
