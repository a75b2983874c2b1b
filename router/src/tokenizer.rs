//! The model's tokenizer and chat template, from a folder or from a GGUF file's metadata.

mod bytes;
mod end_tokens;
mod from_gguf;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tokenizers::Tokenizer;

use self::bytes::TokenBytes;

/// Why a tokenizer could not be made.
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
    /// A file is not JSON.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// The GGUF file's metadata.
    #[error("{0}")]
    Gguf(#[from] gguf::Error),
    /// The tokenizer_config.json that the user named.
    #[error("tokenizer-config-path: {0}")]
    Given(#[source] Box<TokenizerError>),
    /// A kind of tokenizer that we do not build from metadata.
    #[error("{key} {value:?} is not supported; known are {known}")]
    Unsupported {
        /// The metadata key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What would be.
        known: &'static str,
    },
    /// The library refused the definition.
    #[error("{0}")]
    Definition(#[source] tokenizers::Error),
}

/// Text to tokens and back, and how a chat becomes text.
pub struct ModelTokenizer {
    /// The library's tokenizer.
    pub tokenizer: Tokenizer,
    /// Jinja source of the chat template, if the model has one.
    pub chat_template: Option<String>,
    /// Text of the token that begins a sequence.
    pub bos_token: Option<String>,
    /// Text of the token that ends one.
    pub eos_token: Option<String>,
    /// Ids of added tokens, and whether each is special: the library would copy its whole table to tell one.
    added: HashMap<u32, bool>,
    end_ids: Vec<u32>,
    bytes: TokenBytes,
}

impl ModelTokenizer {
    /// Reads what belongs to a model. `given` replaces its tokenizer_config.json; its chat template, if it has one, goes
    /// before all of the model's.
    pub fn load(model: &Path, given: Option<&Path>) -> Result<ModelTokenizer, TokenizerError> {
        let is_file = model.is_file();
        let mut found = if is_file { from_gguf::load(model)? } else { from_folder(model)? };
        let own = model.join("tokenizer_config.json");
        if let Some(path) = given {
            let config = json(path).map_err(|error| TokenizerError::Given(Box::new(error)))?;
            found.name_special_tokens(&config);
            found.chat_template = template(&config).or(found.chat_template);
        } else if !is_file && own.exists() {
            let config = json(&own)?;
            found.name_special_tokens(&config);
            // A template in a file of its own goes first.
            found.chat_template = found.chat_template.or_else(|| template(&config));
        }
        Ok(found)
    }

    fn new(tokenizer: Tokenizer) -> ModelTokenizer {
        let added = tokenizer.get_added_tokens_decoder();
        ModelTokenizer {
            added: added.into_iter().map(|(id, token)| (id, token.special)).collect(),
            bytes: TokenBytes::new(&tokenizer),
            tokenizer,
            chat_template: None,
            bos_token: None,
            eos_token: None,
            end_ids: Vec::new(),
        }
    }

    /// Takes over the special tokens that a tokenizer_config.json names.
    fn name_special_tokens(&mut self, config: &Value) {
        // Each is its text, or an object that has it.
        let text = |key: &str| {
            let value = config.get(key)?;
            value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
        };
        self.bos_token = text("bos_token").or(self.bos_token.take());
        self.eos_token = text("eos_token").or(self.eos_token.take());
        let end = self.eos_token.as_deref().and_then(|token| self.tokenizer.token_to_id(token));
        self.end_ids.extend(end.filter(|id| !self.end_ids.contains(id)));
    }

    /// Tokens of a text. Special tokens in it are recognized; none are added unless the tokenizer's own
    /// post-processor does and `add_special` is set.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.tokenizer.encode_fast(text, add_special).map_err(TokenizerError::Definition)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        // Fails on ids alone that no tokenizer of this model can have given.
        self.tokenizer.decode(ids, skip_special).unwrap_or_default()
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

    /// Whether a token is special: not part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.added.get(&id) == Some(&true)
    }

    /// Ids of the tokens that end a text as far as the tokenizer's files know: the configured `eos_token`, and in a GGUF
    /// all that llama.cpp would stop at. The model's own configuration may name others.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }
}

/// The chat template of a tokenizer_config.json: the only one, or the default of several named ones.
fn template(config: &Value) -> Option<String> {
    let template = match config.get("chat_template")? {
        Value::Array(named) => named.iter().find(|entry| entry["name"] == "default")?.get("template")?,
        template => template,
    };
    template.as_str().map(str::to_owned)
}

fn json(path: &Path) -> Result<Value, TokenizerError> {
    let text = fs::read(path).map_err(|source| TokenizerError::Io { path: path.into(), source })?;
    serde_json::from_slice(&text).map_err(|source| TokenizerError::Json { path: path.into(), source })
}

fn from_folder(folder: &Path) -> Result<ModelTokenizer, TokenizerError> {
    let path = folder.join("tokenizer.json");
    let text = fs::read(&path).map_err(|source| TokenizerError::Io { path, source })?;
    let mut tokenizer = Tokenizer::from_bytes(text).map_err(TokenizerError::Definition)?;
    // Length is the router's business, and a file may ask for either.
    tokenizer.with_truncation(None).map_err(TokenizerError::Definition)?;
    tokenizer.with_padding(None);
    let path = folder.join("chat_template.jinja");
    let chat_template = match fs::read_to_string(&path) {
        Ok(template) => Some(template),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(TokenizerError::Io { path, source }),
    };
    Ok(ModelTokenizer { chat_template, ..ModelTokenizer::new(tokenizer) })
}
