//! The first state of a step: builds its batch and launches its forward pass.

use std::{collections::HashMap, ops::Range, time::Instant};

use kernels::{Backend, Segment, SequenceRows, TokenMask};
use model::Pass;

use super::{
    sequence::Sequence,
    state::{Place, State, StepError},
};
use crate::step::{Mask, Member, Pooling, PoolingKind, Refusal, Rows, Step};

/// A step whose forward pass has been launched. Its sampling may have to wait for masks, or for tokens that an earlier
/// step samples.
pub(super) struct Forwarded<B: Backend> {
    pub(super) id: u64,
    pub(super) started: Instant,
    pub(super) begin: B::Mark,
    /// The end of the pass, if sampling did not follow at once.
    pub(super) end: Option<B::Mark>,
    pub(super) rows: usize,
    /// Whether every sequence has one row only.
    pub(super) decodes: bool,
    pub(super) wanted: Wanted,
    masks: HashMap<(u64, usize), Option<TokenMask>>,
    pub(super) refused: Vec<Refusal>,
}

impl<B: Backend> Forwarded<B> {
    /// Adds masks of its rows.
    pub(super) fn add_masks(&mut self, masks: Vec<Mask>) {
        self.masks.extend(masks.into_iter().map(|mask| ((mask.sequence, mask.row), mask.allowed)));
    }

    /// The mask of a sampled row, if it has arrived. The inner `None` is a mask that allows no token.
    pub(super) fn mask(&self, sample: &Sample) -> Option<&Option<TokenMask>> {
        self.masks.get(&(sample.sequence, sample.nth))
    }

    /// Whether sampling can be launched. `outstanding` says whether earlier steps are running.
    pub(super) fn can_sample(&self, outstanding: bool) -> bool {
        let masked = |sample: &Sample| !sample.masked || self.mask(sample).is_some();
        let known = |sample: &Sample| !sample.seat_again || !outstanding;
        self.wanted.samples.iter().all(|sample| masked(sample) && known(sample))
    }
}

/// The outputs of a step that are asked for.
#[derive(Default)]
pub(super) struct Wanted {
    pub(super) samples: Vec<Sample>,
    /// Prompt tokens whose log-probabilities are asked for, each with the row of its logits.
    pub(super) targets: Vec<(u32, u32)>,
    /// The sequences of these tokens: id, position of the first token, number of tokens.
    pub(super) scored: Vec<(u64, usize, usize)>,
    /// The number of most probable tokens to report beside each of them.
    pub(super) num_top: u32,
    pub(super) hidden: Vec<HiddenRows>,
}

/// A row that a token is sampled from.
pub(super) struct Sample {
    pub(super) sequence: u64,
    /// The step that added the sequence.
    pub(super) added_by: u64,
    /// Which of the sequence's sampled rows it is.
    pub(super) nth: usize,
    pub(super) position: usize,
    /// The row of the logits.
    pub(super) logit: u32,
    pub(super) masked: bool,
    /// Whether the sampler has to be given all tokens of the sequence first, for which the host must know them.
    pub(super) seat_again: bool,
}

/// Rows of a sequence whose hidden states are asked for.
pub(super) struct HiddenRows {
    pub(super) sequence: u64,
    pub(super) position: usize,
    /// The first of them in the step, or among the rows with logits if these are scores of classes.
    pub(super) start: usize,
    pub(super) rows: usize,
}

impl<B: Backend> State<B> {
    /// Applies a step and launches its forward pass. The inner error is the router's fault, the outer one the device's.
    pub(super) fn launch_forward(
        &mut self,
        step: Step,
        started: Instant,
    ) -> kernels::Result<Result<Forwarded<B>, StepError>> {
        let mut refused = match self.prepare(&step)? {
            Ok(refused) => refused,
            Err(error) => return Ok(Err(error)),
        };
        let wanted = match self.build(&step, &mut refused) {
            Ok(wanted) => wanted,
            Err(error) => return Ok(Err(error)),
        };
        let begin = self.ops.mark()?;
        let rows = self.host.rows();
        if rows > 0 {
            self.forward()?;
        }
        let decodes = self.host.sequences.len() == rows;
        let (id, masks) = (step.id, HashMap::new());
        let mut forwarded =
            Forwarded { id, started, begin, end: None, rows, decodes, wanted, masks, refused };
        forwarded.add_masks(step.masks);
        Ok(Ok(forwarded))
    }

