//! The scheduler's state and what changes it from outside. Planning is in `plan` and `admit`.

mod admit;
mod check;
mod plan;
mod preempt;
mod share;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

use plan::PrefillBudget;

use crate::{
    Adapter, AdapterKey, Event, FailReason, GroupId, Limits, Request, RequestId, Sampled, Stats, SubmitError,
    blocks::Blocks,
    flows::{FlowId, Flows, Residency},
    groups::Groups,
    kv_positions,
    sequence::{Arrival, Sequence, max_positions},
    slots::Slots,
};

/// Steps that may be planned before the first of them is completed.
pub const MAX_IN_FLIGHT: usize = 2;

/// Rows of a step in flight.
#[derive(Debug)]
struct FlightRows {
    arrival: Arrival,
    id: RequestId,
    rows: u32,
    sample: bool,
    /// Whether these are the last rows of a sequence that generates nothing.
    scored: bool,
}

/// A step that has been planned and not completed.
#[derive(Debug)]
struct Flight {
    step: u64,
    rows: Vec<FlightRows>,
}

/// The result of a sequence's rows in a completed step.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    /// They have been computed, and no token was to be sampled.
    Computed,
    /// The token that was sampled from the last of them, and where it stands in the results.
    Token { index: usize, token: u32 },
    /// The step should have had a result for them and had none.
    Missing { step: u64 },
}

/// The keys of a request that has not ended: its place in the order of arrival, its flow unless it waits for its group,
/// and its group.
#[derive(Debug, Clone, Copy)]
struct Ticket {
    arrival: Arrival,
    flow: Option<FlowId>,
    group: Option<GroupId>,
}

/// Plans the steps of one model.
///
/// Every submitted request ends once: with an `Event` that says so, or by `cancel`.
#[derive(Debug)]
pub struct Scheduler<P> {
    limits: Limits,
    blocks: Blocks,
    slots: Slots,
    flows: Flows<P>,
    groups: Groups<P>,
    /// Sequences with a seat and blocks, oldest first.
    running: BTreeMap<Arrival, Sequence<P>>,
    /// Sequences that gave up their seats and blocks. They keep their adapter's slot, and come back before anybody new
    /// is admitted.
    preempted: BTreeMap<Arrival, Sequence<P>>,
    /// Looked up only, never iterated.
    tickets: HashMap<RequestId, Ticket>,
    /// Oldest first.
    flights: VecDeque<Flight>,
    /// Seats to free with the next step.
    dropped: Vec<RequestId>,
    /// Slots to empty with the next step.
    unload: Vec<u32>,
    prefill_budget: PrefillBudget,
    /// Whether there was no seat or no memory in the last step for a request that could have begun.
    crowded: bool,
    arrivals: Arrival,
    steps: u64,
    admitted: u64,
    preemptions: u64,
    cached_tokens: u64,
}

impl<P: Clone> Scheduler<P> {
    /// A scheduler for shards that run no sequence and hold the `resident` adapters in their slots. An adapter that
    /// cannot stay, because it is in two slots or exceeds a limit, is unloaded with the first step.
    ///
    /// # Panics
    /// If a limit is zero that must not be.
    pub fn new(limits: Limits, resident: &[(u32, Adapter)]) -> Self {
        limits.assert_positive();
        let mut slots = Slots::new(limits.num_slots, limits.adapter_bytes);
        let unload = resident.iter().filter(|&&(slot, adapter)| !slots.adopt(slot, adapter));
        let unload = unload.map(|&(slot, _)| slot).collect();
        Self {
            blocks: Blocks::new(limits.num_blocks, limits.block_size),
            slots,
            flows: Flows::new(),
            groups: Groups::new(),
            running: BTreeMap::new(),
            preempted: BTreeMap::new(),
            tickets: HashMap::new(),
            flights: VecDeque::new(),
            dropped: Vec::new(),
            unload,
            prefill_budget: PrefillBudget::default(),
            crowded: false,
            arrivals: 0,
            steps: 0,
            admitted: 0,
            preemptions: 0,
            cached_tokens: 0,
            limits,
        }
    }

    /// Queues a request.
    ///
    /// # Errors
    /// If it can never run within the limits.
    pub fn submit(&mut self, request: Request<P>, now: Duration) -> Result<(), SubmitError> {
        self.validate(&request)?;
        self.queue(request, now);
        Ok(())
    }

