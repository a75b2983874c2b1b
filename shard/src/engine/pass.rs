//! One forward pass: from the rows of a step to its result.

use std::time::Instant;

use kernels::{BLOCK_SIZE, Backend, Matrix, SampleRow, Sampled, Segment, SequenceRows};
use model::Pass;

use super::{
    idle::Marks,
    state::{Place, Sequence, State, StepError},
};
use crate::step::{Refusal, Rows, Step, StepResult};

/// A pass that the device has not been seen to finish.
pub(super) struct Launched<B: Backend> {
    id: u64,
    started: Instant,
    /// Sequences in the order of the choices.
    sampled: Vec<u64>,
    tokens: Option<B::Pending>,
    /// Sequences with scored prompt tokens: id, position of the first token, number of tokens.
    scored: Vec<(u64, usize, usize)>,
    scores: Option<B::Pending>,
    refused: Vec<Refusal>,
    /// A step that nothing is sampled from has run when the device has reached its end, too.
    marks: Marks<B>,
}

impl<B: Backend> Launched<B> {
    /// When its launch began.
    pub(super) fn started(&self) -> Instant {
        self.started
    }
}

/// What is wanted of a step's logits.
#[derive(Default)]
struct Wanted {
    rows: Vec<SampleRow>,
    sampled: Vec<u64>,
    targets: Vec<(u32, u32)>,
    scored: Vec<(u64, usize, usize)>,
    num_top: u32,
}

impl<B: Backend> State<B> {
    /// Applies a step and starts its pass. The inner error is the router's fault, the outer one the device's.
    pub(super) fn launch(
        &mut self,
        step: &Step,
        started: Instant,
    ) -> kernels::Result<Result<Launched<B>, StepError>> {
        let mut refused = match self.prepare(step)? {
            Ok(refused) => refused,
            Err(error) => return Ok(Err(error)),
        };
        let wanted = match self.build(step, &mut refused) {
            Ok(wanted) => wanted,
            Err(error) => return Ok(Err(error)),
        };
        let begin = self.ops.mark()?;
        let (mut tokens, mut scores) = (None, None);
        if self.host.rows() > 0 {
            self.forward()?;
            let logits = &self.scratch.logits;
            if !wanted.targets.is_empty() {
                debug_assert!(logits.rows() >= wanted.targets.len());
                scores = Some(self.ops.score(logits, &wanted.targets, wanted.num_top)?);
            }
            if !wanted.rows.is_empty() {
                tokens = Some(self.ops.sample(logits, &wanted.rows, &mut self.sampler)?);
            }
        }
        let rows = self.host.rows();
        let rows = (rows > 0 && self.host.sequences.len() == rows).then_some(rows);
        let marks = Marks { begin, end: self.ops.mark()?, rows };
        let Wanted { sampled, scored, .. } = wanted;
        Ok(Ok(Launched { id: step.id, started, sampled, tokens, scored, scores, refused, marks }))
    }

    /// Starts the pass of the rows in `self.host`.
    pub(super) fn forward(&mut self) -> kernels::Result<()> {
        self.ops.upload(&self.host, &mut self.batch)?;
        let pass = Pass { ops: &*self.ops, batch: &self.batch, slots: &self.slots, sampler: &self.sampler };
        self.model.forward(&pass, &mut self.scratch, &mut self.kv)
    }

    /// Whether the device has finished a pass, the copies of its choices included.
    pub(super) fn is_ready(&self, launched: &Launched<B>) -> bool {
        self.ops.reached(&launched.marks.end)
    }

    /// Waits for a pass.
    pub(super) fn collect(&mut self, launched: Launched<B>) -> kernels::Result<StepResult> {
        let all = |pending: Option<B::Pending>| -> kernels::Result<Vec<Sampled>> {
            let mut out = Vec::new();
            pending.map_or(Ok(()), |pending| self.ops.collect(pending, &mut out))?;
            Ok(out)
        };
        let mut scores = all(launched.scores)?.into_iter();
        let prompt = launched
            .scored
            .into_iter()
            .map(|(sequence, position, count)| (sequence, position, scores.by_ref().take(count).collect()));
        let prompt = prompt.collect();
        let tokens = launched.sampled.into_iter().zip(all(launched.tokens)?).collect();
        let Marks { begin, end, .. } = &launched.marks;
        let duration_us = (self.ops.seconds_between(begin, end)? * 1e6) as u64;
        self.idle.note(&self.ops, launched.marks);
        Ok(StepResult { id: launched.id, prompt, tokens, duration_us, refused: launched.refused })
    }

