//! How the next token is chosen, and what is reported of the choice.

use crate::{Error, Result, SamplingParams};

/// Most tokens that can be reported beside the chosen one; `kMaxTop` in `sample.cu`.
pub const MAX_TOP: usize = 128;
/// Most tokens of one sequence that can have a bias.
pub const MAX_BIASES: usize = 1024;

/// Refuses a sequence with tokens beyond the vocabulary, or with more biases or reports than a backend has room for.
pub(crate) fn check_seat(
    params: &SamplingParams,
    vocab: usize,
    prompt: &[u32],
    output: &[u32],
) -> Result<()> {
    let op = "seat";
    let biased = params.logit_bias.iter().map(|(token, _)| token);
    let largest = prompt.iter().chain(output).chain(biased).max().map_or(0, |&token| token as usize);
    for (what, index, limit) in [
        ("token", largest, vocab),
        ("number of reported tokens", params.num_top as usize, MAX_TOP + 1),
        ("number of biases", params.logit_bias.len(), MAX_BIASES + 1),
    ] {
        if index >= limit {
            return Err(Error::Index { op, what, index, limit });
        }
    }
    Ok(())
}

/// A row of logits to sample from, for the sequence at a seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleRow {
    /// Row of the logits matrix.
    pub row: u32,
    /// The sequence's seat in the sampler.
    pub seat: u32,
}

/// One sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The seat that it was sampled for.
    pub seat: u32,
    /// Token id.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// The most probable tokens with their log-probabilities, most probable first; `num_top` of them.
    pub top: Vec<(u32, f32)>,
}
