//! Admission of adapters into slots and of sequences into seats.

use std::{sync::Arc, time::Duration};

use super::{Scheduler, plan::Draft, preempt::Obstacle};
use crate::{
    blocks::Cached,
    flows::{FlowId, Residency, Turn},
    sequence::{Admission, Arrival, Sequence},
    slots::{Need, Wish},
    table::Table,
};

/// Tenants without a seat that one step passes over because of their blocks. Each costs a look at all running sequences.
const PASSED_OVER: usize = 8;

/// Seats of a tenant that gives a slot which it has not used yet to a tenant without a seat, as it gives one of its seats.
const SEVERAL: usize = 2;

/// The next candidate for a seat.
#[derive(Debug, Clone, Copy)]
enum Candidate {
    Preempted(Arrival),
    Waiting(FlowId, Turn),
}

impl<P: Clone> Scheduler<P> {
    /// Loads the adapters whose requests are next, for as long as there are slots. This is ahead of seats and blocks,
    /// so that a load passes while others run.
    pub(super) fn load_adapters(&mut self, draft: &mut Draft<P>, now: Duration) {
        loop {
            let aged =
                self.flows.overdue_absent(now, self.limits.adapter_cycle_time).map(|flow| (flow, Turn::Aged));
            if aged.is_some_and(|(flow, turn)| self.give_slot(flow, turn, draft, now)) {
                continue;
            }
            let fair = self.flows.least_served(Residency::Absent).map(|flow| (flow, Turn::Fair));
            if !fair.is_some_and(|(flow, turn)| self.give_slot(flow, turn, draft, now)) {
                break;
            }
        }
        if self.flows.count_absent() == 0 {
            for key in self.slots.undrain() {
                self.flows.set_residency(key, Residency::Ready);
            }
        }
    }

    /// Starts to load the absent adapters of a flow, all of them, or empties a slot for one. Returns false if neither can
    /// be done in this step.
    fn give_slot(&mut self, flow: FlowId, turn: Turn, draft: &mut Draft<P>, now: Duration) -> bool {
        let adapters = self.flows.adapters(flow).clone();
        let absent =
            adapters.list().iter().filter(|adapter| self.slots.residency(adapter.key) == Residency::Absent);
        let absent: Vec<_> = absent.copied().collect();
        let flows = &self.flows;
        let wish = |key| match flows.waits(key) {
            _ if adapters.contains(key) => Wish::Needed,
            true if flows.claims(key) => Wish::Needed,
            true => Wish::Wanted,
            false => Wish::None,
        };
        let Some(placement) = self.slots.place(&absent, wish) else {
            return self.drain_slot(flow, turn, now);
        };
        for (slot, key) in placement.evicted {
            draft.unload.push(slot);
            self.flows.set_residency(key, Residency::Absent);
        }
        for (slot, adapter) in placement.slots.into_iter().zip(absent) {
            draft.load.push((slot, adapter.key));
            self.flows.set_residency(adapter.key, Residency::Loading);
            self.flows.count_load(turn);
        }
        true
    }

    /// Makes an adapter leave its slot for a flow as soon as its last sequence ends. Returns whether that is at once.
    fn drain_slot(&mut self, flow: FlowId, turn: Turn, now: Duration) -> bool {
        let first = self.flows.needs_first_slot(flow);
        let flows = &self.flows;
        let yields = |key| flows.yields(key, flow, turn);
        let wanting = flows.count_absent();
        let drained = if first {
            // While there is room, what is loaded is used in this step.
            let is_ahead = |key| self.crowded && flows.tenants_run(key, SEVERAL);
            self.slots.drain(wanting, &Need::FirstSeat { is_ahead }, yields)
        } else {
            let cycle_time = self.limits.adapter_cycle_time;
            let need = Need::Turn { now, cycle_time, is_wanted: |key| flows.waits(key) };
            self.slots.drain(wanting, &need, yields)
        };
        let Some(drained) = drained else { return false };
        self.flows.set_residency(drained.key, Residency::Draining);
        drained.free
    }