    /// Builds the index data of a step in `self.host`.
    fn build(&mut self, step: &Step, refused: &mut Vec<Refusal>) -> Result<Wanted, StepError> {
        let host = &mut self.host;
        host.tokens.clear();
        host.positions.clear();
        host.store_at.clear();
        host.sequences.clear();
        host.blocks.clear();
        host.segments.clear();
        host.logit_rows.clear();
        host.logit_segments.clear();
        let rows = step.rows.iter().fold(0, |sum: usize, rows| sum.saturating_add(rows.rows));
        self.in_range("rows", rows, self.limits.max_rows + 1)?;
        let mut wanted = Wanted::default();
        for rows in &step.rows {
            if let Some(refusal) = self.append(rows, &mut wanted)? {
                refused.push(refusal);
            }
        }
        self.in_range("rows with logits", self.host.logit_rows.len(), self.limits.max_logit_rows + 1)?;
        self.host.check().map_err(|error| StepError::Rows(error.to_string()))?;
        Ok(wanted)
    }

    /// Appends one sequence's rows, unless the sequence was refused or has to be now.
    fn append(&mut self, rows: &Rows, wanted: &mut Wanted) -> Result<Option<Refusal>, StepError> {
        let id = rows.sequence;
        for &block in &rows.new_blocks {
            self.in_range("block", block as usize, self.num_blocks)?;
        }
        let Some(place) = self.sequences.get(&id) else { return Err(StepError::UnknownSequence(id)) };
        let Place::Seated(Sequence { slot, .. }) = place else { return Ok(None) };
        if let Some(slot) = slot.filter(|slot| !self.is_slot_ready(*slot)) {
            return Err(StepError::SlotNotReady(slot));
        }
        let (end, limit) = (rows.position.saturating_add(rows.rows), self.model.decoder().max_positions);
        if end > limit {
            return Ok(Some(self.refuse(id, format!("position {} is beyond the model's {limit}", end - 1))));
        }
        let Some(Place::Seated(sequence)) = self.sequences.get_mut(&id) else { return Ok(None) };
        sequence.extend_blocks(rows)?;
        if rows.rows == 0 || end > sequence.blocks.len() * BLOCK_SIZE {
            return Err(StepError::NoBlock { sequence: id, position: end, blocks: sequence.blocks.len() });
        }
        let host = &mut self.host;
        let start = host.tokens.len() as u32;
        host.sequences.push(SequenceRows {
            start,
            rows: rows.rows as u32,
            kv_len: end as u32,
            first_block: host.blocks.len() as u32,
        });
        host.blocks.extend(&sequence.blocks[..end.div_ceil(BLOCK_SIZE)]);
        let first_logit = host.logit_rows.len() as u32;
        for position in rows.position..end {
            let known = sequence.tokens.get(position).map(|token| *token as i32);
            host.tokens.push(known.unwrap_or(-1 - sequence.seat as i32));
            host.positions.push(position as u32);
            host.store_at.push(
                sequence.blocks[position / BLOCK_SIZE] * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32,
            );
            let scored = sequence.prompt_logprobs && position + 1 < sequence.prompt_len;
            let logit = host.logit_rows.len() as u32;
            if scored {
                wanted.targets.push((logit, sequence.tokens[position + 1]));
                wanted.num_top = wanted.num_top.max(sequence.num_top);
            } else if rows.sample && position + 1 == end {
                wanted.rows.push(SampleRow { row: logit, seat: sequence.seat });
                wanted.sampled.push(id);
            } else {
                continue;
            }
            host.logit_rows.push(host.tokens.len() as u32 - 1);
        }
        let scored = end.min(sequence.prompt_len.saturating_sub(1)).saturating_sub(rows.position);
        if sequence.prompt_logprobs && scored > 0 {
            wanted.scored.push((id, rows.position + 1, scored));
        }
        if let Some(slot) = sequence.slot {
            extend_segment(&mut host.segments, start, host.tokens.len() as u32, slot);
            extend_segment(&mut host.logit_segments, first_logit, host.logit_rows.len() as u32, slot);
        }
        Ok(None)
    }
}

/// Adds rows to the last segment when they follow it with the same slot.
fn extend_segment(segments: &mut Vec<Segment>, start: u32, end: u32, slot: u32) {
    match segments.last_mut() {
        _ if start == end => {}
        Some(last) if last.slot == slot && last.end == start => last.end = end,
        _ => segments.push(Segment { start, end, slot }),
    }
}
