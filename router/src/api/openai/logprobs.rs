//! The two shapes in which OpenAI reports log-probabilities.

use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::text::{Alternative, EndReason, TokenText};

/// `finish_reason` as OpenAI spells it.
pub(super) fn finish_reason(end: &EndReason) -> &'static str {
    match end {
        EndReason::Length => "length",
        EndReason::EndToken | EndReason::StopString { .. } => "stop",
    }
}

/// Chat's: an object for each token.
#[derive(Debug, Default, Serialize)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatToken>,
}

#[derive(Debug, Serialize)]
struct ChatToken {
    #[serde(flatten)]
    token: ScoredText,
    top_logprobs: Vec<ScoredText>,
}

#[derive(Debug, Serialize)]
struct ScoredText {
    token: String,
    logprob: Option<f32>,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    pub(super) fn new(tokens: Vec<TokenText>) -> ChatLogprobs {
        let alternative = |alternative: Alternative| {
            let Alternative { text, logprob, bytes, .. } = alternative;
            ScoredText { token: text, logprob: Some(logprob), bytes }
        };
        let content = tokens.into_iter().map(|token| {
            let TokenText { text, logprob, bytes, alternatives, .. } = token;
            ChatToken {
                token: ScoredText { token: text, logprob, bytes },
                top_logprobs: alternatives.into_iter().map(alternative).collect(),
            }
        });
        ChatLogprobs { content: content.collect() }
    }

    /// The objects of the tokens.
    pub(super) fn into_values(self) -> Vec<Value> {
        self.content.into_iter().filter_map(|token| serde_json::to_value(token).ok()).collect()
    }

    pub(super) fn extend(&mut self, other: ChatLogprobs) {
        self.content.extend(other.content);
    }
}

/// Completions': a list for each field.
#[derive(Debug, Default, Serialize)]
pub(super) struct CompletionLogprobs {
    tokens: Vec<String>,
    /// Null for the first token of a prompt, which nothing predicts.
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<TopLogprobs>>,
    /// Where each token begins in the choice's text, in characters. A token that the text does not show is where it
    /// would be.
    text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    /// The log-probabilities of tokens. The first one begins at `offset`, which is moved behind the last.
    pub(super) fn new(tokens: Vec<TokenText>, offset: &mut usize) -> CompletionLogprobs {
        let mut lists = CompletionLogprobs::default();
        for token in tokens {
            lists.text_offset.push(*offset);
            if token.visible {
                *offset += token.text.chars().count();
            }
            lists.top_logprobs.push(token.logprob.map(|logprob| TopLogprobs::new(&token, logprob)));
            lists.token_logprobs.push(token.logprob);
            lists.tokens.push(token.text);
        }
        lists
    }

    pub(super) fn extend(&mut self, other: CompletionLogprobs) {
        self.tokens.extend(other.tokens);
        self.token_logprobs.extend(other.token_logprobs);
        self.top_logprobs.extend(other.top_logprobs);
        self.text_offset.extend(other.text_offset);
    }
}

/// An object of texts and log-probabilities.
#[derive(Debug, Default)]
struct TopLogprobs(Vec<(String, f32)>);

impl TopLogprobs {
    /// The most probable tokens, and the token itself if it is not one of them. Tokens with the same text, as parts of
    /// characters have, cannot be told apart in this shape: the most probable one is reported.
    fn new(token: &TokenText, logprob: f32) -> TopLogprobs {
        let mut top = TopLogprobs::default();
        for alternative in &token.alternatives {
            let chosen = alternative.id == token.id;
            top.add(if chosen { &token.text } else { &alternative.text }, alternative.logprob);
        }
        if token.alternatives.iter().all(|alternative| alternative.id != token.id) {
            top.add(&token.text, logprob);
        }
        top
    }

    fn add(&mut self, text: &str, logprob: f32) {
        match self.0.iter_mut().find(|(known, _)| known == text) {
            Some((_, best)) => *best = best.max(logprob),
            None => self.0.push((text.to_owned(), logprob)),
        }
    }
}

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(text, logprob)| (text, logprob)))
    }
}
