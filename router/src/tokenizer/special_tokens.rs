//! Names of special tokens, as transformers' `special_tokens_map` has them.

use std::collections::BTreeMap;

use gguf::Gguf;
use serde_json::{Map, Value};

use super::TokenizerError;

/// The names that every tokenizer has.
pub(super) const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Metadata keys of a GGUF file.
const GGUF_KEYS: [(&str, &str); 8] = [
    ("bos_token", "tokenizer.ggml.bos_token_id"),
    ("eos_token", "tokenizer.ggml.eos_token_id"),
    ("unk_token", "tokenizer.ggml.unknown_token_id"),
    // As files of older converters have it.
    ("sep_token", "tokenizer.ggml.seperator_token_id"),
    ("sep_token", "tokenizer.ggml.separator_token_id"),
    ("pad_token", "tokenizer.ggml.padding_token_id"),
    ("cls_token", "tokenizer.ggml.cls_token_id"),
    ("mask_token", "tokenizer.ggml.mask_token_id"),
];

/// Each name's text.
pub(super) type SpecialTokens = BTreeMap<String, String>;

/// The names in a file with their tokens; null stands for none.
pub(super) fn named(file: &Map<String, Value>) -> impl Iterator<Item = (&str, &Value)> {
    let is_named = |name: &str, value: &Value| match text(value) {
        // Names of a model's own, such as `image_token`, are always plain text.
        Some(_) => NAMES.contains(&name) || (name.ends_with("_token") && value.is_string()),
        None => NAMES.contains(&name) && value.is_null(),
    };
    let more = file.get("extra_special_tokens").and_then(Value::as_object).into_iter().flatten();
    let more = more.filter(|(_, value)| text(value).is_some());
    let named = file.iter().filter(move |(name, value)| is_named(name, value));
    named.chain(more).map(|(name, value)| (name.as_str(), value))
}

/// Takes over what a file names; a null takes a name away.
pub(super) fn apply(names: &mut SpecialTokens, file: &Map<String, Value>) {
    for (name, value) in named(file) {
        match text(value) {
            Some(text) => _ = names.insert(name.to_owned(), text.to_owned()),
            None => _ = names.remove(name),
        }
    }
}

/// The special tokens of a GGUF file.
pub(super) fn from_gguf(file: &Gguf, tokens: &[String]) -> Result<SpecialTokens, TokenizerError> {
    let mut named = SpecialTokens::new();
    for (name, key) in GGUF_KEYS {
        let id: Option<u32> = file.get(key)?;
        let text = id.and_then(|id| tokens.get(id as usize));
        named.extend(text.map(|text| (name.to_owned(), text.clone())));
    }
    Ok(named)
}

/// A token is its text, or an object that has it.
fn text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}
