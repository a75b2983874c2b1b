//! Asks that need their leases on the disk at the same time: the parts of a merge.
//!
//! If each of them took room as it came, two merges could hold a part each and wait for each other's room. So the asks of
//! a group are looked up first, which takes no room, and then the group is promised the room of all its parts at once.
//! Promises have half of the disk at most, and pins the other half. Whatever else is leased there is released without
//! waiting for the disk, so every promise is kept in the end.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{Exchange, Stand};
use crate::{Ask, AskId, Fault, Tenant, Tier, flights::Arrival, tenants::Share};

/// Names a group: the arrival of its first ask.
pub(super) type GroupId = Arrival;

/// Asks that need their leases at the same time.
#[derive(Debug)]
pub(super) struct Group {
    tenant: Tenant,
    asks: BTreeSet<AskId>,
    /// Bytes of the disk that it may take; `None` before they are promised.
    promised: Option<u64>,
}

impl<P: Clone> Exchange<P> {
    /// Takes asks of one tenant. Pins, and asks for host memory, are served alone.
    pub(super) fn ask_together(&mut self, asks: Vec<Ask<P>>, now: Duration) {
        let group = self.arrivals;
        for ask in asks {
            let together = ask.tier == Tier::Disk && !ask.pin;
            self.ask(ask, together.then_some(group), now);
        }
    }

    /// Counts an ask to its group.
    pub(super) fn enter_group(&mut self, id: AskId) {
        let Some(state) = self.asks.get(&id) else { return };
        let (Some(group), tenant) = (state.group, state.ask.tenant) else { return };
        let new = || Group { tenant, asks: BTreeSet::new(), promised: None };
        self.groups.entry(group).or_insert_with(new).asks.insert(id);
    }

    /// An ask has ended. The promise to its group ends with the last one.
    pub(super) fn leave_group(&mut self, id: AskId, group: GroupId) {
        let Some(entry) = self.groups.get_mut(&group) else { return };
        entry.asks.remove(&id);
        if entry.asks.is_empty() {
            self.groups.remove(&group);
        }
    }

    /// Whether an ask must not take room yet.
    pub(super) fn lacks_promise(&self, group: Option<GroupId>) -> bool {
        group.and_then(|group| self.groups.get(&group)).is_some_and(|group| group.promised.is_none())
    }

    /// Whether an ask has a part in a promise.
    pub(super) fn has_promise(&self, group: Option<GroupId>) -> bool {
        group.and_then(|group| self.groups.get(&group)).is_some_and(|group| group.promised.is_some())
    }

    /// Promises room to the groups that are next, for as long as there is some.
    pub(super) fn promise_room(&mut self, now: Duration) {
        while let Some(id) = self.next_group() {
            let (bytes, limit) = (self.bytes_of_group(id), self.disk.limit() / 2);
            let fits = bytes <= limit.saturating_sub(self.promised());
            if !fits && bytes <= limit {
                return;
            }
            let Some(group) = self.groups.get_mut(&id) else { return };
            if fits {
                group.promised = Some(bytes);
                self.group_turns.take(group.tenant);
            }
            for ask in group.asks.clone() {
                match fits {
                    true => self.advance(ask, now),
                    false => self.fail(ask, Fault::TooLarge { bytes, limit }),
                }
            }
        }
    }

    /// Bytes that are promised in all.
    pub(super) fn promised(&self) -> u64 {
        self.groups.values().filter_map(|group| group.promised).sum()
    }

    /// The next group whose asks have all been looked up: of the tenant that is promised least for its weight, and of those
    /// that are promised as much, the one whose turn it is. It is not overtaken, so that large ones get their room.
    fn next_group(&self) -> Option<GroupId> {
        let mut held: BTreeMap<u64, u64> = BTreeMap::new();
        for group in self.groups.values() {
            *held.entry(group.tenant.id).or_default() += group.promised.unwrap_or_default();
        }
        let is_looked_up =
            |ask: &AskId| self.asks.get(ask).is_some_and(|state| state.stand == Stand::Together);
        let ready = self
            .groups
            .iter()
            .filter(|(_, group)| group.promised.is_none() && group.asks.iter().all(is_looked_up));
        let place = |id: GroupId, group: &Group| {
            let tenant = group.tenant;
            let held = held.get(&tenant.id).copied().unwrap_or_default();
            (Share::new(held, tenant), (self.group_turns.next(tenant.id), id))
        };
        let places = ready.map(|(&id, group)| place(id, group));
        let next = places.min_by(|(a, turn), (b, other)| a.compare(b).then(turn.cmp(other)));
        next.map(|(_, (_, id))| id)
    }

    /// Bytes on the disk of all parts of a group that are not read in place.
    fn bytes_of_group(&self, id: GroupId) -> u64 {
        let asks = self.groups.get(&id).into_iter().flat_map(|group| &group.asks);
        let states = asks.filter_map(|ask| self.asks.get(ask));
        let copied =
            states.filter_map(|state| Some((state.found.filter(|found| !found.in_place)?, state.content)));
        let sizes: BTreeMap<_, _> = copied
            .map(|(found, content)| {
                let here = content.and_then(|content| self.disk.sizes(content)).map_or(0, |(bytes, _)| bytes);
                (found.version, found.bytes.max(here))
            })
            .collect();
        sizes.values().fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }
}

impl<P> Exchange<P> {
    /// Panics unless asks and groups agree, and no more is promised than may be.
    pub(super) fn check_groups(&self) {
        let mut groups: BTreeMap<GroupId, BTreeSet<AskId>> = BTreeMap::new();
        for (&id, state) in &self.asks {
            if let Some(group) = state.group {
                groups.entry(group).or_default().insert(id);
            }
            let promised = state.group.and_then(|group| self.groups.get(&group)?.promised);
            let holds = state.disk_lease.is_some() || matches!(state.stand, Stand::Leased(_));
            assert!(
                state.group.is_none() || promised.is_some() || !holds,
                "{id:?} has room without a promise"
            );
            assert!(
                state.stand != Stand::Together || state.group.is_some() && promised.is_none(),
                "{id:?} waits"
            );
        }
        let entered: BTreeMap<_, _> =
            self.groups.iter().map(|(&id, group)| (id, group.asks.clone())).collect();
        assert_eq!(groups, entered, "asks of groups");
        let promised: u64 = self.groups.values().filter_map(|group| group.promised).sum();
        assert!(promised <= self.disk.limit() / 2, "{promised} bytes are promised");
    }
}
