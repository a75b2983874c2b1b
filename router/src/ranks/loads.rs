//! Loads into slots that have been sent and not ended on every rank.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use scheduler::AdapterKey;

use super::RankError;

/// A load that is under way.
struct Load {
    key: AdapterKey,
    sent: Instant,
    /// For each rank, whether it has reported the end of the load.
    reported: Vec<bool>,
    /// The error of the first rank on which it failed.
    error: Option<String>,
}

/// Counts the reports: a slot is ready when it is on all ranks, and one that failed on some rank is not given up before
/// the others have ended too, since a copy cannot be stopped.
pub(super) struct Loads {
    world: usize,
    loads: HashMap<u32, Load>,
}

/// A load that has ended on all ranks.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Loaded {
    pub(super) slot: u32,
    pub(super) key: AdapterKey,
    pub(super) error: Option<String>,
}

impl Loads {
    pub(super) fn new(world: usize) -> Loads {
        Loads { world, loads: HashMap::new() }
    }

    /// Notes that all ranks have been told to load.
    pub(super) fn sent(&mut self, slot: u32, key: AdapterKey, now: Instant) {
        let load = Load { key, sent: now, reported: vec![false; self.world], error: None };
        self.loads.insert(slot, load);
    }

    /// Takes the report of a rank; returns the load if it was the last one to report.
    pub(super) fn reported(
        &mut self,
        rank: usize,
        slot: u32,
        key: AdapterKey,
        error: Option<String>,
    ) -> Result<Option<Loaded>, RankError> {
        let load = self.loads.get_mut(&slot).filter(|load| load.key == key && !load.reported[rank]);
        let load = load.ok_or(RankError::UnexpectedSlot { rank, slot, key })?;
        load.reported[rank] = true;
        load.error = load.error.take().or(error.map(|error| format!("rank {rank}: {error}")));
        if load.reported.contains(&false) {
            return Ok(None);
        }
        let load = self.loads.remove(&slot);
        Ok(load.map(|load| Loaded { slot, key, error: load.error }))
    }

    /// The load that was sent first, if it was sent longer than `limit` ago, with a rank that has not reported it.
    pub(super) fn overdue(&self, limit: Duration, now: Instant) -> Option<RankError> {
        let (slot, load) = self.loads.iter().min_by_key(|(_, load)| load.sent)?;
        let rank = load.reported.iter().position(|reported| !reported)?;
        let late = now.duration_since(load.sent) > limit;
        late.then_some(RankError::LateSlot { rank, slot: *slot, limit })
    }
}
