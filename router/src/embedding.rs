//! How a model embeds texts: what the files of sentence-transformers beside it say (`modules.json` and the folders that it
//! names), or LoRAX's way where there are none.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::{
    generation::{PooledRows, Pooling},
    json_file::{self, JsonFileError, read_if_exists},
};

/// The reason that the files do not say how texts are embedded.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddingError {
    /// A file cannot be read, or is not of the expected form.
    #[error(transparent)]
    File(#[from] JsonFileError),
    /// A module that is not computed, or not at its place.
    #[error(
        "modules.json: {found} is not supported; known are Transformer, Pooling and Normalize, in this order"
    )]
    Module {
        /// The module's type, or what is missing.
        found: String,
    },
    /// A way to pool that is not computed.
    #[error("{}: {found} is not supported; known are cls, mean and lasttoken, one of them", path.display())]
    Pooling {
        /// The configuration of the pooling.
        path: PathBuf,
        /// What it asks for.
        found: String,
    },
}

/// How texts are embedded.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Embedding {
    /// What is made of the hidden states.
    pub(crate) pooling: Pooling,
    /// Longer texts are truncated to so many tokens; `None` if the files do not say how long they may be.
    pub(crate) max_tokens: Option<usize>,
    /// Whether longer texts are truncated unless a request says otherwise.
    pub(crate) truncates: bool,
    /// Whether spaces around texts are taken off.
    strips: bool,
    /// Whether texts are put in lower case.
    lowers: bool,
    /// What is put in front of texts.
    prompt: String,
}

/// A module of `modules.json`.
#[derive(Debug, Deserialize)]
struct Module {
    path: String,
    r#type: String,
}

/// `sentence_bert_config.json`.
#[derive(Debug, Default, Deserialize)]
struct TransformerConfig {
    max_seq_length: Option<usize>,
    do_lower_case: Option<bool>,
}

/// `tokenizer_config.json`, as far as it is read here.
#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    /// Some files have a number that is larger than any integer.
    model_max_length: Option<f64>,
}

/// `config_sentence_transformers.json`, as far as it is read here.
#[derive(Debug, Default, Deserialize)]
struct Prompts {
    #[serde(default)]
    prompts: std::collections::HashMap<String, String>,
    default_prompt_name: Option<String>,
}

/// The configuration of a pooling: flags, or in later files a name.
#[derive(Debug, Deserialize)]
struct PoolingConfig {
    #[serde(default)]
    pooling_mode: Option<String>,
    #[serde(default)]
    include_prompt: Option<bool>,
    #[serde(flatten)]
    flags: serde_json::Map<String, serde_json::Value>,
}

impl Embedding {
    /// LoRAX's way: the hidden state of the first token, as it is.
    fn of_first_token() -> Embedding {
        Embedding {
            pooling: Pooling::Vector { of: PooledRows::First, normalize: false },
            max_tokens: None,
            truncates: false,
            strips: false,
            lowers: false,
            prompt: String::new(),
        }
    }

    /// Reads what a model's folder says.
    pub(crate) fn load(model: &Path) -> Result<Embedding, EmbeddingError> {
        // In a model that is a file there are no others.
        if model.is_file() {
            return Ok(Embedding::of_first_token());
        }
        let Some(modules) = read_if_exists::<Vec<Module>>(&model.join("modules.json"))? else {
            return Ok(Embedding::of_first_token());
        };
        let kind = |module: &Module| module.r#type.rsplit('.').next().unwrap_or_default().to_owned();
        let other = |found: &str| EmbeddingError::Module { found: found.to_owned() };
        let mut modules = modules.iter();
        let transformer = modules.next().filter(|module| kind(module) == "Transformer");
        let transformer = model.join(&transformer.ok_or_else(|| other("a list that begins otherwise"))?.path);
        let pooled = modules.next().filter(|module| kind(module) == "Pooling");
        let pooled = pooled.ok_or_else(|| other("a list without Pooling behind Transformer"))?;
        let mut normalize = false;
        for module in modules {
            match kind(module).as_str() {
                "Normalize" => normalize = true,
                found => return Err(other(found)),
            }
        }
        let prompts: Prompts =
            read_if_exists(&model.join("config_sentence_transformers.json"))?.unwrap_or_default();
        let prompt = prompts.default_prompt_name.and_then(|name| prompts.prompts.get(&name).cloned());
        let prompt = prompt.unwrap_or_default();
        let of = pooled_rows(&model.join(&pooled.path).join("config.json"), !prompt.is_empty())?;
        let config: TransformerConfig =
            read_if_exists(&transformer.join("sentence_bert_config.json"))?.unwrap_or_default();
        let tokenizer: TokenizerConfig =
            read_if_exists(&transformer.join("tokenizer_config.json"))?.unwrap_or_default();
        let of_tokenizer =
            tokenizer.model_max_length.filter(|most| (1.0..1e9).contains(most)).map(|most| most as usize);
        Ok(Embedding {
            pooling: Pooling::Vector { of, normalize },
            max_tokens: config.max_seq_length.or(of_tokenizer),
            truncates: true,
            strips: true,
            lowers: config.do_lower_case == Some(true),
            prompt,
        })
    }

    /// The text that is tokenized for a text.
    pub(crate) fn prepare(&self, text: &str) -> String {
        let text = format!("{}{text}", self.prompt);
        let text = if self.strips { text.trim().to_owned() } else { text };
        if self.lowers { text.to_lowercase() } else { text }
    }
}

/// Reads a configuration of pooling.
fn pooled_rows(path: &Path, has_prompt: bool) -> Result<PooledRows, EmbeddingError> {
    let config: PoolingConfig = json_file::read(path)?;
    let refused = |found: String| Err(EmbeddingError::Pooling { path: path.into(), found });
    if config.include_prompt == Some(false) && has_prompt {
        return refused("include_prompt false".into());
    }
    let set = config.flags.iter().filter(|(name, value)| name.starts_with("pooling_mode_") && *value == true);
    let set = set.map(|(name, _)| name.trim_start_matches("pooling_mode_").trim_end_matches("_token"));
    // The mean is on unless something is said of it.
    let silent = config.pooling_mode.is_none() && !config.flags.contains_key("pooling_mode_mean_tokens");
    let mean = silent.then(|| "mean_tokens".to_owned());
    let modes: Vec<String> = set.map(str::to_owned).chain(config.pooling_mode).chain(mean).collect();
    match modes.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["cls"] => Ok(PooledRows::First),
        ["mean" | "mean_tokens"] => Ok(PooledRows::Mean),
        ["lasttoken"] => Ok(PooledRows::Last),
        _ => refused(modes.join(" + ")),
    }
}
