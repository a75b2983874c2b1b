//! Planning one step: decode rows first, then prefill, within the budgets.

use std::{collections::BTreeSet, mem, sync::Arc, time::Duration};

use super::{Flight, FlightRows, MAX_IN_FLIGHT, Scheduler};
use crate::{
    AdapterKey, Added, Limits, RowsPlan, StepPlan,
    flows::GENERATED,
    sequence::{Arrival, Sequence},
};

/// Devices multiply rows in tiles, so a few rows beyond whole tiles cost as much as another tile. This is the size of
/// the tiles of GPUs, which have the largest.
const TILE_ROWS: usize = 128;

/// Prompt rows of a step at rest, unless the limit is lower. Beyond about this number, further rows of a step do not
/// make each of them cheaper.
const PREFILL_ROWS: usize = 512;
/// The budget grows by this with every step without room for more prompt rows, and shrinks by it with every other step.
const PREFILL_GROWTH: usize = 4;

/// The number of prompt rows of a step. A fixed number leaves seats empty where prompts are long for their answers or
/// sequences are many, and a large one makes all sequences wait for each prompt. This one grows slowly while prompts
/// wait, so that sequences stay spread over the steps. If a step took all prompts at once, they would end together, and
/// their successors would arrive together, too.
#[derive(Debug, Clone, Copy)]
pub(super) struct PrefillBudget(usize);

impl Default for PrefillBudget {
    fn default() -> Self {
        Self(PREFILL_ROWS)
    }
}

impl PrefillBudget {
    /// Prompt rows for a step with so many decode rows. It is the number nearest to the budget that makes whole tiles
    /// together with them and that the limit allows, unless rounding takes half of the budget or more.
    fn rows(self, limits: &Limits, decode: usize) -> usize {
        let most = limits.most_prefill_rows();
        // Nobody waits for the next token.
        if limits.bidirectional {
            return most;
        }
        let wanted = self.0.min(most);
        let mut rows = ((wanted + decode + TILE_ROWS / 2) / TILE_ROWS * TILE_ROWS).saturating_sub(decode);
        if rows > most {
            rows = rows.saturating_sub(TILE_ROWS);
        }
        if rows > wanted / 2 { rows } else { wanted }
    }

    /// Adapts the budget to whether a step had room for more prompt rows.
    fn follow(&mut self, limits: &Limits, had_room: bool) {
        let most = limits.most_prefill_rows().max(PREFILL_ROWS);
        self.0 = match had_room {
            true => self.0.saturating_sub(PREFILL_GROWTH).max(PREFILL_ROWS),
            false => (self.0 + PREFILL_GROWTH).min(most),
        };
    }
}

/// A step being planned, and what is left of its budgets.
#[derive(Debug)]
pub(super) struct Draft<P> {
    pub(super) id: u64,
    rows_left: usize,
    /// Prompt rows that the step may have, and how many of them are left.
    prefill: usize,
    prefill_left: usize,
    /// Most rows of the prompt that is planned.
    most: usize,
    /// Rows of a prompt beside which nothing runs or waits, if these are all that it needs.
    alone: usize,
    /// Whether others than the prompt that is planned could use what is left.
    pub(super) shared: bool,
    /// Whether sequences have all of their rows in the step, or none.
    undivided: bool,
    logits_left: usize,
    added_left: usize,
    pub(super) unload: Vec<u32>,
    pub(super) load: Vec<(u32, AdapterKey)>,
    pub(super) added: Vec<Added<P>>,
    /// Slots, sequence, rows, and whether they end a sequence that is scored.
    rows: Vec<(Arc<[u32]>, Arrival, RowsPlan, bool)>,
}

impl<P> Draft<P> {
    fn new(id: u64, limits: &Limits) -> Self {
        Self {
            id,
            rows_left: limits.max_rows as usize,
            prefill: 0,
            prefill_left: 0,
            most: usize::MAX,
            alone: 0,
            shared: false,
            undivided: limits.bidirectional,
            logits_left: limits.max_logit_rows as usize,
            added_left: limits.max_added_tokens as usize,
            unload: Vec::new(),
            load: Vec::new(),
            added: Vec::new(),
            rows: Vec::with_capacity(limits.seats()),
        }
    }

    /// Returns whether any sequence could have a prefill row.
    pub(super) fn has_room(&self) -> bool {
        self.rows_left.min(self.prefill_left).min(self.logits_left) > 0
    }

    /// Whether the step's message has room for one more sequence. A sequence always fits into a message of its own.
    pub(super) fn fits(&self, sequence: &Sequence<P>) -> bool {
        self.added.is_empty() || sequence.known() <= self.added_left
    }

