//! Events and statistics for the caller.

use std::{fmt, time::Duration};

use crate::{AdapterKey, RequestId};

/// A token that the shards sampled for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampled {
    /// The request.
    pub id: RequestId,
    /// The token.
    pub token: u32,
}

/// Something that happened to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Its first rows have been computed. Told once, before its first token.
    Started {
        /// The request.
        id: RequestId,
        /// Time from `submit` to the planning of its first rows.
        queued: Duration,
        /// Prompt tokens that came from the prefix cache.
        cached_tokens: u32,
    },
    /// It has generated a token.
    Token {
        /// The request.
        id: RequestId,
        /// Index of the token in the `sampled` that were given to `complete`.
        index: usize,
        /// The token; a stop token included.
        token: u32,
        /// Set with the last one. Nothing follows it.
        finish: Option<Finish>,
    },
    /// It asked for no tokens, and its whole prompt has been computed. Nothing follows.
    Scored {
        /// The request.
        id: RequestId,
    },
    /// It has ended without finishing. Nothing follows.
    Failed {
        /// The request.
        id: RequestId,
        /// The reason.
        reason: FailReason,
    },
}

/// The reason that a generation is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// It has `max_new_tokens` tokens.
    Length,
    /// The last token is one of `stop_ids`.
    StopToken,
}

/// The reason that a request could not be completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailReason {
    /// A shard could not copy its adapter into a slot.
    AdapterLoad(AdapterKey),
    /// A shard could not take the sequence.
    Refused {
        /// Index of the request in the `refused` that were given to `complete`.
        index: usize,
    },
    /// The shards ran this step and gave no result for the request.
    NoResult {
        /// The step.
        step: u64,
    },
}

impl fmt::Display for FailReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AdapterLoad(key) => write!(f, "adapter {key:?} could not be loaded"),
            Self::Refused { .. } => write!(f, "the model cannot take this sequence"),
            Self::NoResult { step } => write!(f, "step {step} gave no token"),
        }
    }
}

/// The scheduler's gauges and counters, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests that have not been admitted.
    pub waiting: usize,
    /// Time at which the oldest of them was submitted.
    pub waiting_since: Option<Duration>,
    /// Sequences with a seat on the shards.
    pub running: usize,
    /// Sequences that have given up their seats and blocks, and wait to be computed again.
    pub preempted: usize,
    /// Steps sent and not completed.
    pub in_flight: usize,
    /// Blocks without content.
    pub free_blocks: usize,
    /// Blocks that only the prefix cache holds; taken when the free ones run out.
    pub cached_blocks: usize,
    /// Adapters in slots, ready.
    pub resident_adapters: usize,
    /// Adapters on their way into slots.
    pub loading_adapters: usize,
    /// Adapters evicted from slots so far.
    pub adapter_evictions: u64,
    /// Steps that slots had no work in so far, beside the first such step of each, while requests waited for slots. A swap
    /// is hidden if it takes no more than that.
    pub idle_slot_steps: u64,
    /// Requests admitted so far.
    pub admitted: u64,
    /// Preemptions so far.
    pub preemptions: u64,
    /// Prompt tokens taken from the prefix cache so far.
    pub cached_tokens: u64,
}
