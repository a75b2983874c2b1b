//! What the router asks of a shard, and what it is told. Field by field these are the messages of
//! `proto/shard/v1/shard.proto`, where their meaning is written down.

use kernels::{Sampled, SamplingParams, TokenMask};
use model::adapter::ContentHash;

/// One forward pass, with what must happen before it.
#[derive(Debug, Clone, Default)]
pub struct Step {
    /// The session that it belongs to.
    pub session: u64,
    /// Consecutive from 1 in a session.
    pub id: u64,
    /// Sequences that have ended.
    pub dropped: Vec<u64>,
    /// Slots to empty.
    pub unload: Vec<u32>,
    /// Slots to fill.
    pub load: Vec<(u32, ContentHash)>,
    /// Sequences that run from now on.
    pub added: Vec<NewSequence>,
    /// The rows of the pass.
    pub rows: Vec<Rows>,
    /// Masks that came with the step.
    pub masks: Vec<Mask>,
}

/// What the router sends while a session runs.
#[derive(Debug)]
pub enum Request {
    /// A step.
    Step(Box<Step>),
    /// Masks of a step that was sent before.
    Masks(Masks),
}

/// The tokens that a grammar allows in one sampled row.
#[derive(Debug, Clone)]
pub struct Mask {
    /// The sequence.
    pub sequence: u64,
    /// Which of its sampled rows in the step.
    pub row: usize,
    /// The tokens; none if the grammar allows no token at all.
    pub allowed: Option<TokenMask>,
}

/// Masks that follow their step.
#[derive(Debug, Clone, Default)]
pub struct Masks {
    /// The session of the step.
    pub session: u64,
    /// The step's id.
    pub step: u64,
    /// The masks.
    pub masks: Vec<Mask>,
}

/// A sequence that begins to run.
#[derive(Debug, Clone, Default)]
pub struct NewSequence {
    /// Its id.
    pub sequence: u64,
    /// Prompt, then what was generated before it was preempted.
    pub tokens: Vec<u32>,
    /// How many of `tokens` are the prompt.
    pub prompt_len: usize,
    /// The slot of its adapter.
    pub slot: Option<u32>,
    /// How it samples.
    pub sampling: SamplingParams,
    /// Report the prompt's log-probabilities.
    pub prompt_logprobs: bool,
    /// Report hidden states in place of tokens.
    pub pooling: Option<Pooling>,
}

/// What becomes of the hidden states of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pooling {
    /// The vectors that are reported.
    pub kind: PoolingKind,
    /// Divide each reported vector by its Euclidean length.
    pub normalize: bool,
}

/// See [`Pooling`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolingKind {
    /// The hidden states of all rows, as they are computed.
    None,
    /// That of the first token.
    First,
    /// That of the last token.
    Last,
    /// The mean over all tokens.
    Mean,
}

/// The rows of one sequence.
#[derive(Debug, Clone, Default)]
pub struct Rows {
    /// The sequence.
    pub sequence: u64,
    /// Position of the first row.
    pub position: usize,
    /// Number of rows.
    pub rows: usize,
    /// Blocks appended to its table first.
    pub new_blocks: Vec<u32>,
    /// Sample from the last so many rows.
    pub sample: usize,
    /// Entries at the beginning of its table whose blocks are not needed any more.
    pub released_blocks: usize,
    /// Ids of the tokens of the last rows.
    pub tokens: Vec<u32>,
    /// Whether the sampled rows have masks.
    pub masked: bool,
}

/// What a shard serves, and how much room it has.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the fields are those of InfoResponse, which documents them")]
pub struct Info {
    pub dtype: String,
    pub device: String,
    pub rank: u32,
    pub world: u32,
    pub vocab_size: u32,
    pub max_positions: u32,
    pub eos_token_ids: Vec<u32>,
    pub num_blocks: u32,
    pub block_size: u32,
    pub num_slots: u32,
    pub adapter_bytes: u64,
    pub max_rows: u32,
    pub max_sequences: u32,
    pub max_logit_rows: u32,
    pub longest_step_us: u64,
    pub kv_window: u32,
    pub rope_switch: u32,
    pub rope_dynamic: u32,
}

/// An event, and the session that it belongs to.
#[derive(Debug, Clone)]
pub struct SessionEvent {
    /// The session's number.
    pub session: u64,
    /// What happened.
    pub event: Event,
}

/// What a shard tells.
#[derive(Debug, Clone)]
pub enum Event {
    /// A step has run.
    Step(StepResult),
    /// A slot is ready, or could not be filled.
    Slot {
        /// The slot.
        slot: u32,
        /// What was to be loaded.
        content: ContentHash,
        /// Why it was not.
        error: Option<String>,
    },
}

/// The outcome of a step.
#[derive(Debug, Clone)]
pub struct StepResult {
    /// The step.
    pub id: u64,
    /// What its rows have given. Tokens are in the order of the step's sampled rows.
    pub outputs: Vec<Output>,
    /// How long the pass took on the device.
    pub duration_us: u64,
    /// Sequences that cannot be computed.
    pub refused: Vec<Refusal>,
}

/// What rows of one sequence have given.
#[derive(Debug, Clone)]
pub enum Output {
    /// A token was sampled.
    Token {
        /// The sequence.
        sequence: u64,
        /// The token.
        sampled: Sampled,
    },
    /// Log-probabilities of tokens of the prompt.
    PromptScores {
        /// The sequence.
        sequence: u64,
        /// Position of the first token.
        position: usize,
        /// The tokens.
        tokens: Vec<Sampled>,
    },
    /// Hidden states of consecutive rows, one after the other.
    HiddenStates {
        /// The sequence.
        sequence: u64,
        /// Position of the first row.
        position: usize,
        /// Their elements.
        values: Vec<f32>,
    },
    /// The pooled vector of a sequence whose last row was in the step.
    Pooled {
        /// The sequence.
        sequence: u64,
        /// Its elements.
        values: Vec<f32>,
    },
}

/// A sequence that the shard cannot compute, in this step and all that follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The sequence.
    pub sequence: u64,
    /// Why, in words for the client.
    pub reason: String,
}
