//! The tokens at which a text ends, as a GGUF file tells them.
//!
//! The set is that of llama.cpp (`special_eog_ids` in `llama-vocab.cpp`): the tokens that the metadata names, and those
//! whose text is known to end a turn, because many files do not name theirs.

use std::collections::BTreeSet;

use gguf::Gguf;

use super::TokenizerError;

/// Metadata keys of tokens that end a sequence, a turn, or a message. Models for code begin something else than the
/// answer with the last three: padding, another repository, another file.
const KEYS: [&str; 6] = [
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.fim_pad_token_id",
    "tokenizer.ggml.fim_rep_token_id",
    "tokenizer.ggml.fim_sep_token_id",
];

/// Texts of tokens that end a turn, whatever type the file gives them.
const NAMES: [&str; 33] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "</s>",
    "<eos>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<turn|>",
    "<|tool_response>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "[e~[",
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];

/// Ids of the tokens that end a text. A key that points outside of the vocabulary is ignored.
pub(super) fn from_gguf(file: &Gguf, tokens: &[String]) -> Result<Vec<u32>, TokenizerError> {
    let mut ends = BTreeSet::new();
    for key in KEYS {
        ends.extend(file.get(key)?.filter(|id: &u32| (*id as usize) < tokens.len()));
    }
    ends.extend((0..).zip(tokens).filter(|(_, token)| NAMES.contains(&token.as_str())).map(|(id, _)| id));
    let has = |name: &str| ends.iter().any(|id| tokens[*id as usize] == name);
    let calls = has("<|call|>") || has("<|calls|>");
    // In the formats that have these tokens, the other one ends a part of an answer.
    let (within_harmony, within_gemma) =
        ((has("<|return|>") && has("<|call|>")) || (calls && has("<|flush|>")), has("<|tool_response>"));
    ends.retain(|id| match tokens[*id as usize].as_str() {
        "<|end|>" => !within_harmony,
        "</s>" => !within_gemma,
        _ => true,
    });
    Ok(ends.into_iter().collect())
}