    /// Launches the forward pass of the batch in `self.host`.
    pub(super) fn forward(&mut self) -> kernels::Result<()> {
        self.ops.upload(&self.host, &mut self.batch)?;
        let pass = Pass { ops: &*self.ops, batch: &self.batch, slots: &self.slots, sampler: &self.sampler };
        self.model.forward(&pass, &mut self.scratch, &mut self.kv)
    }

    /// Builds the batch of a step in `self.host`.
    fn build(&mut self, step: &Step, refused: &mut Vec<Refusal>) -> Result<Wanted, StepError> {
        let host = &mut self.host;
        host.tokens.clear();
        host.positions.clear();
        host.lengths.clear();
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

    /// Appends the rows of one sequence. Returns a refusal if the sequence cannot be computed; skips one that was
    /// refused before.
    fn append(&mut self, rows: &Rows, wanted: &mut Wanted) -> Result<Option<Refusal>, StepError> {
        let id = rows.sequence;
        for &block in &rows.new_blocks {
            self.in_range("block", block as usize, self.num_blocks)?;
        }
        self.in_range("rows to sample from", rows.sample, rows.rows.saturating_add(1))?;
        let Some(place) = self.sequences.get(&id) else { return Err(StepError::UnknownSequence(id)) };
        let Place::Seated(seated) = place else { return Ok(None) };
        let Sequence { members, pooling, .. } = &**seated;
        if let Some(member) = members.iter().find(|member| !self.is_slot_ready(member.slot)) {
            return Err(StepError::SlotNotReady(member.slot));
        }
        if pooling.is_some() {
            self.in_range("rows to sample from of a sequence that is pooled", rows.sample, 1)?;
        }
        if self.model.decoder().is_bidirectional() && (rows.position, rows.rows) != (0, seated.len()) {
            return Err(StepError::Partial { sequence: id, rows: rows.rows, tokens: seated.len() });
        }
        if let Err(reason) = self.expect_rows(rows, members) {
            return Ok(Some(self.refuse(id, reason)));
        }
        let Some(Place::Seated(sequence)) = self.sequences.get_mut(&id) else { return Ok(None) };
        sequence.extend_blocks(rows)?;
        sequence.give(rows)?;
        let host = &mut self.host;
        let (start, end) = (host.tokens.len() as u32, rows.position + rows.rows);
        host.sequences.push(SequenceRows {
            start,
            rows: rows.rows as u32,
            kv_len: end as u32,
            first_block: host.blocks.len() as u32,
        });
        host.blocks.extend(sequence.table(end));
        for position in rows.position..end {
            let known = sequence.token(position).map(|token| token as i32);
            host.tokens.push(known.unwrap_or(-1 - sequence.seat as i32));
            host.positions.push(position as u32);
            host.lengths.push(sequence.rope_length(position));
            host.store_at.push(sequence.store_at(position));
        }
        let first_logit = host.logit_rows.len();
        wanted.add(rows, sequence, start, &mut host.logit_rows);
        let acting = sequence.acting(rows.position, start, rows.rows);
        let before = host.logit_rows[first_logit..].partition_point(|row| *row < acting.start);
        let acting_logits = (first_logit + before) as u32..host.logit_rows.len() as u32;
        extend_segments(&mut host.segments, acting, &sequence.members);
        extend_segments(&mut host.logit_segments, acting_logits, &sequence.members);
        Ok(None)
    }

    /// Whether the model can compute a sequence's rows.
    fn expect_rows(&self, rows: &Rows, members: &[Member]) -> Result<(), String> {
        let (end, limit) = (rows.position.saturating_add(rows.rows), self.model.decoder().max_positions);
        if end > limit {
            return Err(format!("position {} is beyond the model's {limit}", end - 1));
        }
        self.expect_tokens_of(rows.tokens.iter().copied(), members)
    }
}

impl Wanted {
    /// Adds the outputs that are asked for of a sequence's rows, which begin at row `start` of the step. Rows whose
    /// logits are needed for them are appended to `logit_rows`.
    fn add(&mut self, rows: &Rows, sequence: &Sequence, start: u32, logit_rows: &mut Vec<u32>) {
        let end = rows.position + rows.rows;
        for (row, position) in (start..).zip(rows.position..end) {
            let logit = logit_rows.len() as u32;
            let scored = sequence.prompt_logprobs && position + 1 < sequence.prompt_len;
            let sampled = position + rows.sample >= end;
            match sequence.token(position + 1).filter(|_| scored) {
                Some(target) => self.targets.push((logit, target)),
                None if sampled => {
                    let nth = position + rows.sample - end;
                    self.samples.push(Sample {
                        sequence: rows.sequence,
                        added_by: sequence.added_by,
                        nth,
                        position,
                        logit,
                        masked: rows.masked,
                        seat_again: nth > 0 || !sequence.is_counted(position),
                    });
                }
                None => continue,
            }
            logit_rows.push(row);
        }
        let scored = end.min(sequence.prompt_len.saturating_sub(1)).saturating_sub(rows.position);
        if sequence.prompt_logprobs && scored > 0 {
            self.num_top = self.num_top.max(sequence.sampling.num_top);
            self.scored.push((rows.sequence, rows.position + 1, scored));
        }
        if let Some(pooling) = sequence.pooling {
            self.add_pooled(rows, (sequence, pooling), start, logit_rows);
        }
    }