    pub(super) fn add(&mut self, sequence: &Sequence<P>)
    where
        P: Clone,
    {
        self.added_left = self.added_left.saturating_sub(sequence.known());
        self.added.push(Added {
            id: sequence.id,
            prompt: sequence.prompt.clone(),
            generated: sequence.generated.clone(),
            slots: sequence.slots().into(),
            adapters_from: sequence.adapters_from,
            payload: sequence.payload.clone(),
        });
    }

    /// Returns how many of the sequence's next rows the budgets allow.
    fn allowed(&self, sequence: &Sequence<P>) -> usize {
        let wanted = sequence.rows_to_plan();
        if self.undivided {
            // A prompt of more rows than the limit for prompts has a step for itself.
            let is_first = self.prefill_left == self.prefill;
            let fits = wanted <= self.rows_left.min(self.logits_left);
            return if fits && (is_first || wanted <= self.prefill_left) { wanted } else { 0 };
        }
        let mut rows = wanted.min(self.rows_left);
        if sequence.prefills() && wanted > self.alone {
            rows = rows.min(self.most).min(self.prefill_room(wanted));
        }
        if sequence.prompt_logprobs {
            rows = rows.min(self.logits_left);
        } else if rows == wanted && self.logits_left == 0 {
            rows = rows.saturating_sub(1);
        }
        rows
    }

    /// Rows for a prompt that wants so many. One that needs more than two further steps leaves a tile to others, or
    /// half of what is left.
    fn prefill_room(&self, wanted: usize) -> usize {
        let left = self.prefill_left;
        match self.shared && wanted > 2 * self.prefill {
            true => left.saturating_sub(TILE_ROWS).max(left.div_ceil(2)),
            false => left,
        }
    }

    fn spend(&mut self, sequence: &Sequence<P>, rows: usize, sample: bool) {
        self.rows_left -= rows;
        if sequence.prefills() {
            self.prefill_left = self.prefill_left.saturating_sub(rows);
        }
        self.logits_left -= if sequence.prompt_logprobs { rows } else { usize::from(sample) };
    }

    fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.load.is_empty() && self.unload.is_empty()
    }
}

impl<P: Clone> Scheduler<P> {
    /// Plans the next step, to be run after all earlier ones. `None` while two are in flight, or when there is nothing
    /// to do: ask again after any other call.
    pub fn next_step(&mut self, now: Duration) -> Option<StepPlan<P>> {
        if self.flights.len() == MAX_IN_FLIGHT {
            return None;
        }
        let mut draft = Draft::new(self.steps + 1, &self.limits);
        draft.unload = mem::take(&mut self.unload);
        self.queue_ready(now);
        self.admit_newcomers(now);
        self.plan_running(&mut draft);
        self.load_adapters(&mut draft, now);
        self.admit(&mut draft, now);
        if draft.is_empty() && self.dropped.is_empty() {
            if self.running.is_empty() {
                self.prefill_budget = PrefillBudget::default();
            }
            return None;
        }
        // `has_room` would also look at logits, which are used up when every seat generates, though no prompt waits.
        self.prefill_budget.follow(&self.limits, draft.prefill_left > 0);
        Some(self.launch(draft))
    }

    /// Plans rows of the running sequences: first of those that generate, then of those that prefill, oldest first.
    fn plan_running(&mut self, draft: &mut Draft<P>) {
        let prefills = |arrival: &Arrival| self.running.get(arrival).is_some_and(Sequence::prefills);
        let (prefilling, generating): (Vec<_>, Vec<_>) =
            self.running.keys().partition(|&arrival| prefills(arrival));
        for arrival in generating {
            self.plan_rows(arrival, draft);
        }
        let decode = self.limits.max_rows as usize - draft.rows_left;
        draft.prefill = self.prefill_budget.rows(&self.limits, decode);
        draft.prefill_left = draft.prefill;
        // One step with a whole prompt has fewer launches and sums over ranks than several, and delays nobody.
        if decode == 0 && prefilling.len() + self.waiting_for_seats() == 1 {
            draft.alone = self.limits.most_prefill_rows();
        }
        self.plan_prompts(&prefilling, draft);
    }

    /// Plans prompt rows. The first prompt of each tenant comes before all others, and the tenants share the rows
    /// evenly: the smallest first, so that what it does not need is left to the others. Further prompts follow,
    /// oldest first.
    fn plan_prompts(&mut self, prefilling: &[Arrival], draft: &mut Draft<P>) {
        let mut tenants = BTreeSet::new();
        let order = |arrival: &Arrival| {
            let sequence = self.running.get(arrival)?;
            let first = tenants.insert(self.flows.tenant_of(sequence.flow));
            Some((!first, if first { sequence.rows_to_plan() } else { 0 }, *arrival))
        };
        let mut prompts: Vec<_> = prefilling.iter().filter_map(order).collect();
        prompts.sort_unstable();
        let mut others = prompts.len() + self.waiting_for_seats();
        for (index, (_, _, arrival)) in prompts.into_iter().enumerate() {
            others -= 1;
            draft.shared = others > 0;
            draft.most = draft.prefill_left.div_ceil(tenants.len().saturating_sub(index).max(1));
            self.plan_rows(arrival, draft);
        }
        draft.most = usize::MAX;
    }

