//! Bodies of responses.

use std::{
    iter,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Serialize;
use serde_json::{Value, json};

use super::{
    logprobs::{self, Reported},
    request::Options,
};
use crate::{
    api::run::{Answer, FinishReason, Generation, Piece},
    generation::Scored,
};

/// Tokens in and out.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

impl Usage {
    pub(super) fn add(&mut self, prompt: usize, completion: usize) {
        self.prompt_tokens += prompt;
        self.completion_tokens += completion;
        self.total_tokens += prompt + completion;
    }
}

/// A response, or an event of one.
#[derive(Debug, Serialize)]
pub(super) struct Body<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<C>,
    /// Null in the events of a stream that ends with its usage.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

/// What an event adds to a choice.
#[derive(Debug, Serialize)]
pub(super) struct Delta {
    index: usize,
    /// Of a completion.
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    /// Of a chat.
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<Message>,
    logprobs: Option<Value>,
    finish_reason: Option<&'static str>,
}

/// What an event adds to a chat's answer.
#[derive(Debug, Default, Serialize)]
struct Message {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// What all parts of a response have in common.
pub(super) struct Head {
    id: String,
    created: u64,
    model: String,
    chat: bool,
    include_usage: bool,
}

impl Head {
    pub(super) fn new(options: &Options, id: String) -> Head {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        Head {
            id,
            created,
            model: options.model.clone(),
            chat: options.chat,
            include_usage: options.include_usage,
        }
    }

    fn body<C>(&self, object: &'static str, choices: Vec<C>, usage: Option<Option<Usage>>) -> Body<'_, C> {
        Body { id: &self.id, object, created: self.created, model: &self.model, choices, usage }
    }

    pub(super) fn whole(&self, choices: Vec<Value>, usage: Usage) -> Body<'_, Value> {
        let object = if self.chat { "chat.completion" } else { "text_completion" };
        self.body(object, choices, Some(Some(usage)))
    }

    /// One event of a stream.
    pub(super) fn chunk(&self, choice: Delta) -> Body<'_, Delta> {
        self.body(self.chunk_object(), vec![choice], self.include_usage.then_some(None))
    }

    /// The event with the usage.
    pub(super) fn usage_chunk(&self, usage: Usage) -> Body<'_, Delta> {
        self.body(self.chunk_object(), Vec::new(), Some(Some(usage)))
    }

    fn chunk_object(&self) -> &'static str {
        if self.chat { "chat.completion.chunk" } else { "text_completion" }
    }
}

fn reason(finish: &FinishReason) -> &'static str {
    match finish {
        FinishReason::Length => "length",
        FinishReason::Eos | FinishReason::Stop(_) => "stop",
    }
}

fn report(piece: &Piece, name: impl Fn(u32) -> String) -> Reported {
    let top = piece.top.iter().map(|top| (name(top.id), *top)).collect();
    Reported { text: piece.token_text.clone(), logprob: Some(piece.token.logprob), top }
}

/// The prompt's tokens with their log-probabilities; nothing predicts the first.
fn report_prompt(first: u32, scores: &[Scored], name: impl Fn(u32) -> String) -> Vec<Reported> {
    let entry = |id, logprob| Reported { text: name(id), logprob, top: Vec::new() };
    let rest = scores.iter().map(|token| entry(token.id, Some(token.logprob)));
    iter::once(entry(first, None)).chain(rest).collect()
}

/// A choice of a whole response.
pub(super) fn whole(index: usize, generation: &Generation, answer: &Answer, options: &Options) -> Value {
    let mut tokens: Vec<Reported> = Vec::new();
    if options.logprobs && options.echo {
        tokens =
            report_prompt(generation.prompt[0], &generation.prompt_scores, |id| generation.token_text(id));
    }
    if options.logprobs {
        tokens.extend(answer.pieces.iter().map(|piece| report(piece, |id| generation.token_text(id))));
    }
    let finish_reason = reason(&answer.finish);
    if options.chat {
        let logprobs = options.logprobs.then(|| logprobs::chat(&tokens));
        return json!({
            "index": index,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        });
    }
    let echoed = if options.echo { generation.prompt_text() } else { String::new() };
    let logprobs = options.logprobs.then(|| logprobs::completion(&tokens, 0));
    json!({
        "index": index,
        "text": echoed + &answer.text,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
    })
}

/// A choice of a stream, as it grows.
pub(super) struct Choice {
    index: usize,
    options: Options,
    names: Box<dyn Fn(u32) -> String + Send>,
    /// First token and text of a prompt that is to be told.
    echo: Option<(u32, String)>,
    /// Characters of token texts so far.
    offset: usize,
    /// Tokens whose text has not been told.
    untold: Vec<Reported>,
}

impl Choice {
    pub(super) fn new(index: usize, generation: &Generation, options: Options) -> Choice {
        let names = Box::new(generation.names());
        let echo = options.echo.then(|| (generation.prompt[0], generation.prompt_text()));
        Choice { index, options, names, echo, offset: 0, untold: Vec::new() }
    }

    /// What comes before the first token.
    pub(super) fn opening(&mut self) -> Option<Delta> {
        if self.options.chat {
            let message = Message { role: Some("assistant"), content: Some(String::new()) };
            return Some(self.delta(None, Some(message), None, None));
        }
        // Log-probabilities of the prompt are there with the first token.
        if self.options.logprobs { None } else { self.tell_prompt(&[]) }
    }

    fn tell_prompt(&mut self, scores: &[Scored]) -> Option<Delta> {
        let (first, text) = self.echo.take()?;
        let logprobs = self
            .options
            .logprobs
            .then(|| logprobs::completion(&report_prompt(first, scores, &self.names), 0));
        self.offset = text.chars().count();
        Some(self.delta(Some(text), None, logprobs, None))
    }

    /// What a token adds, with the prompt in front of the first; nothing while its text is not certain.
    pub(super) fn push(&mut self, piece: Piece, prompt: &[Scored]) -> impl Iterator<Item = Delta> + use<> {
        self.tell_prompt(prompt).into_iter().chain(self.tell(piece))
    }

    fn tell(&mut self, piece: Piece) -> Option<Delta> {
        if self.options.logprobs {
            self.untold.push(report(&piece, &self.names));
        }
        if piece.text.is_empty() && piece.finish.is_none() {
            return None;
        }
        let told = std::mem::take(&mut self.untold);
        let finish_reason = piece.finish.as_ref().map(reason);
        if self.options.chat {
            let message = Message { role: None, content: Some(piece.text).filter(|text| !text.is_empty()) };
            let logprobs = self.options.logprobs.then(|| logprobs::chat(&told));
            return Some(self.delta(None, Some(message), logprobs, finish_reason));
        }
        let logprobs = self.options.logprobs.then(|| logprobs::completion(&told, self.offset));
        self.offset += told.iter().map(|token| token.text.chars().count()).sum::<usize>();
        Some(self.delta(Some(piece.text), None, logprobs, finish_reason))
    }

    fn delta(
        &self,
        text: Option<String>,
        delta: Option<Message>,
        logprobs: Option<Value>,
        finish_reason: Option<&'static str>,
    ) -> Delta {
        Delta { index: self.index, text, delta, logprobs, finish_reason }
    }
}
