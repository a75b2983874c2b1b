//! What a caller is told.

use std::{fmt, time::Duration};

use crate::{AdapterKey, RequestId};

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
        /// The token; a stop token included.
        token: u32,
        /// Set with the last one. Nothing follows it.
        finish: Option<Finish>,
    },
    /// It has ended without finishing. Nothing follows.
    Failed {
        /// The request.
        id: RequestId,
        /// Why.
        reason: FailReason,
    },
}

/// Why a generation is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// It has `max_new_tokens` tokens.
    Length,
    /// The last token is one of `stop_ids`.
    StopToken,
}

/// Why a request could not be completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailReason {
    /// The shard could not copy its adapter into a slot.
    AdapterLoad(AdapterKey),
    /// The shard ran this step and gave no token for the request.
    NoToken {
        /// The step.
        step: u64,
    },
}

impl fmt::Display for FailReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AdapterLoad(key) => write!(f, "adapter {key:?} could not be loaded"),
            Self::NoToken { step } => write!(f, "step {step} gave no token"),
        }
    }
}

/// A count of what there is, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests that have not started.
    pub waiting: usize,
    /// Sequences with a seat on the shard.
    pub running: usize,
    /// Sequences that lost their blocks to an older one and wait to be recomputed.
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
    /// Preemptions so far.
    pub preemptions: u64,
    /// Prompt tokens taken from the prefix cache so far.
    pub cached_tokens: u64,
}
