//! The warm-up: steps that run before the first request. The largest step makes the device allocate all the memory that
//! steps need; others let it time GEMM algorithms and capture the CUDA graphs of decode steps.

use std::{iter, slice, sync::Arc, thread, time::Duration};

use kernels::{BLOCK_SIZE, Backend, Batch, CapturedStep, LoraPart, SampleRow, Segment, SequenceRows};
use model::decoder::Task;

use super::{LOAD_POLL, Limits, state::State};
use crate::agreement;

/// The rows of the step from whose time that of the largest step is estimated.
const MODEST_ROWS: usize = 32;

impl<B: Backend> State<B> {
    /// Runs a prefill of as many rows as a step may have, then one of each size that the device asks for, and returns
    /// how long the largest takes. Needs [`State::largest_blocks`] blocks.
    pub(super) fn warm_up_prefill(&mut self) -> kernels::Result<Duration> {
        let max_rows = self.limits.max_rows;
        // A rank that has nothing to time runs the steps of the others.
        let timed = agreement::union(self.ops.group(), &self.ops.warm_up_rows(max_rows))?;
        for rows in iter::once(max_rows).chain(timed) {
            self.run(&batch(&self.prefill(rows), 0))?;
        }
        // By now algorithms have been chosen and kernels loaded, so that this is the time of later steps, too.
        self.run(&batch(&self.prefill(max_rows), 0))
    }

    /// Runs a prefill of a few rows, and estimates from it how long the largest step would take. The time is scaled
    /// with the number of rows, though weights are read once for all of them: the result is too large rather than too
    /// small, except for attention over long contexts.
    pub(super) fn estimate_longest_step(&mut self) -> kernels::Result<Duration> {
        let room = self.num_blocks.saturating_mul(BLOCK_SIZE).min(self.model.decoder().max_positions);
        let rows = MODEST_ROWS.min(self.limits.max_rows).min(room);
        let took = self.run(&batch(&[rows], 0))?;
        Ok(took.mul_f64(self.limits.max_rows as f64 / rows as f64))
    }

    /// The lengths of sequences that together have `rows` rows, or as many as `max_sequences` of them can have.
    fn prefill(&self, rows: usize) -> Vec<usize> {
        let longest = self.model.decoder().max_positions;
        let starts = (0..rows).step_by(longest).take(self.limits.max_sequences);
        starts.map(|start| longest.min(rows - start)).collect()
    }

    /// The number of blocks that the largest prefill fills.
    pub(super) fn largest_blocks(&self) -> usize {
        self.prefill(self.limits.max_rows).iter().map(|len| len.div_ceil(BLOCK_SIZE)).sum()
    }

    /// Runs every decode step that the device captures as a CUDA graph: the first run loads its kernels, the second one
    /// captures it.
    pub(super) fn capture_graphs(&mut self) -> kernels::Result<()> {
        let Limits { max_sequences, max_logit_rows, num_slots, .. } = self.limits;
        // A model that generates nothing has no decode steps.
        if self.model.decoder().task != Task::Generate {
            return Ok(());
        }
        let steps = in_use(self.ops.captured_steps(), max_sequences, max_logit_rows);
        let (bare, with_adapters): (Vec<_>, Vec<_>) = steps.into_iter().partition(|step| step.runs == 0);
        self.capture(&bare)?;
        if num_slots == 0 {
            return Ok(());
        }
        let (affine, plain): (Vec<_>, Vec<_>) = with_adapters.into_iter().partition(|step| step.is_affine);
        for (steps, is_affine) in [(plain, false), (affine, true)] {
            if steps.is_empty() {
                continue;
            }
            self.load_zero_adapter(is_affine)?;
            self.capture(&steps)?;
            self.ops.unload(&mut self.slots, 0)?;
        }
        Ok(())
    }

    /// Runs each step twice.
    fn capture(&mut self, steps: &[CapturedStep]) -> kernels::Result<()> {
        for step in steps {
            // Every sequence of a step has a block of its own.
            let rows = step.rows.min(self.num_blocks);
            let step = batch(&vec![1; rows], step.runs.min(rows));
            self.run(&step)?;
            self.run(&step)?;
        }
        Ok(())
    }

    /// Loads an adapter whose weights are all zero into slot 0. It has a bias if it is to be affine.
    fn load_zero_adapter(&mut self, is_affine: bool) -> kernels::Result<()> {
        let sites = self.model.sites();
        let size = sites.first().and_then(|site| Some((site.inputs, *site.outputs.first()?)));
        let (inputs, outputs) = size.unwrap_or_default();
        let mut part = LoraPart::delta((0, 0), 1, 1.0, &vec![0.0; inputs], &vec![0.0; outputs]);
        part.bias = is_affine.then(|| vec![0.0; outputs]);
        let adapter = Arc::new(self.ops.stage(sites, slice::from_ref(&part))?);
        self.ops.load(&mut self.slots, 0, &adapter, &self.model.site_weights())?;
        while self.ops.loaded(&mut self.slots)?.is_empty() {
            thread::park_timeout(LOAD_POLL);
        }
        Ok(())
    }

    /// Runs a step, and returns how long the device took.
    fn run(&mut self, step: &Batch) -> kernels::Result<Duration> {
        self.host.clone_from(step);
        let begin = self.ops.mark()?;
        self.forward()?;
        // Logits of classes are not sampled from.
        let generates = self.model.decoder().task == Task::Generate;
        let rows = step.logit_rows.len().min(self.limits.max_sequences) as u32;
        let rows: Vec<_> = (0..rows).map(|row| SampleRow { row, seat: row }).collect();
        let sample = || self.ops.sample(&self.scratch.logits, &rows, &mut self.sampler);
        let choices = generates.then(sample).transpose()?;
        let end = self.ops.mark()?;
        choices.map_or(Ok(()), |choices| self.ops.collect(choices, &mut Vec::new()))?;
        Ok(Duration::from_secs_f64(self.ops.seconds_between(&begin, &end)?))
    }
}

/// Of the steps that the device can capture, those that decoding may use: up to the smallest size that holds all
/// sequences, as far as there is room for their logits.
fn in_use(mut steps: Vec<CapturedStep>, max_sequences: usize, max_logit_rows: usize) -> Vec<CapturedStep> {
    let sizes = steps.iter().map(|step| step.rows);
    let largest = sizes.filter(|&rows| rows >= max_sequences).min().unwrap_or(usize::MAX);
    steps.retain(|step| step.rows <= largest.min(max_logit_rows));
    steps
}

/// A batch of new sequences of these lengths, each in blocks of its own. Each of the first `runs` rows is a segment of
/// its own that uses the adapter in slot 0.
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
    batch.segments = (0..runs as u32).map(|row| Segment::new(row, row + 1, 0)).collect();
    batch.logit_segments.clone_from(&batch.segments);
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_that_decoding_may_use_is_captured() {
        let steps = [(1, 0), (1, 1), (96, 0), (112, 0), (112, 16), (128, 0)];
        let steps = steps.map(|(rows, runs)| CapturedStep { rows, runs, is_affine: runs > 1 }).to_vec();
        assert_eq!(in_use(steps.clone(), 100, 256), steps[..5]);
        assert_eq!(in_use(steps.clone(), 96, 256), steps[..3]);
        assert_eq!(in_use(steps.clone(), 100, 100), steps[..3]);
        assert_eq!(in_use(steps.clone(), 500, 500), steps);
        assert!(in_use(Vec::new(), 8, 8).is_empty());
    }
}