    /// Adds what is asked for of the rows of a sequence that is pooled.
    fn add_pooled(
        &mut self,
        rows: &Rows,
        (sequence, pooling): (&Sequence, Pooling),
        start: u32,
        logit_rows: &mut Vec<u32>,
    ) {
        let (position, count) = (rows.position, rows.rows);
        if pooling.classes {
            // Of a sequence that is classified as a whole, the first token is.
            let count = if pooling.kind == PoolingKind::None { count } else { 1 };
            let first = logit_rows.len();
            logit_rows.extend(start..start + count as u32);
            self.hidden.push(HiddenRows { sequence: rows.sequence, position, start: first, rows: count });
            return;
        }
        let ends = position + count == sequence.len();
        let hidden = match pooling.kind {
            PoolingKind::None | PoolingKind::Mean => true,
            PoolingKind::First => position == 0 || ends,
            PoolingKind::Last => ends,
        };
        if hidden {
            let start = start as usize;
            self.hidden.push(HiddenRows { sequence: rows.sequence, position, start, rows: count });
        }
    }
}

/// Extends the last segments if the rows follow them and have the same adapters; otherwise adds segments.
fn extend_segments(segments: &mut Vec<Segment>, rows: Range<u32>, members: &[Member]) {
    if rows.is_empty() || members.is_empty() {
        return;
    }
    let start = segments.last().map_or(0, |last| last.start);
    let first = segments.partition_point(|segment| segment.start < start);
    let last = &mut segments[first..];
    let same = |(segment, member): (&Segment, &Member)| {
        segment.end == rows.start && (segment.slot, segment.weight) == (member.slot, member.weight)
    };
    if last.len() == members.len() && last.iter().zip(members).all(same) {
        last.iter_mut().for_each(|segment| segment.end = rows.end);
        return;
    }
    segments.extend(
        members
            .iter()
            .map(|&Member { slot, weight }| Segment { weight, ..Segment::new(rows.start, rows.end, slot) }),
    );
}
