//! Steps that run before the first request, on nobody's behalf: the largest one, after which the device has taken all
//! the memory that steps need, those whose matrix products are timed, and those that are recorded.

use std::{iter, slice, sync::Arc, thread, time::Duration};

use kernels::{BLOCK_SIZE, Backend, Batch, LoraPart, SampleRow, Segment, SequenceRows};

use super::{LOAD_POLL, Limits, state::State};

/// Rows of the step that the time of a larger one is inferred from.
const MODEST_ROWS: usize = 32;

impl<B: Backend> State<B> {
    /// Runs a prefill of as many rows as a step may have, and those that the device wants to; returns how long the
    /// largest takes. Needs [`State::largest_blocks`] blocks.
    pub(super) fn warm_up_prefill(&mut self) -> kernels::Result<Duration> {
        let max_rows = self.limits.max_rows;
        for rows in iter::once(max_rows).chain(self.ops.warm_up_rows(max_rows)) {
            self.run(&batch(&self.prefill(rows), 0))?;
        }
        // Algorithms have been chosen, and kernels loaded: this is how long it takes from now on.
        self.run(&batch(&self.prefill(max_rows), 0))
    }

    /// Runs a prefill of a few rows, and infers how long one of as many as a step may have would take. Weights are read
    /// once for all rows, so that it takes less than in proportion: the result is an upper estimate but for attention
    /// over long contexts.
    pub(super) fn estimate_longest_step(&mut self) -> kernels::Result<Duration> {
        let room = self.num_blocks.saturating_mul(BLOCK_SIZE).min(self.model.decoder().max_positions);
        let rows = MODEST_ROWS.min(self.limits.max_rows).min(room);
        let took = self.run(&batch(&[rows], 0))?;
        Ok(took.mul_f64(self.limits.max_rows as f64 / rows as f64))
    }

    /// Lengths of sequences that have so many rows together, or as many as all sequences can have.
    fn prefill(&self, rows: usize) -> Vec<usize> {
        let longest = self.model.decoder().max_positions;
        let starts = (0..rows).step_by(longest).take(self.limits.max_sequences);
        starts.map(|start| longest.min(rows - start)).collect()
    }

    /// Blocks that the largest prefill fills.
    pub(super) fn largest_blocks(&self) -> usize {
        self.prefill(self.limits.max_rows).iter().map(|len| len.div_ceil(BLOCK_SIZE)).sum()
    }

    /// Has the device record the steps that it wants to.
    pub(super) fn record(&mut self) -> kernels::Result<()> {
        let Limits { max_sequences, max_logit_rows, num_slots, .. } = self.limits;
        let mut steps = in_use(self.ops.recorded_steps(), max_sequences, max_logit_rows);
        if num_slots == 0 {
            steps.retain(|&(_, runs)| runs == 0);
        }
        let with_adapters = steps.iter().any(|&(_, runs)| runs > 0);
        if with_adapters {
            self.load_nothing()?;
        }
        for (rows, runs) in steps {
            // Every sequence of a step has a block of its own.
            let rows = rows.min(self.num_blocks);
            let step = batch(&vec![1; rows], runs.min(rows));
            self.run(&step)?;
            self.run(&step)?;
        }
        if with_adapters {
            self.ops.unload(&mut self.slots, 0)?;
        }
        Ok(())
    }

    /// Fills slot 0 with an adapter that adds nothing.
    fn load_nothing(&mut self) -> kernels::Result<()> {
        let sites = self.model.sites();
        let nothing = sites.first().and_then(|site| Some((site.inputs, *site.outputs.first()?)));
        let (inputs, outputs) = nothing.unwrap_or_default();
        let part = LoraPart::delta((0, 0), 1, 1.0, &vec![0.0; inputs], &vec![0.0; outputs]);
        let adapter = Arc::new(self.ops.stage(sites, slice::from_ref(&part))?);
        self.ops.load(&mut self.slots, 0, &adapter, &self.model.site_weights())?;
        while self.ops.loaded(&mut self.slots)?.is_empty() {
            thread::park_timeout(LOAD_POLL);
        }
        Ok(())
    }

    /// Runs a step; returns how long the device took.
    fn run(&mut self, step: &Batch) -> kernels::Result<Duration> {
        self.host.clone_from(step);
        let begin = self.ops.mark()?;
        self.forward()?;
        let rows = step.logit_rows.len().min(self.limits.max_sequences) as u32;
        let rows: Vec<_> = (0..rows).map(|row| SampleRow { row, seat: row }).collect();
        let choices = self.ops.sample(&self.scratch.logits, &rows, &mut self.sampler)?;
        let end = self.ops.mark()?;
        self.ops.collect(choices, &mut Vec::new())?;
        Ok(Duration::from_secs_f64(self.ops.seconds_between(&begin, &end)?))
    }
}

/// The recorded steps (rows, runs) that decoding may use: up to the first size that holds all sequences, if logits have
/// room for it.
fn in_use(
    mut steps: Vec<(usize, usize)>,
    max_sequences: usize,
    max_logit_rows: usize,
) -> Vec<(usize, usize)> {
    let sizes = steps.iter().map(|(rows, _)| *rows);
    let largest = sizes.filter(|&rows| rows >= max_sequences).min().unwrap_or(usize::MAX);
    steps.retain(|&(rows, _)| rows <= largest.min(max_logit_rows));
    steps
}

/// Sequences of so many rows from their beginning, each in blocks of its own; the first `runs` rows are runs of their
/// own with the adapter in slot 0.
fn batch(lens: &[usize], runs: usize) -> Batch {
    let mut batch = Batch::default();
    for &len in lens {
        let (start, first_block) = (batch.tokens.len() as u32, batch.blocks.len() as u32);
        let first_place = first_block * BLOCK_SIZE as u32;
        batch.tokens.extend((0..len).map(|_| 0));
        batch.positions.extend(0..len as u32);
        batch.store_at.extend(first_place..first_place + len as u32);
        batch.logit_rows.push(start + len as u32 - 1);
        batch.blocks.extend((first_block..).take(len.div_ceil(BLOCK_SIZE)));
        batch.sequences.push(SequenceRows { start, rows: len as u32, kv_len: len as u32, first_block });
    }
    batch.segments = (0..runs as u32).map(|row| Segment { start: row, end: row + 1, slot: 0 }).collect();
    batch.logit_segments.clone_from(&batch.segments);
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_that_decoding_may_use_is_recorded() {
        let steps = vec![(1, 0), (1, 1), (96, 0), (112, 0), (112, 16), (128, 0)];
        assert_eq!(in_use(steps.clone(), 100, 256), steps[..5]);
        assert_eq!(in_use(steps.clone(), 96, 256), steps[..3]);
        assert_eq!(in_use(steps.clone(), 100, 100), steps[..3]);
        assert_eq!(in_use(steps.clone(), 500, 500), steps);
        assert!(in_use(Vec::new(), 8, 8).is_empty());
    }
}
