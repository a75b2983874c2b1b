//! The tokens that end a text, as llama.cpp gathers them (`special_eog_ids` in `src/llama-vocab.cpp`): those that a key
//! names, and control tokens with well-known names.

use std::collections::BTreeSet;

use gguf::Gguf;

use crate::Result;

/// Keys that name one.
const KEYS: [&str; 6] = [
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.fim_pad_token_id",
    "tokenizer.ggml.fim_rep_token_id",
    "tokenizer.ggml.fim_sep_token_id",
];
/// Names of tokens that end a text, a turn, or a message.
const NAMES: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];
/// Names of tokens between files, for models that fill in the middle. Each kind counts where no key names another.
const BETWEEN_FILES: [(&str, &[&str]); 3] = [
    ("tokenizer.ggml.fim_pad_token_id", &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"]),
    (
        "tokenizer.ggml.fim_rep_token_id",
        &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
    ),
    ("tokenizer.ggml.fim_sep_token_id", &["<|file_sep|>"]),
];
/// Types of tokens that are not part of a text: control, and defined by the user.
const SPECIAL: [i32; 2] = [3, 4];
/// A SentencePiece model's end where no key names one.
const SENTENCEPIECE_EOS: u32 = 2;

/// The ids, in no order that matters.
pub(super) fn ends(file: &Gguf) -> Result<Vec<u32>> {
    let mut ids = BTreeSet::new();
    for key in KEYS {
        ids.extend(file.get::<u32>(key)?);
    }
    let has_eos = file.get::<u32>(KEYS[0])?.is_some();
    if !has_eos && file.get::<&str>("tokenizer.ggml.model")? == Some("llama") {
        ids.insert(SENTENCEPIECE_EOS);
    }
    let tokens = file.get::<&[String]>("tokenizer.ggml.tokens")?.unwrap_or_default();
    let types = file.get::<Vec<i32>>("tokenizer.ggml.token_type")?;
    // A file without types says of no token that it is part of a text.
    let is_special =
        |id: usize| types.as_ref().is_none_or(|types| types.get(id).is_some_and(|ty| SPECIAL.contains(ty)));
    let mut names: Vec<&str> = NAMES.to_vec();
    for (key, more) in BETWEEN_FILES {
        if file.get::<u32>(key)?.is_none() {
            names.extend(more);
        }
    }
    let named =
        tokens.iter().enumerate().filter(|(id, token)| names.contains(&token.as_str()) && is_special(*id));
    ids.extend(named.map(|(id, _)| id as u32));
    let id_of = |name: &str| {
        ids.iter().copied().find(|id| tokens.get(*id as usize).is_some_and(|token| token == name))
    };
    let has = |name: &str| id_of(name).is_some();
    // In these two formats of chats, the token stands between the messages of a turn.
    let ends_messages_only = (has("<|return|>") && (has("<|call|>") || has("<|calls|>")))
        || (has("<|flush|>") && (has("<|call|>") || has("<|calls|>")));
    // In these two vocabularies, it is a token like any other.
    let is_plain = has("<|tool_response>") || has("<|plamo:eos|>");
    let without = [id_of("<|end|>").filter(|_| ends_messages_only), id_of("</s>").filter(|_| is_plain)];
    Ok(ids.into_iter().filter(|id| !without.contains(&Some(*id))).collect())
}
