//! Builds a tokenizer from the metadata of a GGUF file.

mod sentencepiece;

use std::path::Path;

use gguf::Gguf;
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use self::sentencepiece::Family;
use super::{ModelTokenizer, TokenizerError, post_processor, special_tokens, splits, templates};

/// ggml's `token_type` of the token that stands for unknown text.
const UNKNOWN: i32 = 2;
/// ggml's `token_type` of a special token.
const CONTROL: i32 = 3;
/// ggml's `token_type` of a token that was added to a trained vocabulary.
const USER_DEFINED: i32 = 4;

/// Writes the metadata as a tokenizer.json and lets the tokenizers library read that.
pub(super) fn load(path: &Path) -> Result<ModelTokenizer, TokenizerError> {
    let file = Gguf::open(path)?;
    let mut tokens: Vec<String> = file.require::<&[String]>("tokenizer.ggml.tokens")?.to_vec();
    let mut types: Vec<i32> = file.require("tokenizer.ggml.token_type")?;
    let family = Family::of(&file)?;
    if family == Family::Gemma {
        sentencepiece::write_spaces(&mut tokens, &mut types);
    }
    let tokens = &*tokens;
    let vocab: Map<String, Value> =
        tokens.iter().zip(0..).map(|(token, id): (_, u32)| (token.clone(), id.into())).collect();
    let mut definition = match file.require("tokenizer.ggml.model")? {
        "gpt2" => byte_level(&file, tokens)?,
        "llama" => sentencepiece::definition(&file, tokens, family)?,
        other => {
            let (key, known) = ("tokenizer.ggml.model", "gpt2, llama");
            return Err(TokenizerError::Unsupported { key, value: other.into(), known });
        }
    };
    definition["added_tokens"] = added_tokens(tokens, &types);
    definition["model"]["vocab"] = vocab.into();
    let tokenizer = Tokenizer::from_bytes(definition.to_string()).map_err(TokenizerError::Definition)?;
    Ok(ModelTokenizer {
        special_tokens: special_tokens::from_gguf(&file, tokens)?,
        chat_templates: templates::from_gguf(&file)?,
        end_ids: file.end_tokens()?.into_iter().filter(|id| (*id as usize) < tokens.len()).collect(),
        ..ModelTokenizer::new(&tokenizer)?
    })
}

/// The added tokens: the library finds them in a text before it splits the rest.
fn added_tokens(tokens: &[String], types: &[i32]) -> Value {
    let special = |ty: i32| matches!(ty, UNKNOWN | CONTROL);
    let added =
        tokens.iter().zip(types).zip(0..).filter(|((_, ty), _)| special(**ty) || **ty == USER_DEFINED);
    added
        .map(|((token, ty), id): (_, u32)| {
            json!({
                "id": id, "content": token, "special": special(*ty),
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            })
        })
        .collect()
}

/// The definition of a byte-level BPE tokenizer, except for its vocabulary and added tokens.
fn byte_level(file: &Gguf, tokens: &[String]) -> Result<Value, TokenizerError> {
    let merges: &[String] = file.require("tokenizer.ggml.merges")?;
    let merges: Vec<_> = merges.iter().filter_map(|merge| merge.split_once(' ')).collect();
    let (pre_tokenizer, llama3) = pre_tokenizer(file.get("tokenizer.ggml.pre")?.unwrap_or("default"))?;
    // Such as Llama 3's do not merge a word that is a token as a whole. Older files do not say that it adds BOS.
    let (ignore_merges, adds_bos) = (llama3, llama3);
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": around(file, tokens, adds_bos)?,
        "decoder": splits::bytes_decoder(),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": ignore_merges, "merges": merges,
        },
    }))
}

/// The post-processor, which adds BOS and EOS to a text. `adds_bos` applies where the file does not say.
fn around(file: &Gguf, tokens: &[String], adds_bos: bool) -> Result<Value, TokenizerError> {
    let token = |adds: &str, default: bool, id: &str| -> Result<Option<(&str, u32)>, TokenizerError> {
        let adds = file.get(adds)?.unwrap_or(default);
        let id: Option<u32> = file.get(id)?.filter(|_| adds);
        Ok(id.and_then(|id| Some((tokens.get(id as usize)?.as_str(), id))))
    };
    let bos = token("tokenizer.ggml.add_bos_token", adds_bos, "tokenizer.ggml.bos_token_id")?;
    let eos = token("tokenizer.ggml.add_eos_token", false, "tokenizer.ggml.eos_token_id")?;
    Ok(post_processor::around(bos, eos))
}

/// How texts are split before they are merged, by llama.cpp's names (`llama_vocab::impl::load` and `llm_tokenizer_bpe` in
/// `src/llama-vocab.cpp`): those of the architectures that are served. Names with the same way there have it here.
const PRE_TOKENIZERS: [(&str, &[&str]); 7] = [
    ("gpt-2", &["phi-2", "a.x-4.0", "gigachat", "mellum", "trillion"]),
    ("smollm", &["command-r", "mellum2", "minerva-7b", "refact", "starcoder"]),
    ("llama-bpe", &["llama3", "llama-v3", "falcon3", "midm-2.0", "pixtral"]),
    ("dbrx", &["smaug-bpe"]),
    ("tekken", &[]),
    ("qwen2", &["deepseek-r1-qwen", "kormo", "megrez"]),
    ("gpt-4o", &["kanana2", "llama4"]),
];

/// The pre-tokenizer, which splits text before merging, and whether the tokenizer is used as Llama 3's.
fn pre_tokenizer(name: &str) -> Result<(Value, bool), TokenizerError> {
    let is = |(way, others): &&(&str, &[&str])| *way == name || others.contains(&name);
    Ok(match PRE_TOKENIZERS.iter().find(is).map(|(way, _)| *way) {
        Some("gpt-2") => (splits::gpt2(false), false),
        Some("smollm") => (splits::smollm(), false),
        Some("llama-bpe") => (splits::by_regex(splits::LLAMA3, false), true),
        Some("dbrx") => (splits::by_regex(splits::LLAMA3, false), false),
        Some("tekken") => (splits::by_regex(splits::TEKKEN, false), true),
        Some("qwen2") => (splits::by_regex(splits::QWEN2, false), false),
        Some("gpt-4o") => (splits::by_regex(splits::GPT_4O, false), false),
        _ => {
            let (key, known) = (
                "tokenizer.ggml.pre",
                "gpt-2, smollm, llama-bpe, dbrx, tekken, qwen2, gpt-4o and equal ones",
            );
            return Err(TokenizerError::Unsupported { key, value: name.into(), known });
        }
    })
}
