//! Builds the tokenizer of a folder in Hugging Face's layout as transformers 5 does.
//!
//! A class, which the configurations of tokenizer and model name, decides on the steps before and after the model of
//! the tokenizer. Some classes take vocabulary and merges from tokenizer.json and pass over the rest of it; the others
//! take it as it is. Without a tokenizer.json, the vocabulary is read from the files that the class knows.

pub(super) mod added_tokens;
pub(super) mod charsmap;
mod class;
mod sentencepiece;
mod source;
mod steps;
mod tiktoken;

use std::{fs, io, path::Path};

use serde_json::Value;
use tokenizers::Tokenizer;

use self::{added_tokens::AddedTokens, class::Class, source::Source};
use super::{ModelTokenizer, TokenizerError, post_processor, templates};
use crate::json_file;

/// What the folder's files say of its tokenizer.
struct Folder<'a> {
    path: &'a Path,
    class: Class,
    /// tokenizer_config.json, or what was given in its place.
    config: &'a Value,
    /// The content of tokenizer.json.
    definition: Option<String>,
}

/// Loads a folder, with `given` in place of its tokenizer_config.json.
pub(super) fn load(path: &Path, given: Option<&Value>) -> Result<ModelTokenizer, TokenizerError> {
    let own = match given {
        Some(_) => None,
        None => json_file::read_if_exists(&path.join("tokenizer_config.json"))?,
    };
    let config = given.or(own.as_ref()).unwrap_or(&Value::Null);
    let model: Value = json_file::read_if_exists(&path.join("config.json"))?.unwrap_or_default();
    let definition = text_if_exists(&path.join("tokenizer.json"))?;
    let class = Class::of(config, &model, definition.as_deref());
    let folder = Folder { path, class, config, definition };
    let mut added = AddedTokens::read(&folder)?;
    let source = Source::read(&folder, &mut added)?;
    let mut tokenizer = build(&folder, source, &added)?;
    // The router limits lengths itself, and a file may ask for truncation or padding.
    tokenizer.with_truncation(None).map_err(TokenizerError::Definition)?;
    tokenizer.with_padding(None);
    let mut found = ModelTokenizer::new(&tokenizer)?;
    // To BPE it would do harm, so transformers does not do it there.
    let is_bpe = found.tokenizer.get_model().is_bpe();
    found.cleans_up = !is_bpe && is_true(&config["clean_up_tokenization_spaces"]);
    found.special_tokens = added.texts();
    found.chat_templates = templates::from_folder(path, config)?;
    if let Some(given) = given {
        found.take_templates(given);
    }
    found.end_at_eos_token();
    Ok(found)
}

/// Puts the tokenizer together: the model and the steps around it, added tokens, and the post-processor.
fn build(folder: &Folder, source: Source, added: &AddedTokens) -> Result<Tokenizer, TokenizerError> {
    let (class, config) = (folder.class, folder.config);
    let mut tokenizer = match source {
        Source::Whole(tokenizer) => *tokenizer,
        Source::Vocabulary { model, post_processor } => {
            let mut tokenizer = steps::around(class, *model, config)?;
            tokenizer.with_post_processor(post_processor);
            tokenizer
        }
    };
    added.add_to(&mut tokenizer);
    if class == Class::Qwen2 {
        added.mark_special(&mut tokenizer);
    }
    tokenizer.set_encode_special_tokens(is_true(&config["split_special_tokens"]));
    if class == Class::Bert {
        let (first, last) = (added.named("cls_token"), added.named("sep_token"));
        post_processor::put(&mut tokenizer, first, last)?;
    } else if folder.says_what_is_added() || tokenizer.get_post_processor().is_none() {
        let bos = added.named("bos_token").filter(|_| folder.adds("add_bos_token"));
        let eos = added.named("eos_token").filter(|_| folder.adds("add_eos_token"));
        post_processor::put(&mut tokenizer, bos, eos)?;
    }
    Ok(tokenizer)
}

impl Folder<'_> {
    /// Returns whether flags decide on the tokens around a text. Those of the configuration count only without a
    /// tokenizer.json, whose post-processor decides otherwise.
    fn says_what_is_added(&self) -> bool {
        let flags = ["add_bos_token", "add_eos_token"];
        let has_flag = flags.iter().any(|flag| self.config.get(flag).is_some());
        match self.class {
            Class::CodeLlama | Class::GptNeoX => true,
            _ => self.definition.is_none() && has_flag,
        }
    }

    /// Returns whether a flag is set.
    fn adds(&self, flag: &str) -> bool {
        let by_default = self.class == Class::CodeLlama && flag == "add_bos_token";
        let flag = self.config.get(flag).filter(|_| self.definition.is_none());
        flag.map_or(by_default, is_true)
    }
}

/// Returns whether Python takes a value for true.
fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(items) => !items.is_empty(),
    }
}

fn text_if_exists(path: &Path) -> Result<Option<String>, TokenizerError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Io { path: path.into(), source }),
    }
}
