//! How the next token is chosen, and what is reported of the choice.

/// How one sequence samples.
///
/// The order of application is: repetition, frequency and presence penalty, logit bias, temperature, top-k,
/// typical-p, top-p, min-p, then one draw. Log-probabilities are those of the model's own distribution, before all
/// of these.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 chooses the most probable token.
    pub temperature: f32,
    /// Keeps the k most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps the smallest set of tokens with at least this probability together; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as probable as the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Locally typical sampling (Meister et al., 2022): keeps the tokens whose surprise is nearest to the entropy, up
    /// to this probability together; 1 keeps all.
    pub typical_p: f32,
    /// Divides positive and multiplies negative logits of every token seen in prompt or output (Keskar et al.,
    /// 2019); 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from a token's logit once for every time it was generated (OpenAI's definition); 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted from the logit of every token that was generated at least once (OpenAI's definition); 0 is off.
    pub presence_penalty: f32,
    /// Seed of the sequence. Draw i depends on (seed, i) alone, whatever else is in the batch.
    pub seed: u64,
    /// How many of the most probable tokens to report beside the chosen one.
    pub num_top: u32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
            num_top: 0,
            logit_bias: Vec::new(),
        }
    }
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
