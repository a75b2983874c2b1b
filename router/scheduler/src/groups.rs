//! Groups of requests with the same prompt. One member computes the prompt, and the others wait for its KV blocks.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use crate::{AdapterKey, GroupId, Request, sequence::Arrival};

/// A request that waits for another member of its group.
#[derive(Debug)]
pub(crate) struct Parked<P> {
    pub(crate) request: Request<P>,
    pub(crate) submitted: Duration,
}

/// The members of a group that have not ended.
#[derive(Debug, Default)]
struct Group {
    members: usize,
    /// The member that computes the prompt, as long as its blocks are not there.
    leader: Option<Arrival>,
    parked: BTreeSet<Arrival>,
}

/// All groups with a member that has not ended.
#[derive(Debug)]
pub(crate) struct Groups<P> {
    /// Looked up only, never iterated.
    groups: HashMap<GroupId, Group>,
    parked: BTreeMap<Arrival, Parked<P>>,
    /// Those of `parked` that need not wait any more.
    ready: BTreeSet<Arrival>,
}

impl<P> Groups<P> {
    pub(crate) fn new() -> Self {
        Self { groups: HashMap::new(), parked: BTreeMap::new(), ready: BTreeSet::new() }
    }

    /// Adds a member. Returns whether it can begin; if not, it has to be parked.
    pub(crate) fn join(&mut self, id: GroupId, arrival: Arrival) -> bool {
        let group = self.groups.entry(id).or_default();
        group.members += 1;
        if group.members == 1 {
            group.leader = Some(arrival);
        }
        group.leader.is_none_or(|leader| leader == arrival)
    }

    pub(crate) fn park(&mut self, id: GroupId, arrival: Arrival, parked: Parked<P>) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.parked.insert(arrival);
            self.parked.insert(arrival, parked);
        }
    }

    /// The member that computes the prompt.
    pub(crate) fn leader(&self, id: GroupId) -> Option<Arrival> {
        self.groups.get(&id)?.leader
    }

    /// A member computes the prompt: its blocks were not there any more, or never.
    pub(crate) fn lead(&mut self, id: GroupId, arrival: Arrival) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.leader = Some(arrival);
        }
    }

    /// A member has the prompt's blocks. If it is the leader, nobody has to wait any more.
    pub(crate) fn prompt_is_there(&mut self, id: GroupId, arrival: Arrival) {
        if let Some(group) = self.groups.get_mut(&id)
            && group.leader == Some(arrival)
        {
            group.leader = None;
            self.ready.append(&mut group.parked);
        }
    }

    /// A member has ended. If it was the leader, the oldest of those that wait for it takes its place.
    pub(crate) fn leave(&mut self, id: GroupId, arrival: Arrival) {
        self.parked.remove(&arrival);
        self.ready.remove(&arrival);
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.parked.remove(&arrival);
        group.members -= 1;
        if group.leader == Some(arrival) {
            group.leader = group.parked.pop_first();
            self.ready.extend(group.leader);
        }
        if group.members == 0 {
            self.groups.remove(&id);
        }
    }

    /// Takes the oldest of those that need not wait any more.
    pub(crate) fn take_ready(&mut self) -> Option<(Arrival, Parked<P>)> {
        let arrival = self.ready.pop_first()?;
        Some((arrival, self.parked.remove(&arrival)?))
    }

    /// Those of an adapter that are parked, oldest first.
    pub(crate) fn parked_of(&self, key: AdapterKey) -> impl Iterator<Item = &Request<P>> {
        let requests = self.parked.values().map(|parked| &parked.request);
        requests.filter(move |request| request.adapters.contains(key))
    }

    /// The number of those that are parked.
    pub(crate) fn waiting(&self) -> usize {
        self.parked.len()
    }

    /// Time at which the oldest of them was submitted.
    pub(crate) fn waiting_since(&self) -> Option<Duration> {
        self.parked.first_key_value().map(|(_, parked)| parked.submitted)
    }

    /// Panics unless every group has so many members, of which those that are parked wait for a leader that can come to
    /// compute the prompt. `members` has the group and the arrival of each request that is not parked.
    pub(crate) fn check(&self, members: &[(GroupId, Arrival)]) {
        let mut parked = 0;
        for (id, group) in &self.groups {
            let others: Vec<_> =
                members.iter().filter(|(of, _)| of == id).map(|(_, arrival)| arrival).collect();
            let ready = self.ready.iter().filter(|arrival| self.parked[arrival].request.group == Some(*id));
            let ready: Vec<_> = ready.collect();
            assert_eq!(group.members, others.len() + ready.len() + group.parked.len(), "members of {id:?}");
            let leads = |leader| others.contains(&&leader) || ready.contains(&&leader);
            assert!(group.leader.is_none_or(leads), "the leader of {id:?} has not ended");
            assert!(group.leader.is_some() || group.parked.is_empty(), "{id:?} waits for nobody");
            parked += group.parked.len();
        }
        assert_eq!(self.parked.len(), parked + self.ready.len(), "parked requests");
        assert!(members.iter().all(|(id, _)| self.groups.contains_key(id)), "groups of members");
    }
}
