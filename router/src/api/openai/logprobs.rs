//! The two shapes in which OpenAI reports log-probabilities.

use serde_json::{Value, json};

use crate::generation::Scored;

/// A token with its text and its alternatives.
pub(super) struct Reported {
    pub(super) text: String,
    /// `None` for the first token of a prompt, which nothing predicts.
    pub(super) logprob: Option<f32>,
    pub(super) top: Vec<(String, Scored)>,
}

/// Chat's: an object per token.
pub(super) fn chat(tokens: &[Reported]) -> Value {
    let entry = |text: &str, logprob: Option<f32>| json!({"token": text, "logprob": logprob, "bytes": text.as_bytes()});
    let content: Vec<Value> = tokens
        .iter()
        .map(|token| {
            let mut value = entry(&token.text, token.logprob);
            value["top_logprobs"] =
                token.top.iter().map(|(text, scored)| entry(text, Some(scored.logprob))).collect();
            value
        })
        .collect();
    json!({ "content": content })
}

/// Completions': a list per field. `offset` is where the first token's text begins, in characters.
pub(super) fn completion(tokens: &[Reported], mut offset: usize) -> Value {
    let mut offsets = Vec::new();
    for token in tokens {
        offsets.push(offset);
        offset += token.text.chars().count();
    }
    let top: Vec<Value> = tokens
        .iter()
        .map(|token| match token.logprob {
            None => Value::Null,
            Some(_) => token.top.iter().map(|(text, scored)| (text.clone(), json!(scored.logprob))).collect(),
        })
        .collect();
    json!({
        "tokens": tokens.iter().map(|token| token.text.as_str()).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
        "top_logprobs": top,
        "text_offset": offsets,
    })
}
