//! The steps that the router sends, and the events that it receives. Each type has the fields of a message of
//! `proto/shard/v1/shard.proto`, which documents their meaning.

use kernels::{Sampled, SamplingParams, TokenMask};
use model::adapter::ContentHash;

/// One forward pass, with what must happen before it.
#[derive(Debug, Clone, Default)]
pub struct Step {
    /// The session that it belongs to.
    pub session: u64,
    /// Ids are consecutive within a session, from 1.
    pub id: u64,
    /// Sequences that have ended.
    pub dropped: Vec<u64>,
    /// Slots to empty.
    pub unload: Vec<u32>,
    /// Slots to fill, each with an adapter.
    pub load: Vec<(u32, ContentHash)>,
    /// Sequences that run from now on.
    pub added: Vec<NewSequence>,
    /// The rows of the pass.
    pub rows: Vec<Rows>,
    /// Masks that came with the step.
    pub masks: Vec<Mask>,
}

/// A message of the router's stream.
#[derive(Debug)]
pub enum Request {
    /// A step.
    Step(Box<Step>),
    /// Masks for a step that was sent before.
    Masks(Masks),
}

/// The tokens that a grammar allows in one sampled row.
#[derive(Debug, Clone)]
pub struct Mask {
    /// The sequence.
    pub sequence: u64,
    /// Which of its sampled rows in the step.
    pub row: usize,
    /// The tokens; `None` if the grammar allows no token at all.
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
    /// The prompt, then the tokens that were generated before a preemption.
    pub tokens: Vec<u32>,
    /// The number of tokens of the prompt, with which `tokens` begins.
    pub prompt_len: usize,
    /// Its adapters.
    pub members: Vec<Member>,
    /// The position of the first row on which they act.
    pub members_from: usize,
    /// Its sampling parameters.
    pub sampling: SamplingParams,
    /// Whether to report the log-probabilities of the prompt's tokens.
    pub prompt_logprobs: bool,
    /// If set, hidden states are reported in place of tokens.
    pub pooling: Option<Pooling>,
}

/// An adapter of a sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Member {
    /// The slot of the adapter.
    pub slot: u32,
    /// The factor of what the adapter adds.
    pub weight: f32,
}

impl Member {
    /// An adapter alone.
    pub fn alone(slot: u32) -> Member {
        Member { slot, weight: 1.0 }
    }
}

/// What is reported of a sequence's hidden states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pooling {
    /// Which vectors are reported.
    pub kind: PoolingKind,
    /// Whether each reported vector is divided by its Euclidean length.
    pub normalize: bool,
    /// Whether scores of classes are reported in place of hidden states.
    pub classes: bool,
}

/// Which vectors a [`Pooling`] reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolingKind {
    /// The hidden state of every row, without pooling.
    None,
    /// The hidden state of the first token.
    First,
    /// The hidden state of the last token.
    Last,
    /// The mean of the hidden states of all tokens.
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
    /// Blocks that are appended to its table before the rows are stored.
    pub new_blocks: Vec<u32>,
    /// The number of rows, counted from the last, from which a token is sampled.
    pub sample: usize,
    /// The number of entries at the beginning of its table whose blocks it has released.
    pub released_blocks: usize,
    /// Token ids of the last rows, where the router gives them.
    pub tokens: Vec<u32>,
    /// Whether the sampled rows have masks.
    pub masked: bool,
}

/// Properties of a rank: its model, its device, and its limits.
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
    pub hidden_size: u32,
    pub task: Task,
    pub bidirectional: bool,
}

/// What a model computes from the last hidden states, see [`model::decoder::Task`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    /// Tokens.
    Generate,
    /// Nothing.
    Embed,
    /// Scores of classes.
    Classify {
        /// Whether whole sequences are classified, or tokens.
        sequences: bool,
        /// The names of the classes.
        labels: Vec<String>,
    },
}

/// An event, and the session that it belongs to.
#[derive(Debug, Clone)]
pub struct SessionEvent {
    /// The session's number.
    pub session: u64,
    /// What happened.
    pub event: Event,
}

/// What a shard reports.
#[derive(Debug, Clone)]
pub enum Event {
    /// A step has run.
    Step(StepResult),
    /// A slot has been filled, or could not be.
    Slot {
        /// The slot.
        slot: u32,
        /// The adapter that was to be loaded.
        content: ContentHash,
        /// The reason, if it could not be loaded.
        error: Option<String>,
    },
}

/// The outcome of a step.
#[derive(Debug, Clone)]
pub struct StepResult {
    /// The step.
    pub id: u64,
    /// The outputs of its rows. Tokens are in the order of the step's sampled rows.
    pub outputs: Vec<Output>,
    /// How long the pass took on the device.
    pub duration_us: u64,
    /// Sequences that cannot be computed.
    pub refused: Vec<Refusal>,
}

/// An output of rows of one sequence.
#[derive(Debug, Clone)]
pub enum Output {
    /// A token was sampled.
    Token {
        /// The sequence.
        sequence: u64,
        /// The token.
        sampled: Sampled,
    },
    /// The log-probabilities of consecutive tokens of the prompt.
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

/// A sequence that the shard cannot compute, neither in this step nor in later ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The sequence.
    pub sequence: u64,
    /// The reason, in words for the client.
    pub reason: String,
}
