//! Reads the model's tokenizer, special tokens and chat templates from a folder or from a GGUF file.

mod bytes;
mod definition;
mod from_folder;
mod from_gguf;
mod growth;
mod of_adapter;
mod post_processor;
mod shared;
mod special_tokens;
mod splits;
mod templates;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};
use tokenizers::{Decoder, Encoding, PostProcessor, Tokenizer, TruncationDirection};

use self::bytes::TokenBytes;
pub(crate) use self::of_adapter::{AdapterTokenizer, Reference, TextError, TextFiles};
pub use self::shared::{SharedTokenizer, SharedVocabulary};
use crate::json_file::{self, JsonFileError};

/// The reason that a tokenizer could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file of JSON.
    #[error(transparent)]
    Json(#[from] JsonFileError),
    /// The GGUF file's metadata.
    #[error("{0}")]
    Gguf(#[from] gguf::Error),
    /// The tokenizer_config.json that the user named.
    #[error("tokenizer-config-path: {0}")]
    Given(#[source] Box<TokenizerError>),
    /// The file has a kind of tokenizer that we cannot build from metadata.
    #[error("{key} {value:?} is not supported; known are {known}")]
    Unsupported {
        /// The metadata key.
        key: &'static str,
        /// Its value.
        value: String,
        /// The supported values.
        known: &'static str,
    },
    /// A file that a vocabulary is read from is not valid.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: tokenizers::Error,
    },
    /// There is no file to build the tokenizer from.
    #[error("{}: there is neither a tokenizer.json nor {files} for a {class}", folder.display())]
    Missing {
        /// The model's folder.
        folder: PathBuf,
        /// The files that would do.
        files: &'static str,
        /// transformers' class of the tokenizer.
        class: &'static str,
    },
    /// The class does not read such a file.
    #[error("{}: no {class} can be built from this file", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// transformers' class of the tokenizer.
        class: &'static str,
    },
    /// The class is built from nothing but a tokenizer.json.
    #[error("{}: tokenizer_class {class:?} is not supported without a tokenizer.json", folder.display())]
    Class {
        /// The model's folder.
        folder: PathBuf,
        /// The class, as the configuration names it.
        class: String,
    },
    /// A setting of a sentencepiece model that is not supported.
    #[error("{}: {field} {value} is not supported", path.display())]
    Sentencepiece {
        /// The model's file.
        path: PathBuf,
        /// The setting.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// A map of characters in which some texts cannot be looked up.
    #[error("{}: precompiled_charsmap is broken", path.display())]
    Charsmap {
        /// The file.
        path: PathBuf,
    },
    /// Steps that could make much of little.
    #[error(
        "tokenizer.json: {step} may come to {growth} times the size of a text or token; {most} are allowed"
    )]
    Growth {
        /// Which steps.
        step: &'static str,
        /// What they may come to.
        growth: usize,
        /// What they are allowed.
        most: usize,
    },
    /// A text that the steps of the tokenizer could make too large.
    #[error("a text of {bytes} bytes is too long for this tokenizer, which takes {most}")]
    TooLong {
        /// The bytes of the text.
        bytes: usize,
        /// The bytes of the longest text.
        most: usize,
    },
    /// The tokenizers library refused the definition.
    #[error("{0}")]
    Definition(#[source] tokenizers::Error),
}

/// Turns text into tokens and back, and has what chat templates need.
pub struct ModelTokenizer {
    /// The tokenizer of the tokenizers library.
    pub tokenizer: SharedTokenizer,
    /// Jinja sources of the model's chat templates by name.
    pub chat_templates: BTreeMap<String, String>,
    /// Texts of special tokens by the names that chat templates have for them, such as `bos_token`.
    pub special_tokens: BTreeMap<String, String>,
    /// Ids of added tokens, and whether each is special: the library would copy its whole table to tell one.
    added: HashMap<u32, bool>,
    end_ids: Vec<u32>,
    bytes: TokenBytes,
    /// Most bytes of a text that it takes.
    longest: usize,
    /// Whether the spaces are taken out that a vocabulary of words leaves before punctuation.
    cleans_up: bool,
}

impl ModelTokenizer {
    /// Reads what belongs to a model. `given` replaces its tokenizer_config.json; chat templates in it, if it has any,
    /// replace all of the model's.
    pub fn load(model: &Path, given: Option<&Path>) -> Result<ModelTokenizer, TokenizerError> {
        let given = given
            .map(json_file::read)
            .transpose()
            .map_err(|error| TokenizerError::Given(Box::new(error.into())))?;
        if !model.is_file() {
            return from_folder::load(model, given.as_ref());
        }
        let mut found = from_gguf::load(model)?;
        if let Some(config) = &given {
            special_tokens::apply(&mut found.special_tokens, config.as_object().unwrap_or(&Map::new()));
            found.take_templates(config);
            if !config["eos_token"].is_null() {
                found.end_at_eos_token();
            }
        }
        Ok(found)
    }

