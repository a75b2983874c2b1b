//! One sequence to generate, as everything behind the HTTP handlers sees it.

use std::{sync::Arc, time::Duration};

use sampling::SamplingParams;
use scheduler::{Adapter, Finish};

/// A validated request for one sequence.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_new_tokens: u32,
    /// Tokens that end the sequence.
    pub(crate) stop_ids: Arc<[u32]>,
    pub(crate) adapter: Option<Adapter>,
    pub(crate) sampling: SamplingParams,
    pub(crate) prompt_logprobs: bool,
}

/// A token with its log-probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scored {
    pub(crate) id: u32,
    pub(crate) logprob: f32,
}

/// A token of a prompt, with its log-probability and the most probable tokens at its position.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PromptToken {
    pub(crate) token: Scored,
    pub(crate) top: Vec<Scored>,
}

/// What becomes of a job.
#[derive(Debug, Clone)]
pub(crate) enum Update {
    /// Its first rows have run.
    Started {
        /// How long it waited for that.
        queued: Duration,
    },
    /// Tokens of the prompt but the first, in order and without repetition.
    Prompt(Vec<PromptToken>),
    /// A new token.
    Token {
        token: Scored,
        top: Vec<Scored>,
        /// Set with the last one.
        finish: Option<Finish>,
    },
    /// It asked for no tokens, and its whole prompt has been reported; nothing follows.
    Scored,
    /// It cannot be completed; nothing follows.
    Failed(Failure),
}

/// Why a job was not completed.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Failure {
    /// The shards are gone, or not there yet.
    #[error("the model is not available, try again")]
    Unavailable,
    /// It can never run here.
    #[error("{0}")]
    Refused(scheduler::SubmitError),
    /// The shard cannot take it, and says why.
    #[error("{0}")]
    Rejected(String),
    /// Its adapter was there and is not any more: its files have changed, or the shards have started anew.
    #[error("{0}, try again")]
    Adapter(String),
    /// It failed while it ran.
    #[error("{0}")]
    Generation(String),
}
