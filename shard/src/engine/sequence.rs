//! A running sequence: its tokens, its block table, and the tokens that its seat in the sampler has counted.

use std::ops::Range;

use kernels::{BLOCK_SIZE, SamplingParams};

use super::StepError;
use crate::step::{Member, NewSequence, Pooling, Rows};

/// Stands for a token that has been sampled and not collected. No vocabulary has this id.
const IN_FLIGHT: u32 = u32::MAX;

/// A running sequence.
pub(super) struct Sequence {
    /// The tokens by position.
    tokens: Vec<u32>,
    pub(super) prompt_len: usize,
    /// The number of tokens that it was added with.
    added_len: usize,
    /// The step that added it.
    pub(super) added_by: u64,
    pub(super) seat: u32,
    pub(super) members: Vec<Member>,
    members_from: usize,
    blocks: Vec<u32>,
    pub(super) prompt_logprobs: bool,
    pub(super) sampling: SamplingParams,
    pub(super) pooling: Option<Pooling>,
    /// The pooled vector of the rows so far; their sum for the mean.
    pub(super) pooled: Vec<f64>,
    /// The number of tokens that the sampler has counted; `None` if some of them are not those of `tokens`.
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
            members: new.members.clone(),
            members_from: new.members_from,
            blocks: Vec::new(),
            prompt_logprobs: new.prompt_logprobs,
            sampling: new.sampling.clone(),
            pooling: new.pooling,
            pooled: Vec::new(),
            counted: Some(new.tokens.len()),
        }
    }

    /// The rows of the step on which its adapters act, of those from row `start` on that begin at a position.
    pub(super) fn acting(&self, position: usize, start: u32, rows: usize) -> Range<u32> {
        let before = self.members_from.saturating_sub(position).min(rows);
        start + before as u32..start + rows as u32
    }

    /// The number of tokens, including those in flight.
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The token at a position, if the host knows it.
    pub(super) fn token(&self, position: usize) -> Option<u32> {
        self.tokens.get(position).copied().filter(|token| *token != IN_FLIGHT)
    }

    /// The first `len` tokens, split into prompt and output, if the host knows all of them.
    pub(super) fn known(&self, len: usize) -> Option<(&[u32], &[u32])> {
        let tokens = self.tokens.get(..len).filter(|tokens| !tokens.contains(&IN_FLIGHT))?;
        Some(tokens.split_at(self.prompt_len.min(len)))
    }

    /// The length by which rotary frequencies of a row are scaled: the number of tokens that the sequence was added
    /// with, or of those up to the row if they are more.
    pub(super) fn rope_length(&self, position: usize) -> u32 {
        self.added_len.max(position + 1) as u32
    }

    /// Replaces the last tokens by those that the router gives, if it gives any.
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
        // Tokens before the given ones may still be in flight.
        self.tokens.resize(first, IN_FLIGHT);
        self.tokens.extend(tokens);
        self.counted = self.counted.filter(|counted| *counted <= first);
        Ok(())
    }

    /// Whether the sampler has counted exactly the tokens up to a row, so that the next one can be sampled.
    pub(super) fn is_counted(&self, position: usize) -> bool {
        self.counted == Some(position + 1)
    }

    /// Notes that the token after a row is being sampled.
    pub(super) fn sampled(&mut self, position: usize) {
        let next = position + 1;
        // If the router gave a token for this position, that one stays.
        let follows = self.tokens.len() == next;
        if follows {
            self.tokens.push(IN_FLIGHT);
        }
        self.counted = follows.then_some(next + 1);
    }

    /// Stores the token that was sampled after a row, unless the router gave another one.
    pub(super) fn collect(&mut self, position: usize, token: u32) {
        if let Some(place) = self.tokens.get_mut(position + 1).filter(|place| **place == IN_FLIGHT) {
            *place = token;
        }
    }

    /// Appends blocks to the table, and releases those before an index. Kernels read no keys of released blocks. Their
    /// entries become a block of the sequence itself, so that the table never names a block of another sequence.
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

    /// The block table of the first `positions` positions.
    pub(super) fn table(&self, positions: usize) -> &[u32] {
        &self.blocks[..positions.div_ceil(BLOCK_SIZE)]
    }

    /// Where keys and values of a position are stored.
    pub(super) fn store_at(&self, position: usize) -> u32 {
        self.blocks[position / BLOCK_SIZE] * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32
    }
}
