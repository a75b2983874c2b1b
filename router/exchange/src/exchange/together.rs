//! Asks that need their leases on a tier at the same time: the parts of a merge on the disk, the members of an ensemble in
//! host memory.
//!
//! If each of them took room as it came, two merges could hold a part each and wait for each other's room. So the asks of
//! a group are looked up first, which takes no room, and then the group is promised the room of all its parts at once.
//! Promises have half of the tier at most, and pins the other half. Whatever else is leased there is released without
//! waiting for the tier, so every promise is kept in the end. What an adapter takes in host memory is known once it has
//! been staged; before that, the bytes of its files stand for it, and groups that need more end by their deadlines at the
//! latest.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{Exchange, Stand};
use crate::{
    Ask, AskId, Fault, Tenant, Tier,
    flights::{Arrival, Kind},
    tenants::Share,
};

/// Names a group: the arrival of its first ask.
pub(super) type GroupId = Arrival;

/// Asks that need their leases at the same time.
#[derive(Debug)]
pub(super) struct Group {
    tenant: Tenant,
    tier: Tier,
    asks: BTreeSet<AskId>,
    /// Bytes of the tier that it may take; `None` before they are promised.
    promised: Option<u64>,
}

impl<P: Clone> Exchange<P> {
    /// Takes asks of one tenant for one tier. Pins are served alone.
    pub(super) fn ask_together(&mut self, asks: Vec<Ask<P>>, now: Duration) {
        let group = self.arrivals;
        for ask in asks {
            let together = !ask.pin;
            self.ask(ask, together.then_some(group), now);
        }
    }

    /// Counts an ask to its group.
    pub(super) fn enter_group(&mut self, id: AskId) {
        let Some(state) = self.asks.get(&id) else { return };
        let (Some(group), tenant, tier) = (state.group, state.ask.tenant, state.ask.tier) else { return };
        let new = || Group { tenant, tier, asks: BTreeSet::new(), promised: None };
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

    /// Whether an ask has a part in a promise of room for calls of a kind.
    pub(super) fn has_promise(&self, group: Option<GroupId>, kind: Kind) -> bool {
        let promised = |group: &Group| match group.tier {
            Tier::Disk => group.promised.is_some() && kind == Kind::Fetch,
            Tier::Host => group.promised.is_some() && kind == Kind::Stage,
        };
        group.and_then(|group| self.groups.get(&group)).is_some_and(promised)
    }

    /// Promises room to the groups that are next, for as long as there is some.
    pub(super) fn promise_room(&mut self, now: Duration) {
        [Tier::Disk, Tier::Host].into_iter().for_each(|tier| self.promise_room_on(tier, now));
    }

    fn promise_room_on(&mut self, tier: Tier, now: Duration) {
        while let Some(id) = self.next_group(tier) {
            let (bytes, limit) = (self.bytes_of_group(id, tier), self.copies(tier).limit() / 2);
            let fits = bytes <= limit.saturating_sub(self.promised(tier));
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

    /// Bytes that are promised on a tier in all.
    fn promised(&self, tier: Tier) -> u64 {
        self.groups.values().filter(|group| group.tier == tier).filter_map(|group| group.promised).sum()
    }

    /// The next group whose asks have all been looked up: of the tenant that is promised least for its weight, and of those
    /// that are promised as much, the one whose turn it is. It is not overtaken, so that large ones get their room.
    fn next_group(&self, tier: Tier) -> Option<GroupId> {
        let mut held: BTreeMap<u64, u64> = BTreeMap::new();
        for group in self.groups.values().filter(|group| group.tier == tier) {
            *held.entry(group.tenant.id).or_default() += group.promised.unwrap_or_default();
        }
        let is_looked_up =
            |ask: &AskId| self.asks.get(ask).is_some_and(|state| state.stand == Stand::Together);
        let ready = self
            .groups
            .iter()
            .filter(|(_, group)| group.tier == tier && group.promised.is_none())
            .filter(|(_, group)| group.asks.iter().all(is_looked_up));
        let place = |id: GroupId, group: &Group| {
            let tenant = group.tenant;
            let held = held.get(&tenant.id).copied().unwrap_or_default();
            (Share::new(held, tenant), (self.group_turns.next(tenant.id), id))
        };
        let places = ready.map(|(&id, group)| place(id, group));
        let next = places.min_by(|(a, turn), (b, other)| a.compare(b).then(turn.cmp(other)));
        next.map(|(_, (_, id))| id)
    }

    /// Bytes of all parts of a group on its tier. What is read in place takes none of the disk.
    fn bytes_of_group(&self, id: GroupId, tier: Tier) -> u64 {
        let asks = self.groups.get(&id).into_iter().flat_map(|group| &group.asks);
        let states = asks.filter_map(|ask| self.asks.get(ask));
        let copied = states.filter_map(|state| {
            let found = state.found.filter(|found| tier == Tier::Host || !found.in_place)?;
            let bytes = match (tier, state.content) {
                (_, None) => found.bytes,
                (Tier::Disk, Some(content)) => {
                    found.bytes.max(self.disk.sizes(content).unwrap_or_default().0)
                }
                (Tier::Host, Some(content)) => self.host_sizes.peek(content).copied().unwrap_or(found.bytes),
            };
            Some((found.version, bytes))
        });
        let sizes: BTreeMap<_, _> = copied.collect();
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
        for tier in [Tier::Disk, Tier::Host] {
            let of_tier = self.groups.values().filter(|group| group.tier == tier);
            let promised: u64 = of_tier.filter_map(|group| group.promised).sum();
            assert!(promised <= self.copies(tier).limit() / 2, "{promised} bytes are promised");
        }
    }
}
