//! The scheduler's state and what changes it from outside. Planning is in `plan` and `admit`.

mod admit;
mod check;
mod plan;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

use plan::PrefillBudget;

use crate::{
    AdapterKey, Event, FailReason, Limits, Request, RequestId, Stats, SubmitError,
    blocks::Blocks,
    queues::{QueueId, Queues, Residency},
    sequence::{Arrival, Sequence, Start},
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
}

/// A step that has been planned and not completed.
#[derive(Debug)]
struct Flight {
    step: u64,
    rows: Vec<FlightRows>,
}

/// Where a request that has not ended is to be found.
#[derive(Debug, Clone, Copy)]
struct Ticket {
    arrival: Arrival,
    queue: QueueId,
}

/// Plans the steps of one model.
///
/// Every submitted request ends once: with an `Event` that says so, by `cancel`, or by `reset`.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    blocks: Blocks,
    slots: Slots,
    queues: Queues,
    /// Sequences with a seat and blocks, oldest first.
    running: BTreeMap<Arrival, Sequence>,
    /// Sequences that gave their blocks to older ones. They keep their adapter's slot, and come back before anybody
    /// new is admitted.
    preempted: BTreeMap<Arrival, Sequence>,
    /// Looked up only, never iterated.
    tickets: HashMap<RequestId, Ticket>,
    /// Oldest first.
    flights: VecDeque<Flight>,
    /// Seats to free with the next step.
    dropped: Vec<RequestId>,
    prefill_budget: PrefillBudget,
    arrivals: Arrival,
    steps: u64,
    preemptions: u64,
    cached_tokens: u64,
}

impl Scheduler {
    /// A scheduler for shards that have just been reset.
    ///
    /// # Panics
    /// If a limit is zero that must not be.
    pub fn new(limits: Limits) -> Self {
        limits.assert_sane();
        Self {
            blocks: Blocks::new(limits.num_blocks, limits.block_size),
            slots: Slots::new(limits.num_slots, limits.adapter_bytes),
            queues: Queues::default(),
            running: BTreeMap::new(),
            preempted: BTreeMap::new(),
            tickets: HashMap::new(),
            flights: VecDeque::new(),
            dropped: Vec::new(),
            prefill_budget: PrefillBudget::default(),
            arrivals: 0,
            steps: 0,
            preemptions: 0,
            cached_tokens: 0,
            limits,
        }
    }

    /// Queues a request.
    ///
    /// # Errors
    /// If it can never run within the limits.
    pub fn submit(&mut self, request: Request, now: Duration) -> Result<(), SubmitError> {
        self.admissible(&request)?;
        let residency = request.adapter.map_or(Residency::Ready, |adapter| self.slots.residency(adapter.key));
        let queue = self.queues.open(request.adapter, residency);
        let arrival = self.arrivals;
        self.arrivals += 1;
        self.tickets.insert(request.id, Ticket { arrival, queue });
        self.queues.push(Sequence::new(request, arrival, queue, now), now);
        Ok(())
    }

    fn admissible(&self, request: &Request) -> Result<(), SubmitError> {
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if request.max_new_tokens == 0 {
            return Err(SubmitError::NoNewTokens);
        }
        if self.tickets.contains_key(&request.id) {
            return Err(SubmitError::DuplicateId(request.id));
        }
        let positions = request.prompt.len() as u64 + u64::from(request.max_new_tokens) - 1;
        let capacity = u64::from(self.limits.num_blocks) * u64::from(self.limits.block_size);
        if positions > capacity {
            return Err(SubmitError::TooLong { positions, capacity });
        }
        let Some(adapter) = request.adapter else { return Ok(()) };
        if self.limits.num_slots == 0 {
            return Err(SubmitError::NoSlots);
        }
        let limit = self.limits.adapter_bytes;
        if limit > 0 && adapter.bytes > limit {
            return Err(SubmitError::AdapterTooLarge { bytes: adapter.bytes, limit });
        }
        Ok(())
    }

    /// Ends a request, wherever it is. Its blocks are free at once; no event of it follows. Does nothing if it has
    /// ended already.
    pub fn cancel(&mut self, id: RequestId) {
        let Some(&Ticket { arrival, queue }) = self.tickets.get(&id) else { return };
        if self.is_admitted(arrival) {
            self.end(arrival);
        } else if self.queues.remove(queue, arrival).is_some() {
            self.tickets.remove(&id);
        }
    }

    /// Takes the results of a step: the token of each `sample`, in row order. Results for requests that have ended
    /// meanwhile are dropped. Steps are completed in the order planned; one that is passed over counts as completed
    /// without results, and one that is not in flight is ignored.
    pub fn complete(&mut self, step: u64, tokens: &[(RequestId, u32)]) -> Vec<Event> {
        let mut events = Vec::new();
        if self.flights.iter().all(|flight| flight.step != step) {
            return events;
        }
        while let Some(flight) = self.flights.pop_front_if(|flight| flight.step <= step) {
            let mut results = if flight.step == step { tokens } else { &[] }.iter().peekable();
            for rows in &flight.rows {
                let token = if rows.sample { results.next_if(|(id, _)| *id == rows.id) } else { None };
                self.settle(flight.step, rows, token.map(|&(_, token)| token), &mut events);
            }
        }
        events
    }

