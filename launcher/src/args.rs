//! The launcher's flags: which model, how many shards, and all settings of the run configuration.

use clap::Parser;
use config::{LogConfig, RouterConfig, ShardConfig};

/// Serve one base model and any number of LoRA adapters of it.
#[derive(Debug, Parser)]
#[command(name = "lorax-launcher", version)]
pub(crate) struct Args {
    /// A folder in Hugging Face layout, a GGUF file, or a hub id (`id` or `id@revision`)
    #[arg(long, env)]
    pub(crate) model_id: String,
    /// Revision of a hub id
    #[arg(long, env)]
    pub(crate) revision: Option<String>,
    /// Shards, one per GPU
    #[arg(long, env, default_value_t = 1)]
    pub(crate) num_shard: usize,

    #[command(flatten, next_help_heading = "Computing")]
    pub(crate) shard: ShardConfig,
    #[command(flatten, next_help_heading = "Serving")]
    pub(crate) router: RouterConfig,
    #[command(flatten, next_help_heading = "Logging")]
    pub(crate) log: LogConfig,
}
