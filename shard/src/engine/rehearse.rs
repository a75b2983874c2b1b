//! Steps that run before the first request, on nobody's behalf: the largest one, after which the device has taken all
//! the memory that steps need, those that it times, and those that it records.

use std::{iter, slice, sync::Arc, thread};

use kernels::{BLOCK_SIZE, Backend, Batch, LoraPart, SampleRow, Segment, SequenceRows};

use super::{LOAD_POLL, Limits, state::State};

impl<B: Backend> State<B> {
    /// Runs a prefill of as many rows as a step may have, and those that the device wants to. Needs
    /// [`State::largest_blocks`] blocks.
    pub(super) fn rehearse_prefill(&mut self) -> kernels::Result<()> {
        let longest = self.model.config().max_positions;
        let max_rows = self.limits.max_rows;
        for rows in iter::once(max_rows).chain(self.ops.rehearsed_rows(max_rows)) {
            let lens: Vec<usize> =
                (0..rows).step_by(longest).map(|start| longest.min(rows - start)).collect();
            self.rehearse(&batch(&lens, 0))?;
        }
        Ok(())
    }

    /// Blocks that the longest sequence of one step fills.
    pub(super) fn largest_blocks(&self) -> usize {
        self.limits.max_rows.div_ceil(BLOCK_SIZE)
    }

    /// Has the device record the steps that it wants to.
    pub(super) fn record(&mut self) -> kernels::Result<()> {
        let Limits { max_sequences, max_logit_rows, .. } = self.limits;
        let steps = in_use(self.ops.recorded_steps(), max_sequences, max_logit_rows);
        if steps.is_empty() {
            return Ok(());
        }
        self.load_nothing()?;
        for (rows, runs) in steps {
            let step = batch(&vec![1; rows], runs);
            self.rehearse(&step)?;
            self.rehearse(&step)?;
        }
        self.ops.unload(&mut self.slots, 0)
    }

    /// Fills slot 0 with an adapter that adds nothing.
    fn load_nothing(&mut self) -> kernels::Result<()> {
        let sites = self.model.sites();
        let nothing = sites.first().and_then(|site| Some((site.inputs, *site.outputs.first()?)));
        let (inputs, outputs) = nothing.unwrap_or_default();
        let part = LoraPart { site: 0, slice: 0, lora_rank: 1, a: vec![0.0; inputs], b: vec![0.0; outputs] };
        let adapter = Arc::new(self.ops.stage(&sites, slice::from_ref(&part))?);
        self.ops.load(&mut self.slots, 0, &adapter)?;
        while self.ops.loaded(&mut self.slots)?.is_empty() {
            thread::park_timeout(LOAD_POLL);
        }
        Ok(())
    }

    fn rehearse(&mut self, step: &Batch) -> kernels::Result<()> {
        self.host.clone_from(step);
        self.forward()?;
        let rows = step.logit_rows.len().min(self.limits.max_sequences) as u32;
        let rows: Vec<_> = (0..rows).map(|row| SampleRow { row, seat: row }).collect();
        let choices = self.ops.sample(&self.scratch.logits, &rows, &mut self.sampler)?;
        self.ops.collect(choices, &mut Vec::new())
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

/// Sequences of so many rows from their beginning, all in the same blocks; the first `runs` rows are runs of their own
/// with the adapter in slot 0.
fn batch(lens: &[usize], runs: usize) -> Batch {
    let longest = lens.iter().copied().max().unwrap_or(0);
    let mut batch = Batch { blocks: (0..longest.div_ceil(BLOCK_SIZE) as u32).collect(), ..Batch::default() };
    for &len in lens {
        let start = batch.tokens.len() as u32;
        batch.tokens.extend((0..len).map(|_| 0));
        batch.positions.extend(0..len as u32);
        batch.store_at.extend(0..len as u32);
        batch.logit_rows.push(start + len as u32 - 1);
        batch.sequences.push(SequenceRows { start, rows: len as u32, kv_len: len as u32, first_block: 0 });
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
