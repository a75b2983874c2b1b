//! The settings of every shard.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::{
    ConfigError,
    values::{bytes, spell_bytes, spell_number, within},
};

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// A GPU if this build and this machine have one, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
}

/// Type of weights and of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// IEEE single.
    #[value(alias = "float")]
    Float32,
    /// The upper half of an IEEE single.
    Bfloat16,
    /// IEEE half.
    #[value(alias = "half")]
    Float16,
}

/// The settings of every shard; `None` lets the shard choose.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardConfig {
    /// Type of weights and of the KV cache [default: bfloat16]
    #[arg(long, env)]
    pub dtype: Option<Dtype>,
    /// Where to compute
    #[arg(long, env, default_value = "auto")]
    pub device: Device,
    /// Threads of a shard that compute on a CPU [default: all cores, divided among the shards]
    #[arg(long, env)]
    pub threads: Option<usize>,
    /// Run each shard on the CPUs near its GPU, or without GPUs each of several shards on cores of its own
    #[arg(long, env, default_value_t = true, action = ArgAction::Set)]
    pub pin_cpus: bool,
    /// Sequences that run at the same time
    #[arg(long, env, visible_alias = "max-num-seqs", default_value_t = 128)]
    pub max_batch_size: usize,
    /// Memory of each shard's KV cache, such as 2GiB [default: on a GPU all that is left, else a quarter of what is available]
    #[arg(long, env, value_name = "BYTES", value_parser = bytes)]
    pub kv_memory: Option<u64>,
    /// Fraction of a GPU's memory to use
    #[arg(long, env, visible_alias = "gpu-memory-utilization", default_value_t = 0.9)]
    pub cuda_memory_fraction: f32,
    /// Launch the kernels of decode steps one by one, without CUDA graphs
    #[arg(
        long,
        env,
        visible_alias = "enforce-eager",
        default_value_t = false,
        action = ArgAction::Set,
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    pub eager: bool,

    /// Folder of the adapters that requests name by relative paths
    #[arg(long, env)]
    pub adapter_dir: Option<PathBuf>,
    /// Further folders that adapters may be read from by absolute paths
    #[arg(long, env, value_delimiter = ',', action = ArgAction::Append)]
    pub adapter_roots: Vec<PathBuf>,
    /// Adapters on the device at the same time
    #[arg(long, env, visible_alias = "max-loras", default_value_t = 128)]
    pub max_active_adapters: usize,
    /// Fraction for adapters of the GPU memory that the weights leave
    #[arg(long, env, default_value_t = 0.1)]
    pub adapter_memory_fraction: f32,
    /// Host memory of each shard for adapters, such as 4GiB
    #[arg(long, env, value_name = "BYTES", value_parser = bytes, default_value = "4GiB")]
    pub adapter_host_memory: u64,
}

/// More memory than any machine has: sums of such sizes do not overflow.
const MOST_BYTES: u64 = 1 << 50;

impl ShardConfig {
    /// Refuses values that cannot work.
    pub fn check(&self) -> Result<(), ConfigError> {
        for (flag, value, bounds) in [
            ("--max-batch-size", self.max_batch_size, (1, 1 << 16)),
            ("--max-active-adapters", self.max_active_adapters, (0, 1 << 16)),
            ("--threads", self.threads.unwrap_or(1), (1, 1 << 10)),
        ] {
            within(flag, value, bounds, spell_number)?;
        }
        for (flag, value) in [
            ("--kv-memory", self.kv_memory.unwrap_or_default()),
            ("--adapter-host-memory", self.adapter_host_memory),
        ] {
            within(flag, value, (0, MOST_BYTES), spell_bytes)?;
        }
        for (flag, value) in [
            ("--cuda-memory-fraction", self.cuda_memory_fraction),
            ("--adapter-memory-fraction", self.adapter_memory_fraction),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return Err(ConfigError::Fraction(flag));
            }
        }
        Ok(())
    }
}

impl Default for ShardConfig {
    fn default() -> ShardConfig {
        crate::defaults()
    }
}
