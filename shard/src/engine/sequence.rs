//! A running sequence: its tokens, its blocks, and how far its seat in the sampler has come.

use kernels::{BLOCK_SIZE, SamplingParams};

use super::StepError;
use crate::step::{NewSequence, Pooling, Rows};

/// Stands for a token that has been sampled and not collected. No vocabulary is so large.
const IN_FLIGHT: u32 = u32::MAX;

/// See the module.
pub(super) struct Sequence {
    /// By position.
    tokens: Vec<u32>,
    pub(super) prompt_len: usize,
    /// Tokens that it was added with, and the step that did so.
    added_len: usize,
    pub(super) added_by: u64,
    pub(super) seat: u32,
    pub(super) slot: Option<u32>,
    blocks: Vec<u32>,
    pub(super) prompt_logprobs: bool,
    pub(super) sampling: SamplingParams,
    pub(super) pooling: Option<Pooling>,
    /// What has been pooled of the rows so far.
    pub(super) pooled: Vec<f64>,
    /// Tokens that the sampler has counted; `None` if it has counted others than those above.
    counted: Option<usize>,
}

impl Sequence {
    pub(super) fn new(new: &NewSequence, seat: u32, added_by: u64) -> Sequence {
        Sequence {
            tokens: new.tokens.clone(),
            prompt_len: new.prompt_len,
            added_len: new.tokens.len(),
            added_by,
            seat,
            slot: new.slot,
            blocks: Vec::new(),
            prompt_logprobs: new.prompt_logprobs,
            sampling: new.sampling.clone(),
            pooling: new.pooling,
            pooled: Vec::new(),
            counted: Some(new.tokens.len()),
        }
    }

    /// Tokens that are known or have been sampled.
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The token at a position, if the host knows it.
    pub(super) fn token(&self, position: usize) -> Option<u32> {
        self.tokens.get(position).copied().filter(|token| *token != IN_FLIGHT)
    }

    /// The first tokens, split into prompt and output, if the host knows all of them.
    pub(super) fn known(&self, len: usize) -> Option<(&[u32], &[u32])> {
        let tokens = self.tokens.get(..len).filter(|tokens| !tokens.contains(&IN_FLIGHT))?;
        Some(tokens.split_at(self.prompt_len.min(len)))
    }

    /// The tokens that the rotary scaling of a row goes by: those that it was added with, or those up to the row.
    pub(super) fn rope_length(&self, position: usize) -> u32 {
        self.added_len.max(position + 1) as u32
    }

    /// Replaces the tokens from the first of the given ones on.
    pub(super) fn give(&mut self, rows: &Rows) -> Result<(), StepError> {
        let Rows { sequence, position, rows: count, ref tokens, .. } = *rows;
        if tokens.is_empty() {
            return Ok(());
        }
        let first = count.checked_sub(tokens.len()).map(|at| position + at);
        let first = first.ok_or(StepError::OutOfRange {
            what: "given tokens",
            value: tokens.len(),
            limit: count + 1,
        })?;
        if first < self.prompt_len {
            return Err(StepError::GivenPrompt { sequence, position: first });
        }
        // Those before it may be on their way.
        self.tokens.resize(first, IN_FLIGHT);
        self.tokens.extend(tokens);
        self.counted = self.counted.filter(|counted| *counted <= first);
        Ok(())
    }

    /// Whether the sampler has counted all tokens up to a row and no others, so that the token behind it can be sampled.
    pub(super) fn is_counted(&self, position: usize) -> bool {
        self.counted == Some(position + 1)
    }

    /// Notes that the token behind a row is being sampled.
    pub(super) fn sampled(&mut self, position: usize) {
        let next = position + 1;
        // A token that was given in its place is what follows.
        let follows = self.tokens.len() == next;
        if follows {
            self.tokens.push(IN_FLIGHT);
        }
        self.counted = follows.then_some(next + 1);
    }

    /// Takes the token that was sampled behind a row, unless another was given in its place.
    pub(super) fn collect(&mut self, position: usize, token: u32) {
        if let Some(place) = self.tokens.get_mut(position + 1).filter(|place| **place == IN_FLIGHT) {
            *place = token;
        }
    }

    /// Appends blocks to the table, and gives up those before a place. Kernels read nothing there, and what stands there
    /// afterwards is a block of the sequence itself.
    pub(super) fn extend_blocks(&mut self, rows: &Rows) -> Result<(), StepError> {
        let Rows { sequence, position, released_blocks: released, .. } = *rows;
        if position / BLOCK_SIZE < released {
            return Err(StepError::ReleasedBlock { sequence, position, released });
        }
        self.blocks.resize(self.blocks.len().max(released), 0);
        self.blocks.extend(&rows.new_blocks);
        let first = self.blocks.get(released).copied().unwrap_or_default();
        self.blocks[..released].fill(first);
        let end = position.saturating_add(rows.rows);
        if rows.rows == 0 || end > self.blocks.len() * BLOCK_SIZE {
            return Err(StepError::NoBlock { sequence, position: end, blocks: self.blocks.len() });
        }
        Ok(())
    }

    /// The table of the first positions.
    pub(super) fn table(&self, positions: usize) -> &[u32] {
        &self.blocks[..positions.div_ceil(BLOCK_SIZE)]
    }

    /// Where keys and values of a position are stored.
    pub(super) fn store_at(&self, position: usize) -> u32 {
        self.blocks[position / BLOCK_SIZE] * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32
    }
}