    /// Counts a sequence's rows of a completed step as computed.
    fn settle(&mut self, step: u64, rows: &FlightRows, token: Option<u32>, events: &mut Vec<Event>) {
        let running = self.running.get_mut(&rows.arrival);
        let runs = running.is_some();
        let Some(sequence) = running.or_else(|| self.preempted.get_mut(&rows.arrival)) else { return };
        let id = sequence.id;
        sequence.in_flight -= 1;
        if let Some(Start { queued, cached_tokens }) = sequence.start.take() {
            events.push(Event::Started { id, queued, cached_tokens });
        }
        let mut ended = false;
        if rows.sample {
            sequence.sampling -= 1;
            match token {
                Some(token) => {
                    let finish = sequence.push(token);
                    ended = finish.is_some();
                    events.push(Event::Token { id, token, finish });
                }
                None => {
                    ended = true;
                    events.push(Event::Failed { id, reason: FailReason::NoToken { step } });
                }
            }
        }
        if runs {
            sequence.run.computed += rows.rows as usize;
            Self::publish(&mut self.blocks, self.limits.block_size as usize, sequence);
        }
        if ended {
            self.end(rows.arrival);
        }
    }

    /// Makes the blocks of a sequence that have become full known to the prefix cache.
    fn publish(blocks: &mut Blocks, size: usize, sequence: &mut Sequence) {
        let (run, tokens) = (&mut sequence.run, &sequence.tokens);
        // The row of a token that never came.
        let computed = run.computed.min(tokens.len());
        while let Some(prefix) = run.prefix
            && (run.published + 1) * size <= computed
        {
            let start = run.published * size;
            let block = run.blocks[run.published];
            run.prefix = blocks.publish(prefix, &tokens[start..start + size], block);
            run.published += 1;
        }
    }

    /// `key` is in `slot`, on every rank. Ignored unless that load is under way.
    pub fn slot_ready(&mut self, slot: u32, key: AdapterKey) {
        if self.slots.ready(slot, key) {
            self.queues.set_residency(key, Residency::Ready);
        }
    }

    /// `key` could not be copied into `slot`, on some rank: the requests that wait for it fail. Ignored unless that
    /// load is under way.
    pub fn slot_failed(&mut self, slot: u32, key: AdapterKey) -> Vec<Event> {
        if !self.slots.failed(slot, key) {
            return Vec::new();
        }
        self.queues.set_residency(key, Residency::Absent);
        let failed = self.queues.remove_all(key);
        failed
            .into_iter()
            .map(|sequence| {
                self.tickets.remove(&sequence.id);
                Event::Failed { id: sequence.id, reason: FailReason::AdapterLoad(key) }
            })
            .collect()
    }

    /// Forgets everything, as the shards have: returns the requests that had not ended, oldest first. They must be
    /// submitted again to run, after their adapters have been prepared again.
    pub fn reset(&mut self) -> Vec<RequestId> {
        let mut lost: Vec<_> = self.sequences().map(|sequence| (sequence.arrival, sequence.id)).collect();
        lost.sort_unstable();
        *self = Self::new(self.limits.clone());
        lost.into_iter().map(|(_, id)| id).collect()
    }

    /// What there is now.
    pub fn stats(&self) -> Stats {
        let (resident_adapters, loading_adapters) = self.slots.count();
        Stats {
            waiting: self.queues.waiting(),
            running: self.running.len(),
            preempted: self.preempted.len(),
            in_flight: self.flights.len(),
            free_blocks: self.blocks.free(),
            cached_blocks: self.blocks.idle(),
            resident_adapters,
            loading_adapters,
            preemptions: self.preemptions,
            cached_tokens: self.cached_tokens,
        }
    }

    fn is_admitted(&self, arrival: Arrival) -> bool {
        self.running.contains_key(&arrival) || self.preempted.contains_key(&arrival)
    }

    /// All requests that have not ended.
    fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.queues.iter().chain(self.admitted())
    }

    fn admitted(&self) -> impl Iterator<Item = &Sequence> {
        self.running.values().chain(self.preempted.values())
    }

    /// Takes seat and blocks from a running sequence.
    fn stop(&mut self, arrival: Arrival) -> Option<Sequence> {
        let mut sequence = self.running.remove(&arrival)?;
        self.blocks.release(&sequence.stop());
        self.dropped.push(sequence.id);
        Some(sequence)
    }

    /// Ends an admitted sequence.
    fn end(&mut self, arrival: Arrival) {
        let Some(sequence) = self.stop(arrival).or_else(|| self.preempted.remove(&arrival)) else { return };
        if let Some(slot) = sequence.slot {
            self.slots.unpin(slot);
        }
        self.queues.leave(sequence.queue);
        self.tickets.remove(&sequence.id);
    }
}