    /// Requests that have no seat.
    pub(super) fn waiting_for_seats(&self) -> usize {
        self.preempted.len() + self.flows.waiting()
    }

    /// Plans as many rows of a sequence as it has and as budgets and blocks allow. Does nothing if the sequence does
    /// not run any more because it has been preempted. One that has grown out of its rotary frequencies is preempted, so
    /// that it is computed again under others.
    pub(super) fn plan_rows(&mut self, arrival: Arrival, draft: &mut Draft<P>) {
        let Some(sequence) = self.running.get_mut(&arrival) else { return };
        let (planned, added_len) = (sequence.run.planned, sequence.run.added_len);
        if sequence.rows_to_plan() > 0 && self.limits.rope.last_position(added_len) == Some(planned) {
            return self.preempt(arrival);
        }
        let allowed = draft.allowed(sequence);
        if allowed == 0 || !sequence.run.added && !draft.fits(sequence) {
            return;
        }
        let behind = sequence.run.table.release_before(self.limits.first_block(planned));
        let missing = self.limits.blocks_for(planned + allowed).saturating_sub(sequence.run.table.end());
        self.blocks.release(&behind);
        while self.blocks.available() < missing && self.preempt_for(arrival, draft.id) {}
        let Some(sequence) = self.running.get_mut(&arrival) else { return };
        let table = &mut sequence.run.table;
        (0..missing).map_while(|_| self.blocks.take()).for_each(|block| table.push(block));
        let rows = allowed.min(table.end() * self.limits.block_size as usize - planned);
        if rows == 0 || draft.undivided && rows < allowed {
            return;
        }
        let last = rows == sequence.rows_to_plan();
        let sample = last && sequence.generates();
        draft.spend(sequence, rows, sample);
        if !mem::replace(&mut sequence.run.added, true) {
            draft.add(sequence);
        }
        let plan = RowsPlan {
            id: sequence.id,
            position: planned as u32,
            rows: rows as u32,
            new_blocks: sequence.run.table.from(sequence.run.sent).to_vec(),
            released_blocks: sequence.run.table.released() as u32,
            sample,
        };
        sequence.run.sent = sequence.run.table.end();
        sequence.run.planned += rows;
        sequence.run.last_step = draft.id;
        sequence.in_flight += 1;
        draft.rows.push((sequence.slots().into(), arrival, plan, last && !sample));
        if sample {
            sequence.sampling += 1;
            self.flows.charge(sequence.flow, GENERATED);
            sequence.slots().iter().for_each(|&slot| self.slots.charge(slot, GENERATED));
        }
    }

    /// Counts the slots that have work in the step: rows, sequences that will have more, or requests that only wait for
    /// seats or rows.
    fn count_work(&mut self, draft: &Draft<P>) {
        if draft.rows.is_empty() {
            return;
        }
        let wanting = self.flows.count_absent() > 0;
        let mut working = vec![false; if wanting { self.limits.num_slots as usize } else { 0 }];
        if wanting {
            let unfinished = self.running.values().filter(|sequence| sequence.rows_to_plan() > 0);
            let unfinished = unfinished.chain(self.preempted.values()).flat_map(Sequence::slots);
            let slots = draft.rows.iter().flat_map(|row| &*row.0).chain(unfinished);
            slots.for_each(|&slot| working[slot as usize] = true);
        }
        let flows = &self.flows;
        self.slots.count_step(wanting, |slot, key| working[slot as usize] || flows.can_admit(key));
    }

    /// Puts the step in flight.
    fn launch(&mut self, mut draft: Draft<P>) -> StepPlan<P> {
        draft.rows.sort_unstable_by(|(slots, arrival, ..), (others, other, ..)| {
            slots.cmp(others).then(arrival.cmp(other))
        });
        let rows = draft.rows.iter().map(|(_, arrival, plan, scored)| FlightRows {
            arrival: *arrival,
            id: plan.id,
            rows: plan.rows,
            sample: plan.sample,
            scored: *scored,
        });
        self.flights.push_back(Flight { step: draft.id, rows: rows.collect() });
        self.count_work(&draft);
        self.steps = draft.id;
        StepPlan {
            id: draft.id,
            dropped: mem::take(&mut self.dropped),
            unload: draft.unload,
            load: draft.load,
            added: draft.added,
            rows: draft.rows.into_iter().map(|(_, _, plan, _)| plan).collect(),
        }
    }
}
