//! Builds a sentencepiece tokenizer, such as those of Llama 2 and Mistral, as BPE with byte fallback.

use std::{cmp::Reverse, collections::HashMap};

use gguf::Gguf;
use serde_json::{Value, json};

use super::{TokenizerError, around};

/// The character that sentencepiece writes in place of a space.
const SPACE: &str = "\u{2581}";

/// ggml's `token_type` of a token that the text is made of.
const NORMAL: i32 = 1;

/// Families of models whose tokenizers differ in what the file does not say, as transformers tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Gemma,
    Phi3,
    Other,
}

impl Family {
    /// The family of a file's architecture.
    pub(super) fn of(file: &Gguf) -> Result<Family, TokenizerError> {
        Ok(match file.get("general.architecture")?.unwrap_or_default() {
            "gemma" | "gemma2" | "gemma3" => Family::Gemma,
            "phi3" => Family::Phi3,
            _ => Family::Other,
        })
    }
}

/// Writes runs of spaces, which a Gemma's file has as such, in the way in which a text's spaces are looked up.
pub(super) fn write_spaces(tokens: &mut [String], types: &mut [i32]) {
    for (token, ty) in tokens.iter_mut().zip(types) {
        if !token.is_empty() && token.chars().all(|letter| letter == ' ') {
            *token = SPACE.repeat(token.len());
            *ty = NORMAL;
        }
    }
}

/// The definition of the tokenizer, except for its vocabulary and added tokens.
pub(super) fn definition(file: &Gguf, tokens: &[String], family: Family) -> Result<Value, TokenizerError> {
    let scores: &[f32] = file.require("tokenizer.ggml.scores")?;
    // A Gemma's scores do not tell the order of its merges, but its ids do.
    let by_id = || (0..tokens.len()).map(|id| -(id as f32)).collect();
    let scores = if family == Family::Gemma { by_id() } else { scores.to_vec() };
    let unknown = file.get("tokenizer.ggml.unknown_token_id")?.and_then(|id: u32| tokens.get(id as usize));
    let prefix = family != Family::Gemma && file.get("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let metaspace = json!({
        "type": "Metaspace", "replacement": SPACE, "split": false,
        "prepend_scheme": if prefix { "first" } else { "never" },
    });
    // A Phi-3 also puts a space in front of a text that begins with one.
    let prepend = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]});
    let (normalizer, pre_tokenizer) = match family {
        Family::Phi3 => (prepend, Value::Null),
        _ => (Value::Null, metaspace),
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": around(file, tokens, true)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "merges": merges(tokens, &scores),
        },
    }))
}

/// Derives BPE merges from the scores: every split of a token into two tokens is a merge, and merges into tokens with
/// higher scores come first. Ties are ordered as transformers orders them.
fn merges<'a>(tokens: &'a [String], scores: &[f32]) -> Vec<(&'a str, &'a str)> {
    let ids: HashMap<&str, usize> = tokens.iter().map(String::as_str).zip(0..).collect();
    let mut found = Vec::new();
    for (token, score) in tokens.iter().zip(scores) {
        let first = found.len();
        for (letters, (at, _)) in token.char_indices().enumerate().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                found.push((*score, letters, right.chars().count(), (l, r), (left, right)));
            }
        }
        found[first..].sort_by_key(|(.., ids, _)| *ids);
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| Reverse((a.1, a.2)).cmp(&Reverse((b.1, b.2)))));
    found.into_iter().map(|(.., pair)| pair).collect()
}
