//! The router's part of the run configuration, which the launcher writes and all its children read.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
}

/// The whole file; sections of other processes are skipped.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    /// The model.
    pub model: ModelConfig,
    /// All shards.
    pub shards: ShardsConfig,
    /// What the router reads.
    pub router: RouterConfig,
}

/// The model to serve.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// As the user named it.
    pub id: String,
    /// A folder in Hugging Face layout, or a GGUF file.
    pub path: PathBuf,
    /// The revision that was asked for.
    pub revision: Option<String>,
    /// The commit that it led to.
    pub sha: Option<String>,
}

/// Where the shards are.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardsConfig {
    /// Unix socket of every rank.
    pub uds: Vec<PathBuf>,
}

/// What the router reads; `None` is chosen by what the shards can do.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterConfig {
    /// Address to listen on.
    pub hostname: String,
    /// Port to listen on; 0 for any.
    pub port: u16,
    /// Requests at the same time.
    pub max_concurrent_requests: usize,
    /// Stop sequences of one request.
    pub max_stop_sequences: usize,
    /// Tokens of a prompt.
    pub max_input_length: Option<usize>,
    /// Tokens of prompt and output together.
    pub max_total_tokens: Option<usize>,
    /// Most prompt tokens in one step; if none, as many as it may have rows.
    pub max_batch_prefill_tokens: Option<usize>,
    /// Reuse keys and values of equal prefixes.
    pub prefix_caching: bool,
    /// Where adapters come from unless a request says otherwise.
    pub default_adapter_source: String,
    /// Threads that tokenize.
    pub validation_workers: usize,
    /// Largest request body.
    pub max_body_bytes: usize,
    /// Seconds that streams may take to finish on shutdown.
    pub shutdown_deadline_s: u64,
    /// Replaces the model's tokenizer_config.json.
    pub tokenizer_config_path: Option<PathBuf>,
    /// Origins that browsers may call from; "*" for any.
    pub cors_allow_origin: Vec<String>,
    /// Log JSON lines.
    pub json_output: bool,
}

impl Config {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Config, ConfigError> {
        let text = fs::read(path).map_err(|source| ConfigError::Io { path: path.into(), source })?;
        serde_json::from_slice(&text).map_err(|source| ConfigError::Json { path: path.into(), source })
    }
}
