//! One sequence to generate, as everything behind the HTTP handlers sees it.

use std::{sync::Arc, time::Duration};

use scheduler::{Adapter, Finish};

/// How a sequence samples; neutral values switch a filter off.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sampling {
    /// 0 for the most probable token.
    pub(crate) temperature: f32,
    pub(crate) top_k: u32,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
    pub(crate) typical_p: f32,
    pub(crate) repetition_penalty: f32,
    pub(crate) frequency_penalty: f32,
    pub(crate) presence_penalty: f32,
    pub(crate) seed: u64,
    /// Most probable tokens to report beside the chosen one.
    pub(crate) num_top: u32,
    pub(crate) logit_bias: Vec<(u32, f32)>,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
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

/// A validated request for one sequence.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_new_tokens: u32,
    /// Tokens that end the sequence.
    pub(crate) stop_ids: Arc<[u32]>,
    pub(crate) adapter: Option<Adapter>,
    pub(crate) sampling: Sampling,
    pub(crate) prompt_logprobs: bool,
}

/// A token with its log-probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scored {
    pub(crate) id: u32,
    pub(crate) logprob: f32,
}

/// What becomes of a job.
#[derive(Debug, Clone)]
pub(crate) enum Update {
    /// Its first rows have run.
    Started {
        /// What it waited.
        queued: Duration,
    },
    /// Log-probabilities of prompt tokens, from the given position on, in order and without repetition.
    Prompt(Vec<Scored>),
    /// A new token.
    Token {
        token: Scored,
        top: Vec<Scored>,
        /// Set with the last one.
        finish: Option<Finish>,
    },
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
    /// Its adapter was there and is not any more: its files have changed, or the shards have started anew.
    #[error("{0}, try again")]
    Adapter(String),
    /// It failed while it ran.
    #[error("{0}")]
    Generation(String),
}
