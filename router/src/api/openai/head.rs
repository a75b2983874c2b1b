//! The fields that every chunk of a response has.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use super::request::Options;
use crate::api::group::TokenCounts;

/// Tokens in and out.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
}

/// Details of `prompt_tokens`.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct PromptDetails {
    /// Tokens that came from the prefix cache.
    cached_tokens: usize,
}

impl Usage {
    /// Adds those of a choice.
    pub(super) fn add(&mut self, tokens: &TokenCounts) {
        let generated = tokens.generated.load(Ordering::Relaxed);
        self.completion_tokens += generated;
        self.total_tokens += generated;
        // A prompt counts once, however many answers it has.
        if !tokens.shares_prompt {
            self.prompt_tokens += tokens.prompt;
            self.total_tokens += tokens.prompt;
            self.prompt_tokens_details.cached_tokens += tokens.cached.load(Ordering::Relaxed);
        }
    }
}

/// A whole response, or an event of a stream, by the type of its choices.
#[derive(Debug, Serialize)]
pub(super) struct Completion<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<C>,
    /// Null in the events of a stream that ends with its usage.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

/// The fields that every chunk of a response has.
pub(super) struct Head {
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
    chat: bool,
    include_usage: bool,
}

impl Head {
    pub(super) fn new(options: &Options) -> Head {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let (chat, include_usage) = (options.chat, options.include_usage);
        let (model, fingerprint) = (options.model.clone(), options.fingerprint.clone());
        Head { id: new_id(chat), created, model, fingerprint, chat, include_usage }
    }

    /// A whole response.
    pub(super) fn whole<C>(&self, choices: Vec<C>, usage: Usage) -> Completion<'_, C> {
        let object = if self.chat { "chat.completion" } else { "text_completion" };
        self.part(object, choices, Some(Some(usage)))
    }

    /// One event of a stream.
    pub(super) fn chunk<C>(&self, choice: C) -> Completion<'_, C> {
        self.part(self.chunk_object(), vec![choice], self.include_usage.then_some(None))
    }

    /// The event with the usage, if it is wanted.
    pub(super) fn usage_chunk(&self, usage: Usage) -> Option<Completion<'_, ()>> {
        self.include_usage.then(|| self.part(self.chunk_object(), Vec::new(), Some(Some(usage))))
    }

    fn part<C>(
        &self,
        object: &'static str,
        choices: Vec<C>,
        usage: Option<Option<Usage>>,
    ) -> Completion<'_, C> {
        Completion {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: &self.fingerprint,
            choices,
            usage,
        }
    }

    fn chunk_object(&self) -> &'static str {
        if self.chat { "chat.completion.chunk" } else { "text_completion" }
    }
}

/// Names a response; unique in this process, and hardly ever the same in another.
fn new_id(chat: bool) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64);
    let prefix = if chat { "chatcmpl" } else { "cmpl" };
    format!("{prefix}-{now:016x}{:08x}", NEXT.fetch_add(1, Ordering::Relaxed) as u32)
}
