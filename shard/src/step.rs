//! What the router asks of a shard, and what it is told. Field by field these are the messages of
//! `proto/shard/v1/shard.proto`, where their meaning is written down.

use kernels::{Sampled, SamplingParams};
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
    /// Sample from the last row.
    pub sample: bool,
    /// Entries at the beginning of its table whose blocks are not needed any more.
    pub released_blocks: usize,
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
    /// Sampled tokens with their sequences.
    pub tokens: Vec<(u64, Sampled)>,
    /// Log-probabilities of prompt tokens: sequence, position of the first, the tokens.
    pub prompt: Vec<(u64, usize, Vec<Sampled>)>,
    /// How long the pass took on the device.
    pub duration_us: u64,
    /// Sequences that cannot be computed.
    pub refused: Vec<Refusal>,
}

/// A sequence that the shard cannot compute, in this step and all that follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The sequence.
    pub sequence: u64,
    /// Why, in words for the client.
    pub reason: String,
}
