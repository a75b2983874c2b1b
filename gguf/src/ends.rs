//! The tokens that end a text, as llama.cpp gathers them (`special_eog_ids` in `src/llama-vocab.cpp`): those that a key
//! names, and those with well-known names, whatever type the file gives them.

use std::collections::BTreeSet;

use crate::{Gguf, Result};

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
/// A SentencePiece model's end where no key names one.
const SENTENCEPIECE_EOS: u32 = 2;

impl Gguf {
    /// Ids of the tokens that end a text, sorted. One may be larger than any token's.
    ///
    /// Errors: a key of the tokenizer has a value of another type.
    pub fn end_tokens(&self) -> Result<Vec<u32>> {
        let mut ids = BTreeSet::new();
        for key in KEYS {
            ids.extend(self.get::<u32>(key)?);
        }
        let has_eos = self.get::<u32>(KEYS[0])?.is_some();
        if !has_eos && self.get::<&str>("tokenizer.ggml.model")? == Some("llama") {
            ids.insert(SENTENCEPIECE_EOS);
        }
        let tokens = self.get::<&[String]>("tokenizer.ggml.tokens")?.unwrap_or_default();
        let mut names: Vec<&str> = NAMES.to_vec();
        for (key, more) in BETWEEN_FILES {
            if self.get::<u32>(key)?.is_none() {
                names.extend(more);
            }
        }
        ids.extend((0..).zip(tokens).filter(|(_, token)| names.contains(&token.as_str())).map(|(id, _)| id));
        let name_of = |id: &u32| tokens.get(*id as usize).map(String::as_str);
        let has = |name: &str| ids.iter().any(|id| name_of(id) == Some(name));
        // In these two formats of chats, the token stands between the messages of a turn.
        let ends_messages = (has("<|call|>") || has("<|calls|>")) && (has("<|return|>") || has("<|flush|>"));
        // In these two vocabularies, it is a token like any other.
        let is_plain = has("<|tool_response>") || has("<|plamo:eos|>");
        let is_end = |id: &u32| match name_of(id) {
            Some("<|end|>") => !ends_messages,
            Some("</s>") => !is_plain,
            _ => true,
        };
        Ok(ids.iter().copied().filter(is_end).collect())
    }
}