    fn validate(&self, request: &Request<P>) -> Result<(), SubmitError> {
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if request.max_new_tokens == 0 && !request.prompt_logprobs && !request.hidden_states {
            return Err(SubmitError::NothingToCompute);
        }
        if request.max_new_tokens > 0 && request.hidden_states {
            return Err(SubmitError::TokensAndHiddenStates);
        }
        if self.tickets.contains_key(&request.id) {
            return Err(SubmitError::DuplicateId(request.id));
        }
        let positions = match request.hidden_states {
            true => request.prompt.len() as u64,
            false => max_positions(request.prompt.len() as u64, request.max_new_tokens.into()),
        };
        let Limits { num_blocks, block_size, kv_window, .. } = self.limits;
        let capacity = kv_positions(num_blocks, block_size, kv_window);
        if positions > capacity {
            return Err(SubmitError::TooLong { positions, capacity });
        }
        let (rows, limit) = (request.prompt.len(), self.limits.most_rows_at_once());
        if self.limits.bidirectional && rows > limit {
            return Err(SubmitError::TooManyRows { rows, limit });
        }
        let (adapters, slots) = (request.adapters.list().len(), self.limits.num_slots);
        if adapters > 0 && slots == 0 {
            return Err(SubmitError::NoSlots);
        }
        if adapters > slots as usize {
            return Err(SubmitError::TooManyAdapters { adapters, slots });
        }
        let (bytes, limit) = (request.adapters.bytes(), self.limits.adapter_bytes);
        if limit > 0 && bytes > limit {
            return Err(SubmitError::AdapterTooLarge { bytes, limit });
        }
        Ok(())
    }

    /// Ends a request, wherever it is. Its blocks are free at once; no event of it follows. Does nothing if it has
    /// ended already.
    pub fn cancel(&mut self, id: RequestId) {
        let Some(&Ticket { arrival, flow, .. }) = self.tickets.get(&id) else { return };
        if self.is_admitted(arrival) {
            return self.end(arrival);
        }
        flow.into_iter().for_each(|flow| drop(self.flows.remove(flow, arrival)));
        self.forget(id);
    }

    /// Takes the results of a step: the token of each `sample` in row order, and the sequences of `added` that a
    /// shard could not take, which have no tokens. Results for requests that have ended meanwhile are dropped. Steps
    /// are completed in the order planned; one that is passed over counts as completed without results, and one that
    /// is not in flight is ignored.
    pub fn complete(&mut self, step: u64, sampled: &[Sampled], refused: &[RequestId]) -> Vec<Event> {
        let mut events = Vec::new();
        if self.flights.iter().all(|flight| flight.step != step) {
            return events;
        }
        while let Some(flight) = self.flights.pop_front_if(|flight| flight.step <= step) {
            let has_run = flight.step == step;
            let (sampled, refused) = if has_run { (sampled, refused) } else { (&[][..], &[][..]) };
            self.refuse(&flight, refused, &mut events);
            let mut results = sampled.iter().enumerate().peekable();
            for rows in &flight.rows {
                let token = results.next_if(|(_, sampled)| rows.sample && sampled.id == rows.id);
                let outcome = match token {
                    Some((index, sampled)) => Outcome::Token { index, token: sampled.token },
                    None if rows.sample || rows.scored && !has_run => Outcome::Missing { step: flight.step },
                    None => Outcome::Computed,
                };
                self.settle(rows, outcome, &mut events);
            }
        }
        events
    }

    /// Ends the sequences that a shard could not take. Rows of theirs in the next step in flight belong to nobody then.
    fn refuse(&mut self, flight: &Flight, refused: &[RequestId], events: &mut Vec<Event>) {
        for (index, &id) in refused.iter().enumerate() {
            let Some(&Ticket { arrival, .. }) = self.tickets.get(&id) else { continue };
            // The name may belong to a newer request by now.
            if flight.rows.iter().any(|rows| rows.arrival == arrival) {
                self.end(arrival);
                events.push(Event::Failed { id, reason: FailReason::Refused { index } });
            }
        }
    }

    /// Counts a sequence's rows of a completed step as computed.
    fn settle(&mut self, rows: &FlightRows, outcome: Outcome, events: &mut Vec<Event>) {
        let running = self.running.get_mut(&rows.arrival);
        let runs = running.is_some();
        let Some(sequence) = running.or_else(|| self.preempted.get_mut(&rows.arrival)) else { return };
        let id = sequence.id;
        sequence.in_flight -= 1;
        sequence.sampling -= usize::from(rows.sample);
        if let Some(admission) = sequence.admission.as_ref().filter(|_| !sequence.started) {
            sequence.started = true;
            let (queued, cached_tokens) = (admission.queued, admission.cached_tokens);
            events.push(Event::Started { id, queued, cached_tokens });
        }
        let ended = match outcome {
            Outcome::Computed if rows.scored => {
                events.push(Event::Scored { id });
                true
            }
            Outcome::Computed => false,
            Outcome::Token { index, token } => {
                let finish = sequence.push(token);
                events.push(Event::Token { id, index, token, finish });
                finish.is_some()
            }
            Outcome::Missing { step } => {
                events.push(Event::Failed { id, reason: FailReason::NoResult { step } });
                true
            }
        };
        if runs {
            sequence.run.computed += rows.rows as usize;
            Self::publish(&mut self.blocks, &self.limits, sequence);
            let reusable = self.limits.reusable_blocks(sequence.prompt.len());
            if let Some(group) = sequence.group.filter(|_| sequence.run.published >= reusable) {
                self.groups.prompt_is_there(group, rows.arrival);
            }
        }
        if ended {
            self.end(rows.arrival);
        }
    }

