//! The arguments and results of sampling.

use crate::{Error, Result, SamplingParams};

/// The largest number of tokens that are reported beside the sampled one; `kMaxTop` in `sample.cu`.
pub const MAX_TOP: usize = 128;
/// The largest number of tokens of one sequence that have a logit bias or are banned.
pub const MAX_BIASES: usize = 1536;

/// Refuses a sequence with tokens beyond the vocabulary, with too many biases, or with too many tokens to report.
pub(crate) fn check_seat(
    params: &SamplingParams,
    vocab: usize,
    prompt: &[u32],
    output: &[u32],
) -> Result<()> {
    let op = "seat";
    let biased = params.logit_bias.iter().map(|(token, _)| token);
    let banned = params.bans.iter().map(|ban| &ban.token);
    let largest =
        prompt.iter().chain(output).chain(biased).chain(banned).max().map_or(0, |&token| token as usize);
    for (what, index, limit) in [
        ("token", largest, vocab),
        ("number of reported tokens", params.num_top as usize, MAX_TOP + 1),
        ("number of biases", params.logit_bias.len() + params.bans.len(), MAX_BIASES + 1),
    ] {
        if index >= limit {
            return Err(Error::Index { op, what, index, limit });
        }
    }
    Ok(())
}

/// The tokens of a vocabulary that may be sampled, of which there is at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    /// Bit t % 32 of word t / 32 is set if token t is allowed.
    words: Vec<u32>,
    vocab: usize,
}

impl TokenMask {
    /// Makes a mask from bytes: token t is allowed if bit t % 8 of byte t / 8 is set. Missing bytes allow no token, and
    /// bits beyond the vocabulary are ignored. Returns `None` if no token is allowed.
    pub fn new(bytes: &[u8], vocab: usize) -> Option<TokenMask> {
        let mut words = vec![0; vocab.div_ceil(32)];
        for (at, &byte) in bytes.iter().enumerate().take(vocab.div_ceil(8)) {
            words[at / 4] |= u32::from(byte) << (at % 4 * 8);
        }
        if let Some(last) = words.last_mut().filter(|_| !vocab.is_multiple_of(32)) {
            *last &= (1 << (vocab % 32)) - 1;
        }
        words.iter().any(|word| *word != 0).then_some(TokenMask { words, vocab })
    }

    /// The number of tokens of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// The bits, 32 to a word.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Whether a token may be sampled.
    pub fn allows(&self, token: usize) -> bool {
        self.words.get(token / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// The first token that may be sampled.
    pub fn first(&self) -> u32 {
        let word = self.words.iter().position(|word| *word != 0).unwrap_or_default();
        word as u32 * 32 + self.words.get(word).map_or(0, |word| word.trailing_zeros())
    }
}

/// Refuses masks whose number is not that of the rows, or that are of another vocabulary.
pub(crate) fn check_masks(masks: &[Option<&TokenMask>], rows: usize, vocab: usize) -> Result<()> {
    let op = "sample";
    if masks.len() != rows {
        return Err(Error::Shape { op, what: "masks", got: masks.len(), expected: rows });
    }
    match masks.iter().flatten().find(|mask| mask.vocab != vocab) {
        Some(mask) => Err(Error::Shape { op, what: "tokens of a mask", got: mask.vocab, expected: vocab }),
        None => Ok(()),
    }
}

/// A row of logits to sample from, for the sequence at a seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleRow {
    /// The row of the logits matrix.
    pub row: u32,
    /// The sequence's seat in the sampler.
    pub seat: u32,
}

/// One sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The seat that it was sampled for.
    pub seat: u32,
    /// The id of the token.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// The `num_top` most probable tokens with their log-probabilities, most probable first.
    pub top: Vec<(u32, f32)>,
}
