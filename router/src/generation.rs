//! One sequence to generate, as everything behind the HTTP handlers sees it.

use std::{sync::Arc, time::Duration};

use config::PrefixCacheScope;
use sampling::SamplingParams;
use scheduler::{Adapters, CacheSalt, Finish, GroupId, Tenant};
use sha2::{Digest, Sha256};

use crate::{grammar::mask_workers::Begin, metrics::End, principal};

/// A validated request for one sequence.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// The tenant that it runs for.
    pub(crate) tenant: Tenant,
    /// Separates the prefix cache from those with another salt.
    pub(crate) salt: CacheSalt,
    pub(crate) prompt: Arc<[u32]>,
    pub(crate) max_new_tokens: u32,
    /// Tokens that end the sequence.
    pub(crate) stop_ids: Arc<[u32]>,
    pub(crate) adapters: Adapters,
    /// The position from which on they act.
    pub(crate) adapters_from: u32,
    /// The weight of each of them.
    pub(crate) weights: Arc<[f32]>,
    pub(crate) sampling: SamplingParams,
    pub(crate) prompt_logprobs: bool,
    /// Shared with the other sequences of a request that have the same prompt.
    pub(crate) group: Option<GroupId>,
    /// The grammar that its tokens must follow.
    pub(crate) grammar: Option<Begin>,
    /// What is computed of the prompt in place of tokens.
    pub(crate) pooling: Option<Pooling>,
}

/// What is computed of a prompt in place of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pooling {
    /// One vector.
    Vector {
        /// The hidden states that it is made of.
        of: PooledRows,
        /// Whether it is divided by its Euclidean length.
        normalize: bool,
    },
    /// The scores of classes for each token, one token after the other.
    ClassesOfTokens,
    /// The scores of classes for the whole.
    ClassesOfText,
}

/// The hidden states that a vector is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PooledRows {
    /// That of the first token.
    First,
    /// That of the last token.
    Last,
    /// The mean of all.
    Mean,
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

/// News of a job.
#[derive(Debug, Clone)]
pub(crate) enum Update {
    /// Its first rows have run.
    Started {
        /// Time from its submission until its first rows were planned.
        queued: Duration,
        /// Tokens of its prompt that were in the prefix cache.
        cached_tokens: u32,
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
    /// What was computed in place of tokens.
    Pooled(Vec<f32>),
    /// It asked for no tokens, and its whole prompt has been reported; nothing follows.
    Scored,
    /// It cannot be completed; nothing follows.
    Failed(Failure),
}

/// Makes the salt of a request in the prefix cache. It contains the tenant, unless the scope allows that everybody
/// shares and the adapter is `public`: one that resolves without a credential, or none. Requests that name a `narrower`
/// salt share with those that name the same.
pub(crate) fn cache_salt(
    scope: PrefixCacheScope,
    tenant: &principal::Tenant,
    public: bool,
    narrower: Option<&str>,
) -> CacheSalt {
    let shared = scope == PrefixCacheScope::All && public;
    if shared && narrower.is_none() {
        return CacheSalt::default();
    }
    let mut hash = Sha256::new();
    // A tenant's name could be chosen to look like another's number and salt, so that nothing variable comes first.
    hash.update(if shared { u64::MAX } else { tenant.id.0 }.to_le_bytes());
    hash.update([u8::from(shared), u8::from(narrower.is_some())]);
    hash.update(narrower.unwrap_or_default());
    let hash = hash.finalize();
    CacheSalt(hash.iter().take(16).fold(0, |salt, byte| salt << 8 | u128::from(*byte)))
}

/// The reason that a job was not completed.
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

impl Failure {
    /// The end that metrics count for the request.
    pub(crate) fn end(&self) -> End {
        match self {
            Failure::Unavailable => End::Unavailable,
            Failure::Refused(_) | Failure::Rejected(_) => End::Validation,
            Failure::Adapter(_) => End::Adapter,
            Failure::Generation(_) => End::Generation,
        }
    }
}