    /// Starts sequences while seats, budgets and blocks last. If the next one does not fit, all behind it wait, too:
    /// otherwise smaller requests could overtake it for ever.
    pub(super) fn admit(&mut self, draft: &mut Draft<P>, now: Duration) {
        let mut promised = None;
        self.crowded = false;
        while draft.has_room() {
            let Some(candidate) = self.candidate(now) else { return };
            if self.running.len() >= self.limits.seats() {
                self.crowded = true;
                return;
            }
            if !self.peek(candidate).is_some_and(|sequence| draft.fits(sequence)) {
                return;
            }
            let promised = promised.get_or_insert_with(|| self.promised());
            let Some(cached) = self.fit(candidate, *promised) else {
                self.crowded = true;
                return;
            };
            let Some(sequence) = self.take(candidate, cached.table.end(), now) else { return };
            *promised += self.start(sequence, cached, draft);
        }
    }

    /// Gives seats to tenants that have none, ahead of everybody else and in place of running sequences, for as long as
    /// others run more than one. The rows are planned with those of the running sequences. A tenant that needs more blocks
    /// than it can get this way waits for them alone.
    pub(super) fn admit_newcomers(&mut self, now: Duration) {
        let mut passed_over = 0;
        while passed_over <= PASSED_OVER
            && let Some(flow) = self.flows.newcomer(passed_over)
        {
            let victims = match self.victims_for_newcomer(flow) {
                Ok(victims) => victims,
                Err(Obstacle::Seats) => return,
                Err(Obstacle::Blocks) => {
                    passed_over += 1;
                    continue;
                }
            };
            victims.into_iter().for_each(|victim| self.preempt(victim));
            let candidate = Candidate::Waiting(flow, Turn::Fair);
            let Some(cached) = self.fit(candidate, self.promised()) else { return };
            let Some(sequence) = self.take(candidate, cached.table.end(), now) else { return };
            self.seat(sequence, cached);
        }
    }

    /// The next candidate for a free seat. Sequences that have been admitted before come back before others, oldest
    /// first. Ahead of them are, in this order, one whose tenant runs nothing, whoever is overdue, and tenants that
    /// have no seat.
    fn candidate(&mut self, now: Duration) -> Option<Candidate> {
        let alone = |sequence: &&Sequence<P>| {
            let tenant = self.flows.tenant_of(sequence.flow);
            !self.running.values().any(|running| self.flows.tenant_of(running.flow) == tenant)
        };
        let preempted = self.preempted.values().find(alone).or(self.preempted.values().next());
        let preempted = preempted.map(|sequence| (sequence.arrival, alone(&sequence)));
        if let Some((arrival, true)) = preempted {
            return Some(Candidate::Preempted(arrival));
        }
        if let Some(flow) = self.flows.overdue_ready(now) {
            return Some(Candidate::Waiting(flow, Turn::Aged));
        }
        let Some((arrival, _)) = preempted else {
            return self
                .flows
                .least_served(Residency::Ready)
                .map(|flow| Candidate::Waiting(flow, Turn::Fair));
        };
        let newcomer = self.flows.newcomer(0).map(|flow| Candidate::Waiting(flow, Turn::Fair));
        Some(newcomer.unwrap_or(Candidate::Preempted(arrival)))
    }

    fn peek(&self, candidate: Candidate) -> Option<&Sequence<P>> {
        match candidate {
            Candidate::Preempted(arrival) => self.preempted.get(&arrival),
            Candidate::Waiting(flow, _) => self.flows.peek(flow),
        }
    }

    /// The beginning that the candidate shares, if there are blocks for all its known tokens and one more block, beside
    /// those promised to the running sequences for theirs.
    fn fit(&self, candidate: Candidate, promised: usize) -> Option<Cached> {
        let sequence = self.peek(candidate).filter(|sequence| sequence.in_flight == 0)?;
        let cached = self.find_cached(sequence);
        if self.waits_for_prompt(sequence, &cached) {
            return None;
        }
        let needed = self.blocks_needed(sequence, &cached.table);
        (promised + needed <= self.blocks.available()).then_some(cached)
    }

    /// Available blocks that a sequence takes when it gets its seat, and is promised then.
    pub(super) fn blocks_needed(&self, sequence: &Sequence<P>, cached: &Table) -> usize {
        let idle = cached.blocks().iter().filter(|&&block| self.blocks.is_idle(block)).count();
        self.blocks_to_come(sequence, cached) + idle
    }

