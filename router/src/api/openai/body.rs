//! Bodies of responses.

use std::{
    iter,
    time::{SystemTime, UNIX_EPOCH},
};

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
#[derive(Debug, Clone, Default)]
pub(super) struct Usage {
    prompt: usize,
    completion: usize,
}

impl Usage {
    pub(super) fn add(&mut self, prompt: usize, completion: usize) {
        self.prompt += prompt;
        self.completion += completion;
    }

    fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        })
    }
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

    fn object(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }

    pub(super) fn whole(&self, choices: Vec<Value>, usage: &Usage) -> Value {
        let mut body = self.object(if self.chat { "chat.completion" } else { "text_completion" }, choices);
        body["usage"] = usage.json();
        body
    }

    /// One event of a stream.
    pub(super) fn chunk(&self, choice: Value) -> Value {
        let mut body = self.chunk_of(vec![choice]);
        if self.include_usage {
            body["usage"] = Value::Null;
        }
        body
    }

    pub(super) fn usage_chunk(&self, usage: &Usage) -> Value {
        let mut body = self.chunk_of(Vec::new());
        body["usage"] = usage.json();
        body
    }

    fn chunk_of(&self, choices: Vec<Value>) -> Value {
        self.object(if self.chat { "chat.completion.chunk" } else { "text_completion" }, choices)
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
    pub(super) fn opening(&mut self) -> Option<Value> {
        if self.options.chat {
            let delta = json!({"role": "assistant", "content": ""});
            return Some(
                json!({"index": self.index, "delta": delta, "logprobs": null, "finish_reason": null}),
            );
        }
        // Log-probabilities of the prompt are there with the first token.
        if self.options.logprobs { None } else { self.tell_prompt(&[]) }
    }

    fn tell_prompt(&mut self, scores: &[Scored]) -> Option<Value> {
        let (first, text) = self.echo.take()?;
        let logprobs = self
            .options
            .logprobs
            .then(|| logprobs::completion(&report_prompt(first, scores, &self.names), 0));
        self.offset = text.chars().count();
        Some(json!({"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": null}))
    }

    /// What a token adds, with the prompt in front of the first; nothing while its text is not certain.
    pub(super) fn push(&mut self, piece: Piece, prompt: &[Scored]) -> Vec<Value> {
        self.tell_prompt(prompt).into_iter().chain(self.tell(piece)).collect()
    }

    fn tell(&mut self, piece: Piece) -> Option<Value> {
        if self.options.logprobs {
            self.untold.push(report(&piece, &self.names));
        }
        if piece.text.is_empty() && piece.finish.is_none() {
            return None;
        }
        let told = std::mem::take(&mut self.untold);
        let finish_reason = piece.finish.as_ref().map(reason);
        if self.options.chat {
            let delta = if piece.text.is_empty() { json!({}) } else { json!({"content": piece.text}) };
            let logprobs = self.options.logprobs.then(|| logprobs::chat(&told));
            return Some(json!({
                "index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason,
            }));
        }
        let logprobs = self.options.logprobs.then(|| logprobs::completion(&told, self.offset));
        self.offset += told.iter().map(|token| token.text.chars().count()).sum::<usize>();
        Some(json!({
            "index": self.index, "text": piece.text, "logprobs": logprobs, "finish_reason": finish_reason,
        }))
    }
}
