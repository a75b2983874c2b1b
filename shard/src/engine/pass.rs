//! One forward pass: from the rows of a step to its result.

use std::time::Instant;

use kernels::{BLOCK_SIZE, Backend, Matrix, SampleRow, Sampled, Segment, SequenceRows, Solo};
use model::Pass;

use super::{
    idle::Marks,
    state::{State, StepError},
};
use crate::step::{Rows, Step, StepResult};

/// A pass whose choices are on their way.
pub(super) struct Launched<B: Backend> {
    id: u64,
    started: Instant,
    /// Sequences in the order of the choices.
    sampled: Vec<u64>,
    tokens: Option<B::Pending>,
    /// Sequences with scored prompt tokens: id, position of the first token, number of tokens.
    scored: Vec<(u64, usize, usize)>,
    scores: Option<B::Pending>,
    marks: Option<Marks<B>>,
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
        if let Err(error) = self.prepare(step)? {
            return Ok(Err(error));
        }
        let wanted = match self.build(step) {
            Ok(wanted) => wanted,
            Err(error) => return Ok(Err(error)),
        };
        let begin = self.idle.mark(&self.ops);
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
        let marks = begin.zip(self.idle.mark(&self.ops)).map(|(begin, end)| Marks { begin, end, rows });
        let Wanted { sampled, scored, .. } = wanted;
        Ok(Ok(Launched { id: step.id, started, sampled, tokens, scored, scores, marks }))
    }

    /// Starts the pass of the rows in `self.host`.
    pub(super) fn forward(&mut self) -> kernels::Result<()> {
        self.ops.upload(&self.host, &mut self.batch)?;
        let pass = Pass {
            ops: &*self.ops,
            batch: &self.batch,
            slots: &self.slots,
            sampler: &self.sampler,
            comm: &Solo,
        };
        self.model.forward(&pass, &mut self.scratch, &mut self.kv)
    }

    pub(super) fn is_ready(&self, launched: &Launched<B>) -> bool {
        [&launched.tokens, &launched.scores].into_iter().flatten().all(|pending| self.ops.ready(pending))
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
        let result = StepResult {
            id: launched.id,
            prompt: prompt.collect(),
            tokens: launched.sampled.into_iter().zip(all(launched.tokens)?).collect(),
            duration_us: launched.started.elapsed().as_micros() as u64,
        };
        if let Some(marks) = launched.marks {
            self.idle.note(&self.ops, marks);
        }
        Ok(result)
    }

    /// Builds the index data of a step in `self.host`.
    fn build(&mut self, step: &Step) -> Result<Wanted, StepError> {
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
            self.append(rows, &mut wanted)?;
        }
        self.in_range("rows with logits", self.host.logit_rows.len(), self.limits.max_logit_rows + 1)?;
        Ok(wanted)
    }

    /// Appends one sequence's rows.
    fn append(&mut self, rows: &Rows, wanted: &mut Wanted) -> Result<(), StepError> {
        let id = rows.sequence;
        for &block in &rows.new_blocks {
            self.in_range("block", block as usize, self.num_blocks)?;
        }
        let slot = self.sequences.get(&id).ok_or(StepError::UnknownSequence(id))?.slot;
        if let Some(slot) = slot.filter(|slot| !self.is_slot_ready(*slot)) {
            return Err(StepError::SlotNotReady(slot));
        }
        let max_positions = self.model.config().max_positions;
        self.in_range("position", rows.position.saturating_add(rows.rows), max_positions + 1)?;
        let Some(sequence) = self.sequences.get_mut(&id) else { return Err(StepError::UnknownSequence(id)) };
        sequence.blocks.extend(&rows.new_blocks);
        let end = rows.position + rows.rows;
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
        Ok(())
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