    /// Replaces the chat templates by those of a configuration, if it has any.
    fn take_templates(&mut self, config: &Value) {
        let sources = templates::from_config(config);
        if !sources.is_empty() {
            self.chat_templates = sources;
        }
    }

    fn end_at_eos_token(&mut self) {
        let end = self.special_tokens.get("eos_token").and_then(|token| self.tokenizer.token_to_id(token));
        self.end_ids.extend(end.filter(|id| !self.end_ids.contains(id)));
    }

    fn new(tokenizer: &Tokenizer) -> Result<ModelTokenizer, TokenizerError> {
        Ok(ModelTokenizer::over(shared::share(tokenizer).map_err(TokenizerError::Definition)?))
    }

    fn over(tokenizer: SharedTokenizer) -> ModelTokenizer {
        let added = tokenizer.get_added_tokens_decoder().into_iter();
        // A token may be made special after it was added.
        let is_special = |text: &str| tokenizer.get_added_vocabulary().is_special_token(text);
        ModelTokenizer {
            added: added.map(|(id, token)| (id, is_special(&token.content))).collect(),
            bytes: TokenBytes::new(&tokenizer),
            longest: growth::longest_text(&tokenizer),
            tokenizer,
            chat_templates: BTreeMap::new(),
            special_tokens: BTreeMap::new(),
            end_ids: Vec::new(),
            cleans_up: false,
        }
    }

    /// Tokens of a text. Special tokens in it are recognized; none are added unless the tokenizer's own
    /// post-processor does and `add_special` is set.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        self.check_length(text)?;
        let encoding = without_panic(|| self.tokenizer.encode_fast(text, add_special));
        let encoding = encoding.map_err(TokenizerError::Definition)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Tokens of a text with the special tokens around it, and their places in it. A text of more than `most` tokens loses
    /// those at its end, but not the special tokens around it; without `most` it is taken whole.
    pub fn encode_whole(&self, text: &str, most: Option<usize>) -> Result<Encoding, TokenizerError> {
        self.check_length(text)?;
        let encoding = without_panic(|| self.tokenizer.encode_char_offsets(text, false));
        let mut encoding = encoding.map_err(TokenizerError::Definition)?;
        let added = self.tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        if let Some(most) = most.filter(|most| encoding.len() + added > *most) {
            encoding.truncate(most.saturating_sub(added), 0, TruncationDirection::Right);
        }
        without_panic(|| self.tokenizer.post_process(encoding, None, true))
            .map_err(TokenizerError::Definition)
    }

    fn check_length(&self, text: &str) -> Result<(), TokenizerError> {
        match text.len() {
            bytes if bytes > self.longest => Err(TokenizerError::TooLong { bytes, most: self.longest }),
            _ => Ok(()),
        }
    }

    /// Text of vocabulary entries, as the tokenizer's decoder puts them together.
    pub fn join(&self, entries: Vec<String>) -> String {
        match self.tokenizer.get_decoder() {
            Some(decoder) => without_panic(|| decoder.decode(entries)).unwrap_or_default(),
            None => entries.join(" "),
        }
    }

    /// Text of tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        // Fails on ids alone that no tokenizer of this model can have given.
        let text = without_panic(|| self.tokenizer.decode(ids, skip_special)).unwrap_or_default();
        if self.cleans_up { clean_up(text) } else { text }
    }

    /// Text of one token, special or not, as it is within a text: sentencepiece's decoders leave out the space that a
    /// text begins with, so the token is taken behind itself.
    pub fn token_text(&self, id: u32) -> String {
        let (one, two) = (self.decode(&[id], false), self.decode(&[id, id], false));
        two.strip_prefix(&one).map(str::to_owned).unwrap_or(one)
    }

    /// The bytes that a token stands for within a text; none if the vocabulary has no such token. Unlike its text, they
    /// tell the parts of a character apart.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(entry) = self.tokenizer.id_to_token(id) else { return Vec::new() };
        self.bytes.of(entry, self.added.contains_key(&id), self.is_special(id))
    }

    /// Returns whether a token is special, which means that it is not part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.added.get(&id) == Some(&true)
    }

    /// Ids of those among these texts that are special tokens.
    pub(crate) fn special_ids(&self, texts: Vec<&str>) -> Vec<u32> {
        let ids = texts.into_iter().filter_map(|text| self.tokenizer.token_to_id(text));
        ids.filter(|id| self.is_special(*id)).collect()
    }

    /// Ids of the tokens that end a text as far as the tokenizer's files know: the configured `eos_token`, and in a
    /// GGUF all that llama.cpp would stop at. The model's own configuration may name others.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }
}

/// Makes an error of a panic: the library takes some of what files say for granted, such as that the second part of a
/// merge begins with `continuing_subword_prefix`.
fn without_panic<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| Err("the tokenizers library failed".into()))
}

/// Takes out the spaces that transformers' `clean_up_tokenization` takes out.
fn clean_up(text: String) -> String {
    let before = [" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"];
    before.into_iter().fold(text, |text, with_space| text.replace(with_space, with_space.trim()))
}
