//! The plan of a step. It maps one to one onto the wire's `Step`.

use std::sync::Arc;

use crate::{AdapterKey, RequestId};

/// One forward pass and what happens before it, applied in field order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepPlan<P> {
    /// Consecutive from 1 in the life of a scheduler.
    pub id: u64,
    /// Sequences whose seats are free: ended, cancelled or preempted. A preempted one may come back in `added` of
    /// this step or of a later one.
    pub dropped: Vec<RequestId>,
    /// Slots to empty. One whose load has failed on some shard may be empty on others.
    pub unload: Vec<u32>,
    /// Adapters to copy into slots; each is answered by `slot_ready` or `slot_failed`.
    pub load: Vec<(u32, AdapterKey)>,
    /// Sequences that run from this step on. Each has rows in it.
    pub added: Vec<Added<P>>,
    /// Rows by sequence. Those of the same slots follow each other.
    pub rows: Vec<RowsPlan>,
}

/// A sequence that starts to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Added<P> {
    /// The request that it belongs to.
    pub id: RequestId,
    /// The request's prompt.
    pub prompt: Arc<[u32]>,
    /// The tokens that a preempted sequence had generated before it returned.
    pub generated: Vec<u32>,
    /// Slots of its adapters, in the order of the request's list; none for the base model.
    pub slots: Arc<[u32]>,
    /// The position from which on the adapters act.
    pub adapters_from: u32,
    /// The request's payload.
    pub payload: P,
}

/// The rows of one sequence in one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowsPlan {
    /// The request that they belong to.
    pub id: RequestId,
    /// Position of the first row. A row beyond the tokens of `Added` takes the token that was sampled last.
    pub position: u32,
    /// Number of rows, at consecutive positions.
    pub rows: u32,
    /// Blocks appended to the block table before the pass. With the first rows, these are all blocks up to here, behind
    /// the places that have been released.
    pub new_blocks: Vec<u32>,
    /// Places at the beginning of the block table whose blocks neither these rows nor any that follow need.
    pub released_blocks: u32,
    /// Sample a token from the last row.
    pub sample: bool,
}
