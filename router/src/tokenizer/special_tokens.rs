//! Names of special tokens, as transformers' `special_tokens_map` has them.

use std::{collections::BTreeMap, path::Path};

use gguf::Gguf;
use serde_json::{Map, Value};

use super::{TokenizerError, json_if_exists};

/// The names that every tokenizer has.
const NAMES: [&str; 7] =
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

/// The special tokens of a folder whose tokenizer_config.json is `config`.
pub(super) fn from_folder(
    folder: &Path,
    config: &Value,
    byte_level: bool,
) -> Result<SpecialTokens, TokenizerError> {
    let mut named = defaults(config, byte_level);
    let none = Map::new();
    let config = config.as_object().unwrap_or(&none);
    apply(&mut named, config);
    // A configuration that lists its added tokens is of a version that writes no other file.
    if !config.contains_key("added_tokens_decoder") {
        let file = json_if_exists(&folder.join("special_tokens_map.json"))?;
        apply(&mut named, file.as_ref().and_then(Value::as_object).unwrap_or(&none));
    }
    Ok(named)
}

/// Takes over what a file names; a null takes a name away.
pub(super) fn apply(named: &mut SpecialTokens, file: &Map<String, Value>) {
    for (name, value) in file {
        match text(value) {
            // Names of a model's own, such as `image_token`, are always plain text.
            Some(text)
                if NAMES.contains(&name.as_str()) || (name.ends_with("_token") && value.is_string()) =>
            {
                named.insert(name.clone(), text.to_owned());
            }
            None if value.is_null() => _ = named.remove(name),
            _ => {}
        }
    }
    for (name, value) in file.get("extra_special_tokens").and_then(Value::as_object).into_iter().flatten() {
        named.extend(text(value).map(|text| (name.clone(), text.to_owned())));
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

/// What transformers' class of the tokenizer takes where the files name nothing. A byte-level tokenizer is never loaded
/// as Llama's.
fn defaults(config: &Value, byte_level: bool) -> SpecialTokens {
    let class = config["tokenizer_class"].as_str().unwrap_or_default();
    let named: &[(&str, &str)] = match class.trim_end_matches("Fast") {
        "LlamaTokenizer" if !byte_level => {
            &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")]
        }
        "GPT2Tokenizer" => {
            &[("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>")]
        }
        "Qwen2Tokenizer" => {
            &[("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>")]
        }
        "GemmaTokenizer" => &[
            ("bos_token", "<bos>"),
            ("eos_token", "<eos>"),
            ("unk_token", "<unk>"),
            ("pad_token", "<pad>"),
            ("mask_token", "<mask>"),
        ],
        _ => &[],
    };
    named.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}
