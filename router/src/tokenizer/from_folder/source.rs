//! The files that a folder's vocabulary is read from.

use std::{fs, path::PathBuf};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::Value;
use tokenizers::{
    ModelWrapper, PostProcessorWrapper, Tokenizer,
    models::{bpe::BPE, wordpiece::WordPiece},
};

use super::{
    super::{TokenizerError, growth, without_panic},
    Folder,
    added_tokens::AddedTokens,
    charsmap,
    class::Class,
    sentencepiece, tiktoken,
};

/// What the files have.
pub(super) enum Source {
    /// A tokenizer that lacks added tokens at most.
    Whole(Box<Tokenizer>),
    /// The model, to be put into the steps of the class.
    Vocabulary { model: Box<ModelWrapper>, post_processor: Option<PostProcessorWrapper> },
}

impl Source {
    /// Reads tokenizer.json, or without it the files that the class knows. Tokens that those have beside the
    /// vocabulary are taken over into `added`.
    pub(super) fn read(folder: &Folder, added: &mut AddedTokens) -> Result<Source, TokenizerError> {
        if let Some(definition) = &folder.definition {
            return defined(folder, definition, added);
        }
        let class = folder.class;
        if class == Class::Other {
            let name = folder.config["tokenizer_class"].as_str().unwrap_or_default().to_owned();
            return Err(TokenizerError::Class { folder: folder.path.into(), class: name });
        }
        let models = ["tokenizer.model", "tiktoken.model"].map(|name| folder.path.join(name));
        let model = models.into_iter().find(|path| path.is_file());
        let reads_models = matches!(class, Class::Backend | Class::Llama | Class::CodeLlama | Class::Gemma);
        match model {
            Some(path) if reads_models => model_file(folder, path, added),
            Some(path) => Err(TokenizerError::Kind { path, class: class.name() }),
            None if reads_models => Err(folder.lacks("tokenizer.model")),
            None if class == Class::Bert => words(folder),
            None => merges(folder),
        }
    }

    fn of(model: impl Into<ModelWrapper>) -> Source {
        Source::Vocabulary { model: Box::new(model.into()), post_processor: None }
    }
}

/// tokenizer.json, as it is or for the steps of a class.
fn defined(folder: &Folder, definition: &str, added: &mut AddedTokens) -> Result<Source, TokenizerError> {
    // The library panics when it reads some maps that are broken, and when it looks texts up in the others.
    if definition.contains("precompiled_charsmap") {
        let normalizer = serde_json::from_str(definition).map(|Normalizer { normalizer }| normalizer);
        check_maps(&normalizer.unwrap_or_default(), folder)?;
    }
    growth::check(definition)?;
    let tokenizer =
        without_panic(|| Tokenizer::from_bytes(definition)).map_err(TokenizerError::Definition)?;
    let model = match (folder.class, tokenizer.get_model()) {
        (Class::Backend | Class::Other, _) => return Ok(Source::Whole(Box::new(tokenizer))),
        (Class::Bert, model @ ModelWrapper::WordPiece(_)) => model,
        (class, model @ ModelWrapper::BPE(_)) if class != Class::Bert => model,
        (class, _) => {
            let path = folder.path.join("tokenizer.json");
            return Err(TokenizerError::Kind { path, class: class.name() });
        }
    };
    added.define(tokenizer.get_added_tokens_decoder());
    let post_processor = tokenizer.get_post_processor().cloned();
    Ok(Source::Vocabulary { model: Box::new(model.clone()), post_processor })
}

/// The part of a tokenizer.json that has maps of characters.
#[derive(Deserialize)]
struct Normalizer {
    normalizer: Value,
}

/// Refuses a normalizer, or one in a sequence, whose map of characters is broken.
fn check_maps(normalizer: &Value, folder: &Folder) -> Result<(), TokenizerError> {
    normalizer["normalizers"].as_array().into_iter().flatten().try_for_each(|one| check_maps(one, folder))?;
    match normalizer["precompiled_charsmap"].as_str().map(|map| STANDARD.decode(map)) {
        None => Ok(()),
        Some(Ok(map)) if charsmap::growth(&map).is_some() => Ok(()),
        Some(_) => Err(TokenizerError::Charsmap { path: folder.path.join("tokenizer.json") }),
    }
}

/// A sentencepiece model or a list of ranks, which have the same file name.
fn model_file(folder: &Folder, path: PathBuf, added: &mut AddedTokens) -> Result<Source, TokenizerError> {
    let content = fs::read(&path).map_err(|source| TokenizerError::Io { path: path.clone(), source })?;
    if let Some(ranks) = tiktoken::ranks(&content) {
        return Ok(Source::Whole(Box::new(tiktoken::tokenizer(&ranks, added)?)));
    }
    let model = sentencepiece::Model::read(&content, &path)?;
    if folder.class == Class::Backend {
        let legacy = folder.config.get("legacy").is_none_or(super::is_true);
        return Ok(Source::Whole(Box::new(model.tokenizer(legacy, added)?)));
    }
    if model.is_unigram() {
        return Err(TokenizerError::Kind { path, class: folder.class.name() });
    }
    added.add_extra(model.added_tokens());
    Ok(Source::of(model.merged_in_order()?))
}

/// vocab.json and merges.txt.
fn merges(folder: &Folder) -> Result<Source, TokenizerError> {
    let [vocab, merges] = ["vocab.json", "merges.txt"].map(|name| folder.path.join(name));
    if !(vocab.is_file() && merges.is_file()) {
        return Err(folder.lacks("vocab.json and merges.txt"));
    }
    let read = without_panic(|| BPE::from_file(&vocab.to_string_lossy(), &merges.to_string_lossy()).build());
    Ok(Source::of(read.map_err(|source| TokenizerError::File { path: vocab, source })?))
}

/// vocab.txt.
fn words(folder: &Folder) -> Result<Source, TokenizerError> {
    let path = folder.path.join("vocab.txt");
    if !path.is_file() {
        return Err(folder.lacks("vocab.txt"));
    }
    let read = without_panic(|| WordPiece::from_file(&path.to_string_lossy()).build());
    Ok(Source::of(read.map_err(|source| TokenizerError::File { path, source })?))
}

impl Folder<'_> {
    fn lacks(&self, files: &'static str) -> TokenizerError {
        TokenizerError::Missing { folder: self.path.into(), files, class: self.class.name() }
    }
}
