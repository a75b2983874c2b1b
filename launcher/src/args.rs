//! The launcher's flags: which model, how many shards, and all settings of the run configuration.

use clap::{ArgAction, Parser};
use config::{LogConfig, RouterConfig, ShardConfig};
use sources::SourceKind;

use crate::foreign::ForeignFlags;

/// Serve one base model and any number of LoRA adapters of it.
#[derive(Debug, Parser)]
#[command(name = "lorax-launcher", version)]
pub(crate) struct Args {
    /// A folder in Hugging Face layout, a GGUF file, a hub id (`id` or `id@revision`), with one of its GGUF files as
    /// `id:Q4_K_M` or `id/file.gguf`, or a prefix in a bucket (`s3://BUCKET/PREFIX`, `gs://`, `az://`)
    #[arg(long, env, visible_alias = "model")]
    pub(crate) model_id: String,
    /// Where the model comes from: `hub` (or a path that exists), `local`, `s3`, `gs` or `az`. An address such as `s3://`
    /// names its source itself
    #[arg(long, env, default_value_t = SourceKind::Hub)]
    pub(crate) source: SourceKind,
    /// Revision of a hub id
    #[arg(long, env)]
    pub(crate) revision: Option<String>,
    /// Whether to split the model: `true` refuses a single shard, `false` makes it the default
    #[arg(long, env, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub(crate) sharded: Option<bool>,
    /// Shards that the model is split over, at most 8, each a process with a GPU of its own [default: one for each
    /// visible GPU, or as many as the model can be divided among; 1 on a CPU]
    #[arg(long, env, visible_alias = "tensor-parallel-size")]
    pub(crate) num_shard: Option<usize>,
    /// Folder in which the files of hubs are kept [default: that of the hubs' own clients]
    #[arg(long, env, value_name = "PATH", visible_alias = "download-dir")]
    pub(crate) huggingface_hub_cache: Option<String>,
    /// The server's own token for Predibase. The environment variable hides it from other users of this machine
    #[arg(long, env, hide_env_values = true, value_name = "TOKEN")]
    pub(crate) predibase_api_token: Option<String>,
    /// Fetch the model, and end
    #[arg(long, env, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = false)]
    pub(crate) download_only: bool,
    /// Log what this program was built for, before anything else
    #[arg(long, short)]
    pub(crate) env: bool,

    #[command(flatten, next_help_heading = "Computing")]
    pub(crate) shard: ShardConfig,
    #[command(flatten, next_help_heading = "Serving")]
    pub(crate) router: RouterConfig,
    #[command(flatten, next_help_heading = "Logging")]
    pub(crate) log: LogConfig,
    #[command(flatten)]
    pub(crate) foreign: ForeignFlags,
}
