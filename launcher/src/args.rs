//! Flags and environment, named as LoRAX names them.

use std::{net::IpAddr, path::PathBuf};

use clap::{ArgAction, Parser, ValueEnum};

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Device {
    /// A GPU if this build and this machine have one, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
}

/// Type of weights and KV memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dtype {
    /// IEEE single.
    Float32,
    /// Upper half of an IEEE single.
    Bfloat16,
    /// IEEE half.
    Float16,
}

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
    /// Type of weights and KV memory [default: bfloat16]
    #[arg(long, env)]
    pub(crate) dtype: Option<Dtype>,
    /// Where to compute
    #[arg(long, env, default_value = "auto")]
    pub(crate) device: Device,
    /// Shards, one per GPU
    #[arg(long, env, default_value_t = 1)]
    pub(crate) num_shard: usize,
    /// Threads that compute on a CPU [default: all cores]
    #[arg(long, env)]
    pub(crate) threads: Option<usize>,

    /// Where adapters come from unless a request says otherwise
    #[arg(long, env, default_value = "local")]
    pub(crate) adapter_source: String,
    /// Folder of adapters that requests name by relative paths
    #[arg(long, env)]
    pub(crate) adapter_dir: Option<PathBuf>,
    /// Further folders that adapters may be read from by absolute paths
    #[arg(long, env, value_delimiter = ',', action = ArgAction::Append)]
    pub(crate) adapter_roots: Vec<PathBuf>,
    /// Adapters on the device at the same time
    #[arg(long, env, default_value_t = 128)]
    pub(crate) max_active_adapters: usize,
    /// Share for adapters of the GPU memory that weights leave
    #[arg(long, env, default_value_t = 0.1)]
    pub(crate) adapter_memory_fraction: f32,
    /// Share of a GPU's memory to use
    #[arg(long, env, default_value_t = 0.9)]
    pub(crate) cuda_memory_fraction: f32,
    /// Launch the kernels of decode steps one by one, without CUDA graphs
    #[arg(long, env, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub(crate) eager: bool,
    /// Memory for keys and values, such as 2GiB [default: on a GPU all that is left, else a quarter of what is available]
    #[arg(long, env, value_parser = bytes)]
    pub(crate) kv_memory: Option<u64>,
    /// Host memory for adapters, such as 4GiB; those in slots may take more
    #[arg(long, env, value_parser = bytes, default_value = "4GiB")]
    pub(crate) adapter_host_memory: u64,

    /// Requests at the same time; above it they are answered with 429
    #[arg(long, env, default_value_t = 1024)]
    pub(crate) max_concurrent_requests: usize,
    /// Stop sequences of one request
    #[arg(long, env, default_value_t = 4)]
    pub(crate) max_stop_sequences: usize,
    /// Tokens of a prompt [default: max-total-tokens - 1]
    #[arg(long, env)]
    pub(crate) max_input_length: Option<usize>,
    /// Tokens of prompt and output together; lowered, with a warning, to what fits [default: what the model's positions
    /// and the memory for keys and values allow]
    #[arg(long, env)]
    pub(crate) max_total_tokens: Option<usize>,
    /// Most prompt tokens in one step, which begins with 512 and has slowly more while prompts wait [default: no bound]
    #[arg(long, env)]
    pub(crate) max_batch_prefill_tokens: Option<usize>,
    /// Sequences that run at the same time
    #[arg(long, env, default_value_t = 128)]
    pub(crate) max_batch_size: usize,
    /// Reuse keys and values of equal prefixes
    #[arg(long, env, default_value_t = true, action = ArgAction::Set)]
    pub(crate) prefix_caching: bool,
    /// Threads that tokenize
    #[arg(long, env, default_value_t = 2)]
    pub(crate) validation_workers: usize,
    /// Largest request body
    #[arg(long, env, value_parser = bytes, default_value = "2MiB")]
    pub(crate) max_body_size: u64,
    /// Replaces the model's tokenizer_config.json; a chat template in it goes before all of the model's
    #[arg(long, env)]
    pub(crate) tokenizer_config_path: Option<PathBuf>,

    /// Address to listen on; the environment's HOSTNAME only if it is one, as containers keep their names there
    #[arg(long, default_value_t = address_of_environment())]
    pub(crate) hostname: String,
    /// Port to listen on; 0 for any that is free
    #[arg(long, short, env, default_value_t = 3000)]
    pub(crate) port: u16,
    /// Origins that browsers may call from
    #[arg(long, env, value_delimiter = ',', action = ArgAction::Append)]
    pub(crate) cors_allow_origin: Vec<String>,
    /// Seconds that streams may take to finish on shutdown
    #[arg(long, env, default_value_t = 30)]
    pub(crate) shutdown_deadline: u64,
    /// Log JSON lines
    #[arg(long, env)]
    pub(crate) json_output: bool,
}

fn address_of_environment() -> String {
    let named = std::env::var("HOSTNAME").ok();
    named.filter(|name| name.parse::<IpAddr>().is_ok()).unwrap_or_else(|| "0.0.0.0".into())
}

/// A number of bytes with an optional unit: `123`, `512MiB`, `2GiB`, `4GB`.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit: u64 = match text[digits..].trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        other => return Err(format!("unknown unit {other:?}, known are B, KB, MB, GB, KiB, MiB, GiB")),
    };
    let number: u64 = text[..digits].parse().map_err(|error| format!("{error}"))?;
    number.checked_mul(unit).ok_or_else(|| "too large".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(bytes("17"), Ok(17));
        assert_eq!(bytes("2GiB"), Ok(2 << 30));
        assert_eq!(bytes("3 MB"), Ok(3_000_000));
        for bad in ["", "GiB", "2TiB", "-1", "1.5GiB", "99999999999GiB"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }
}