    /// Makes the blocks of a sequence that have become full known to the prefix cache.
    fn publish(blocks: &mut Blocks, limits: &Limits, sequence: &mut Sequence<P>) {
        let size = limits.block_size as usize;
        // A row of a token that never came may have been computed.
        let computed = sequence.run.computed.min(sequence.known());
        let computed = computed.min(limits.rope.shared_positions(sequence.run.added_len));
        // Without a cache for all, the members of a group share their prompt and nothing more.
        let computed = if limits.prefix_caching { computed } else { computed.min(sequence.prompt.len()) };
        while let Some(prefix) = sequence.run.prefix
            && (sequence.run.published + 1) * size <= computed
        {
            let published = sequence.run.published;
            let content = sequence.content(published, limits);
            // Where the window is short, the block may have been released by now.
            let block = sequence.run.table.get(published);
            sequence.run.prefix = Some(blocks.publish(prefix, &content, block));
            sequence.run.published += 1;
        }
    }

    /// `key` is in `slot`, on every rank. Ignored unless that load is under way.
    pub fn slot_ready(&mut self, slot: u32, key: AdapterKey) {
        if self.slots.ready(slot, key) {
            self.flows.set_residency(key, Residency::Ready);
        }
    }

    /// `key` could not be copied into `slot` on some rank. The requests that wait for it fail, and the next step
    /// empties the slot, because other ranks may have filled it. Ignored unless that load is under way.
    pub fn slot_failed(&mut self, slot: u32, key: AdapterKey) -> Vec<Event> {
        if !self.slots.failed(slot, key) {
            return Vec::new();
        }
        self.unload.push(slot);
        self.flows.set_residency(key, Residency::Absent);
        let queued = self.flows.remove_all(key).into_iter().map(|sequence| sequence.id);
        let parked = self.groups.parked_of(key).map(|request| request.id);
        let failed: Vec<_> = queued.chain(parked).collect();
        let reason = FailReason::AdapterLoad(key);
        failed
            .into_iter()
            .map(|id| {
                self.forget(id);
                Event::Failed { id, reason }
            })
            .collect()
    }

    /// The gauges and counters as they are now.
    pub fn stats(&self) -> Stats {
        let (resident_adapters, loading_adapters) = self.slots.count();
        Stats {
            waiting: self.flows.waiting() + self.groups.waiting(),
            waiting_since: self.flows.waiting_since().into_iter().chain(self.groups.waiting_since()).min(),
            running: self.running.len(),
            preempted: self.preempted.len(),
            in_flight: self.flights.len(),
            free_blocks: self.blocks.free(),
            cached_blocks: self.blocks.idle(),
            resident_adapters,
            loading_adapters,
            adapter_evictions: self.slots.evictions,
            idle_slot_steps: self.slots.idle_steps,
            admitted: self.admitted,
            preemptions: self.preemptions,
            cached_tokens: self.cached_tokens,
        }
    }

    fn is_admitted(&self, arrival: Arrival) -> bool {
        self.running.contains_key(&arrival) || self.preempted.contains_key(&arrival)
    }

    /// Takes seat and blocks from a running sequence.
    fn stop(&mut self, arrival: Arrival) -> Option<Sequence<P>> {
        let mut sequence = self.running.remove(&arrival)?;
        if sequence.run.added {
            self.dropped.push(sequence.id);
        }
        self.blocks.release(sequence.stop().blocks());
        Some(sequence)
    }

    /// Ends an admitted sequence.
    fn end(&mut self, arrival: Arrival) {
        let Some(sequence) = self.stop(arrival).or_else(|| self.preempted.remove(&arrival)) else { return };
        let aged = sequence.admission.as_ref().is_some_and(|admission| admission.aged);
        let unused = if aged { sequence.cost_to_come() } else { 0 };
        sequence.slots().iter().for_each(|&slot| self.slots.unpin(slot));
        self.flows.leave(sequence.flow, unused);
        self.forget(sequence.id);
    }

    /// Forgets the keys of a request that has ended. Whoever waits for it in its group does not any more.
    fn forget(&mut self, id: RequestId) {
        let ticket = self.tickets.remove(&id);
        if let Some(Ticket { arrival, group: Some(group), .. }) = ticket {
            self.groups.leave(group, arrival);
        }
    }
}

impl<P> Scheduler<P> {
    /// All requests that have not ended, but for those that wait for their groups.
    fn sequences(&self) -> impl Iterator<Item = &Sequence<P>> {
        self.flows.iter().chain(self.admitted())
    }

    fn admitted(&self) -> impl Iterator<Item = &Sequence<P>> {
        self.running.values().chain(self.preempted.values())
    }
}