    /// Blocks that the running sequences are expected to need soon.
    pub(super) fn promised(&self) -> usize {
        self.running.values().map(|running| self.blocks_to_come(running, &running.run.table)).sum()
    }

    /// The blocks of the prefix cache that a sequence can begin with.
    pub(super) fn find_cached(&self, sequence: &Sequence<P>) -> Cached {
        let start = sequence.start(&self.limits);
        if !sequence.shares(&self.limits) || sequence.prompt_logprobs {
            return Cached { table: Table::default(), prefix: start };
        }
        let size = self.limits.block_size as usize;
        let full = (0..self.limits.reusable_blocks(sequence.known()))
            .map(|block| sequence.content(block, &self.limits));
        self.blocks.find(start, full, |end| self.limits.first_block(end * size))
    }

    /// Blocks that a sequence is expected to need soon beside those of a table: for its known tokens, and one to grow
    /// into, as far as its window and the rows of a step hold them at once.
    pub(super) fn blocks_to_come(&self, sequence: &Sequence<P>, table: &Table) -> usize {
        let soon = self.limits.blocks_for(sequence.len()).max(table.end()) + 1;
        let soon = soon.min(self.limits.blocks_for(sequence.max_positions())) - table.released();
        let rows = sequence.rows_to_plan().clamp(1, self.limits.most_prefill_rows());
        soon.min(self.limits.most_blocks(rows)).saturating_sub(table.blocks().len())
    }

    /// Takes a candidate from where it waits. `cached` blocks of it need not be computed.
    fn take(&mut self, candidate: Candidate, cached: usize, now: Duration) -> Option<Sequence<P>> {
        match candidate {
            Candidate::Preempted(arrival) => self.preempted.remove(&arrival),
            Candidate::Waiting(flow, turn) => {
                let mut sequence = self.flows.pop(flow, now)?;
                self.admit_first(&mut sequence, cached * self.limits.block_size as usize, turn, now);
                self.begin_in_group(&sequence, cached);
                Some(sequence)
            }
        }
    }

    /// At its first admission a sequence pins its slots and pays for its prompt.
    fn admit_first(&mut self, sequence: &mut Sequence<P>, hit: usize, turn: Turn, now: Duration) {
        let cost = (sequence.prompt.len() - hit) as u64;
        let aged = turn == Turn::Aged;
        if aged {
            self.flows.admit_aged(cost + sequence.cost_to_come());
        }
        self.flows.charge(sequence.flow, cost);
        let slots: Arc<[u32]> = sequence.adapters.keys().filter_map(|key| self.slots.pin(key, now)).collect();
        slots.iter().for_each(|&slot| self.slots.charge(slot, cost));
        let queued = now.saturating_sub(sequence.submitted);
        sequence.admission = Some(Admission { slots, queued, cached_tokens: hit as u32, aged });
        self.admitted += 1;
        self.cached_tokens += hit as u64;
    }

    /// Gives a sequence its seat and its first rows. Returns the blocks that it is promised beside.
    fn start(&mut self, sequence: Sequence<P>, cached: Cached, draft: &mut Draft<P>) -> usize {
        let arrival = self.seat(sequence, cached);
        draft.shared = self.waiting_for_seats() > 0;
        self.plan_rows(arrival, draft);
        self.running.get(&arrival).map_or(0, |sequence| self.blocks_to_come(sequence, &sequence.run.table))
    }

    /// Gives a sequence its seat and its cached blocks.
    fn seat(&mut self, mut sequence: Sequence<P>, Cached { table, prefix }: Cached) -> Arrival {
        table.blocks().iter().for_each(|&block| self.blocks.hold(block));
        let hit = table.end() * self.limits.block_size as usize;
        let (arrival, known) = (sequence.arrival, sequence.known());
        let shares = sequence.shares(&self.limits);
        let run = &mut sequence.run;
        run.added_len = known;
        (run.planned, run.computed, run.published) = (hit, hit, table.end());
        run.prefix = shares.then_some(prefix);
        run.table = table;
        self.running.insert(arrival, sequence);
        arrival
    }
}
