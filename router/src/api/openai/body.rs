//! Bodies of responses.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::{
    logprobs::{self, Reported},
    request::Options,
};
use crate::api::run::{Answer, FinishReason, Generation, Piece};

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

/// The prompt's tokens with their log-probabilities.
fn report_prompt(generation: &Generation) -> Vec<Reported> {
    let entry = |id, logprob| Reported { text: generation.token_text(id), logprob, top: Vec::new() };
    let first = generation.prompt.first().map(|id| entry(*id, None));
    first
        .into_iter()
        .chain(generation.prompt_scores.iter().map(|token| entry(token.id, Some(token.logprob))))
        .collect()
}

/// A choice of a whole response.
pub(super) fn whole(index: usize, generation: &Generation, answer: &Answer, options: &Options) -> Value {
    let mut tokens: Vec<Reported> = Vec::new();
    if options.logprobs && options.echo {
        tokens = report_prompt(generation);
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
    echo: Option<String>,
    /// Characters of token texts so far.
    offset: usize,
    /// Tokens whose text has not been told.
    untold: Vec<Reported>,
}

impl Choice {
    pub(super) fn new(index: usize, generation: &Generation, options: Options) -> Choice {
        let names = Box::new(generation.names());
        let echo = options.echo.then(|| generation.prompt_text());
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
        let echo = self.echo.take()?;
        self.offset = echo.chars().count();
        Some(json!({"index": self.index, "text": echo, "logprobs": null, "finish_reason": null}))
    }

    /// What a token adds; nothing while its text is not certain.
    pub(super) fn push(&mut self, piece: Piece) -> Option<Value> {
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
