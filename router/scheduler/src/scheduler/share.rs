//! Requests of one group compute their prompt once.

use std::time::Duration;

use super::{Scheduler, Ticket};
use crate::{
    GroupId, Limits, Request,
    blocks::Cached,
    groups::Parked,
    sequence::{Arrival, Sequence},
};

/// The group of a request, unless its members cannot share anything: a prompt of one block, or one whose every position
/// is wanted.
fn sharing_group<P>(limits: &Limits, request: &Request<P>) -> Option<GroupId> {
    let reads_all = request.prompt_logprobs || request.hidden_states;
    request.group.filter(|_| !reads_all && limits.reusable_blocks(request.prompt.len()) > 0)
}

impl<P: Clone> Scheduler<P> {
    /// Queues a request in its flow, or has it wait for the member of its group that computes the prompt.
    pub(super) fn queue(&mut self, mut request: Request<P>, now: Duration) {
        let arrival = self.arrivals;
        self.arrivals += 1;
        request.group = sharing_group(&self.limits, &request);
        let group = request.group;
        self.tickets.insert(request.id, Ticket { arrival, flow: None, group });
        match group {
            Some(id) if !self.groups.join(id, arrival) => {
                self.groups.park(id, arrival, Parked { request, submitted: now });
            }
            _ => self.push(request, arrival, now, now),
        }
    }

    /// Queues the requests that need not wait for their groups any more. Within their flows they have the places of
    /// their arrival.
    pub(super) fn queue_ready(&mut self, now: Duration) {
        while let Some((arrival, Parked { request, submitted })) = self.groups.take_ready() {
            self.push(request, arrival, submitted, now);
        }
    }

    fn push(&mut self, request: Request<P>, arrival: Arrival, submitted: Duration, now: Duration) {
        let flow = self.flows.open(request.tenant, &request.adapters, |key| self.slots.residency(key));
        if let Some(ticket) = self.tickets.get_mut(&request.id) {
            ticket.flow = Some(flow);
        }
        self.flows.push(Sequence::new(request, arrival, flow, submitted), now);
    }

    /// Returns whether a request that could get a seat has to wait, because another member of its group is computing the
    /// blocks that it would have to compute as well.
    pub(super) fn waits_for_prompt(&self, sequence: &Sequence<P>, cached: &Cached) -> bool {
        let leader = sequence.group.and_then(|group| self.groups.leader(group));
        leader.is_some_and(|leader| leader != sequence.arrival && self.running.contains_key(&leader))
            && cached.table.end() < self.limits.reusable_blocks(sequence.prompt.len())
    }

    /// A sequence is admitted with so many blocks of its prompt.
    pub(super) fn begin_in_group(&mut self, sequence: &Sequence<P>, cached: usize) {
        let Some(group) = sequence.group else { return };
        if cached < self.limits.reusable_blocks(sequence.prompt.len()) {
            self.groups.lead(group, sequence.arrival);
        } else {
            self.groups.prompt_is_there(group, sequence.arrival);
        }
    }
}
