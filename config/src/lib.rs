//! The run configuration of a server: one type for the launcher, which fills it from flags and environment and writes
//! it to a file, and for the router and the shards, which read that file.
//!
//! A setting is declared once, as a field of [`RouterConfig`], [`ShardConfig`] or [`LogConfig`]. The field's name is
//! the flag (`max_batch_size` is `--max-batch-size`), the environment variable (`MAX_BATCH_SIZE`) and the key in the
//! file; its doc comment is the text of `--help`; its bounds are in the `check` beside it.

mod devices;
mod error;
mod log;
mod router;
mod shard;
mod values;

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use clap::Args;
use serde::{Deserialize, Serialize};

pub use devices::{Devices, Division, Gpu};
pub use error::ConfigError;
pub use log::LogConfig;
pub use router::{MetricNames, PrefixCacheScope, RouterConfig};
pub use shard::{Device, Dtype, ShardConfig};

/// The run configuration of a server.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The model.
    pub model: ModelConfig,
    /// The shards, by rank.
    pub shards: ShardsConfig,
    /// The router's settings.
    pub router: RouterConfig,
    /// The settings of every shard.
    pub shard: ShardConfig,
    /// How all processes log.
    pub log: LogConfig,
}

/// The model to serve, once its files are on this machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The model as the user named it, without the revision.
    pub id: String,
    /// A folder in Hugging Face layout, or a GGUF file.
    pub path: PathBuf,
    /// The folder of an adapter that is merged into the weights.
    pub merged_adapter: Option<PathBuf>,
    /// The revision that the user asked for.
    pub revision: Option<String>,
    /// The commit to which the revision led.
    pub sha: Option<String>,
}

/// The shards of the model: one for each rank of its group.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardsConfig {
    /// The Unix socket at which each rank serves the router.
    pub uds: Vec<PathBuf>,
    /// The folder in which the ranks find each other. It is this user's alone, and empty when the ranks start.
    pub rendezvous: PathBuf,
}

impl Config {
    /// Reads a configuration and checks its values.
    pub fn read(path: &Path) -> Result<Config, ConfigError> {
        let text = fs::read(path).map_err(|source| ConfigError::Io { path: path.into(), source })?;
        let config: Config = serde_json::from_slice(&text)
            .map_err(|source| ConfigError::Json { path: path.into(), source })?;
        config.check()?;
        Ok(config)
    }

    /// Writes a new file that only its owner may read, because it holds the API keys.
    pub fn write(&self, path: &Path) -> Result<(), ConfigError> {
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)
        };
        write().map_err(|source| ConfigError::Io { path: path.into(), source })
    }

    /// Refuses values that cannot work.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.router.check()?;
        self.shard.check()
    }

    /// The socket of a rank.
    pub fn socket(&self, rank: usize) -> Result<&Path, ConfigError> {
        let ranks = self.ranks();
        self.shards.uds.get(rank).map(PathBuf::as_path).ok_or(ConfigError::Rank { rank, ranks })
    }

    /// Where the adapter of `--adapter-id` comes from.
    pub fn adapter_source(&self) -> &str {
        self.router.adapter_source_beside(&self.shard)
    }

    /// Where the adapters of requests come from that do not say.
    pub fn default_adapter_source(&self) -> &str {
        self.router.default_adapter_source.as_deref().unwrap_or_else(|| self.adapter_source())
    }

    /// The number of ranks of the group.
    pub fn ranks(&self) -> usize {
        self.shards.uds.len()
    }

    /// The rows of the largest step, where `--max-batch-prefill-tokens` bounds it: all prompt tokens and one decode row
    /// of every sequence.
    pub fn max_rows(&self) -> Option<usize> {
        self.router.max_batch_prefill_tokens.map(|tokens| tokens + self.shard.max_batch_size)
    }
}

/// What a group of flags is when no flag is given, whatever the environment says.
fn defaults<T: Args>() -> T {
    let command = T::augment_args(clap::Command::new("defaults"))
        .mut_args(|arg| arg.env(clap::builder::Resettable::<clap::builder::OsStr>::Reset));
    let matches = command.get_matches_from(["defaults"]);
    T::from_arg_matches(&matches).expect("every flag of a configuration has a default")
}
