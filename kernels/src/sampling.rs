//! How the next token is chosen, and what is reported of the choice.

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
