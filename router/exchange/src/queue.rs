//! Flights that wait for a permit or for room.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    SourceId, Tenant,
    flights::{Arrival, Kind, LaneKey, Target},
};

/// The flights that one tenant waits for at one source, in the order in which its asks came.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) tenant: Tenant,
    pub(crate) source: SourceId,
    pub(crate) flights: BTreeSet<(Arrival, Target)>,
}

/// Flights by kind, tenant and source.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    lanes: [BTreeMap<LaneKey, Lane>; 3],
}

impl Queue {
    pub(crate) fn push(&mut self, tenant: Tenant, source: SourceId, arrival: Arrival, target: Target) {
        let lanes = &mut self.lanes[target.kind() as usize];
        let new = || Lane { tenant, source, flights: BTreeSet::new() };
        let lane = lanes.entry((tenant.id, source)).or_insert_with(new);
        // The weight of the latest ask holds.
        lane.tenant = tenant;
        lane.flights.insert((arrival, target));
    }

    pub(crate) fn remove(&mut self, key: LaneKey, arrival: Arrival, target: Target) {
        let lanes = &mut self.lanes[target.kind() as usize];
        let Some(lane) = lanes.get_mut(&key) else { return };
        lane.flights.remove(&(arrival, target));
        if lane.flights.is_empty() {
            lanes.remove(&key);
        }
    }

    pub(crate) fn lanes(&self, kind: Kind) -> impl Iterator<Item = &Lane> {
        self.lanes[kind as usize].values()
    }

    /// The number of places in the queue.
    pub(crate) fn len(&self) -> usize {
        self.lanes.iter().flat_map(BTreeMap::values).map(|lane| lane.flights.len()).sum()
    }
}
