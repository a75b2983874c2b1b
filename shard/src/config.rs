//! The shard's part of the run configuration, which the launcher writes and all its children read.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use kernels::DType;
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
    /// There is no socket for this rank.
    #[error("rank {rank} of {world} shards")]
    Rank {
        /// The rank that was asked for.
        rank: usize,
        /// How many there are.
        world: usize,
    },
}

/// The whole file; sections of other processes are skipped.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    /// The model.
    pub model: ModelConfig,
    /// All shards.
    pub shards: ShardsConfig,
    /// What shards read.
    pub shard: ShardConfig,
}

/// The model to serve.
#[derive(Debug, Clone, Deserialize)]
pub struct ModelConfig {
    /// A folder in Hugging Face layout, or a GGUF file.
    pub path: PathBuf,
}

/// Where the shards are.
#[derive(Debug, Clone, Deserialize)]
pub struct ShardsConfig {
    /// Unix socket of every rank.
    pub uds: Vec<PathBuf>,
}

/// Type of weights and KV memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE single.
    Float32,
    /// Upper half of an IEEE single.
    Bfloat16,
    /// IEEE half.
    Float16,
}

impl Precision {
    /// The kernels' name for it.
    pub fn dtype(self) -> DType {
        match self {
            Precision::Float32 => DType::F32,
            Precision::Bfloat16 => DType::Bf16,
            Precision::Float16 => DType::F16,
        }
    }

    /// As in the configuration.
    pub fn name(dtype: DType) -> &'static str {
        match dtype {
            DType::F32 => "float32",
            DType::Bf16 => "bfloat16",
            DType::F16 => "float16",
        }
    }
}

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// This machine's processor.
    Cpu,
    /// The best there is.
    Auto,
    /// An NVIDIA GPU.
    Cuda,
}

/// What shards read; `None` lets the shard choose.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardConfig {
    /// Type of weights and KV memory.
    pub dtype: Option<Precision>,
    /// Where to compute.
    pub device: Device,
    /// Threads that compute.
    pub threads: Option<usize>,
    /// Largest step in rows.
    pub max_rows: Option<usize>,
    /// Sequences that can run at the same time.
    pub max_sequences: Option<usize>,
    /// Rows of one step whose logits can be computed.
    pub max_logit_rows: Option<usize>,
    /// Adapters on the device.
    pub num_slots: Option<usize>,
    /// Bytes of KV memory.
    pub kv_memory_bytes: Option<u64>,
    /// Bytes of adapters on the device; 0 for no bound but the slots.
    pub adapter_memory_bytes: Option<u64>,
    /// Bytes of adapters in host memory.
    pub adapter_host_bytes: Option<u64>,
    /// Folder of adapters that are named by relative paths.
    pub adapter_dir: Option<PathBuf>,
    /// Folders that adapters may be read from by absolute paths.
    pub adapter_roots: Vec<PathBuf>,
    /// Whether decode steps are launched kernel by kernel where a device could record them.
    pub eager: bool,
    /// Fraction of a GPU's memory to use.
    pub cuda_memory_fraction: f32,
    /// Fraction of that for adapters.
    pub adapter_memory_fraction: f32,
    /// Log as JSON lines.
    pub json_output: bool,
}

impl Config {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Config, ConfigError> {
        let text = fs::read(path).map_err(|source| ConfigError::Io { path: path.into(), source })?;
        serde_json::from_slice(&text).map_err(|source| ConfigError::Json { path: path.into(), source })
    }

    /// The socket of a rank.
    pub fn socket(&self, rank: usize) -> Result<&Path, ConfigError> {
        let world = self.shards.uds.len();
        self.shards.uds.get(rank).map(PathBuf::as_path).ok_or(ConfigError::Rank { rank, world })
    }
}
