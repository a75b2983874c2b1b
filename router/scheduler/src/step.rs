//! What a shard is told to do. Maps one to one on the wire's `Step`.

use crate::{AdapterKey, RequestId};

/// One forward pass and what happens before it, applied in field order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepPlan {
    /// Consecutive from 1 after `new` or `reset`.
    pub id: u64,
    /// Sequences whose seats are free: ended, cancelled or preempted. A preempted one may come back in `added` of
    /// this step or a later one.
    pub dropped: Vec<RequestId>,
    /// Slots to empty.
    pub unload: Vec<u32>,
    /// Adapters to copy into slots; each is answered by `slot_ready` or `slot_failed`.
    pub load: Vec<(u32, AdapterKey)>,
    /// Sequences that run from this step on. Each has rows in it.
    pub added: Vec<Added>,
    /// Rows by sequence. Those of one slot follow each other.
    pub rows: Vec<RowsPlan>,
}

/// A sequence that starts to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Added {
    /// The request it belongs to.
    pub id: RequestId,
    /// Prompt, followed by what has been generated already when a preempted sequence returns.
    pub tokens: Vec<u32>,
    /// How many of `tokens` are the prompt.
    pub prompt_len: u32,
    /// Slot of its adapter; `None` for the base model.
    pub slot: Option<u32>,
}

/// The rows of one sequence in one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowsPlan {
    /// The request it belongs to.
    pub id: RequestId,
    /// Position of the first row. A row beyond the tokens of `Added` takes the token sampled last.
    pub position: u32,
    /// Number of rows, at consecutive positions.
    pub rows: u32,
    /// Blocks appended to the block table before the pass; with the first rows, all of them up to here.
    pub new_blocks: Vec<u32>,
    /// Sample a token from the last row.
    pub sample: bool,
}
