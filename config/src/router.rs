//! The router's settings.

use std::{path::PathBuf, time::Duration};

use clap::{ArgAction, Args, ValueEnum, builder::BoolishValueParser};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use crate::{
    ConfigError, ShardConfig,
    values::{
        address_of_environment, as_optional_seconds, as_plain_secrets, as_seconds, bytes, seconds,
        spell_bytes, spell_number, spell_seconds, within,
    },
};

/// Whose requests may share blocks of the prefix cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrefixCacheScope {
    /// Requests of one tenant share blocks: no tenant learns from the time of its first token what others have sent.
    Tenant,
    /// Requests of all tenants share the blocks of the base model and of adapters that need no credential.
    All,
}

/// A set of names under which `GET /metrics` reports what the router knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MetricNames {
    /// The server's own.
    Native,
    /// Those of vLLM, which dashboards and the schedulers of clusters read.
    Vllm,
    /// Those of LoRAX that are not the server's own.
    Legacy,
}

/// The router's settings; `None` lets the router choose by what the shards can do.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterConfig {
    /// Address to listen on; the environment's HOSTNAME only if it is one, as containers keep their names there
    #[arg(long, visible_alias = "host", default_value_t = address_of_environment())]
    pub hostname: String,
    /// Port to listen on; 0 for any that is free
    #[arg(long, short, env, default_value_t = 3000)]
    pub port: u16,
    /// Names of the base model in OpenAI's interface, of which answers report the first [default: the name of the
    /// repository, the folder or the file]
    #[arg(long, env, value_name = "NAME", value_delimiter = ',', num_args = 1.., action = ArgAction::Append)]
    pub served_model_name: Vec<String>,
    /// Origins that browsers may call from; "*" for any
    #[arg(long, env, visible_alias = "allowed-origins", value_delimiter = ',', action = ArgAction::Append)]
    pub cors_allow_origin: Vec<String>,
    /// Methods that pages of these origins may use [default: any]
    #[arg(long, env, value_name = "METHOD", value_delimiter = ',', action = ArgAction::Append)]
    pub cors_allow_method: Vec<String>,
    /// Headers that they may send [default: any]
    #[arg(long, env, value_name = "HEADER", value_delimiter = ',', action = ArgAction::Append)]
    pub cors_allow_header: Vec<String>,
    /// Headers of responses that they may read [default: any, or with credentials those that the server has]
    #[arg(long, env, value_name = "HEADER", value_delimiter = ',', action = ArgAction::Append)]
    pub cors_expose_header: Vec<String>,
    /// Whether they may send cookies and other credentials
    #[arg(long, env, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub cors_allow_credentials: bool,
    /// Connections at the same time
    #[arg(long, env, default_value_t = 16384)]
    pub max_connections: usize,
    /// Connections of one client address at the same time [default: half of max-connections]
    #[arg(long, env)]
    pub max_connections_per_address: Option<usize>,
    /// Largest request body
    #[arg(long, env, value_name = "BYTES", value_parser = bytes, default_value = "2MiB")]
    pub max_body_size: u64,
    /// Memory for the bodies of all requests that have not been read to their end or parsed
    #[arg(long, env, value_name = "BYTES", value_parser = bytes, default_value = "128MiB")]
    pub max_body_memory: u64,
    /// Seconds in which a client must have sent the whole of its body
    #[arg(long, env, value_name = "SECONDS", value_parser = seconds, default_value = "30")]
    #[serde(with = "as_seconds")]
    pub body_timeout: Duration,
    /// Threads that serve connections
    #[arg(long, env, default_value_t = 2)]
    pub router_threads: usize,

    /// A key that clients must send as `Authorization: Bearer KEY`; several are separated by commas, and each is a
    /// tenant of its own, of weight 1. Without any key everybody may ask. The environment variable hides keys from
    /// other users of this machine
    #[arg(
        long = "api-key",
        env = "LORAX_API_KEY",
        hide_env_values = true,
        value_name = "KEY",
        value_delimiter = ',',
        action = ArgAction::Append
    )]
    #[serde(serialize_with = "as_plain_secrets::serialize")]
    pub api_keys: Vec<SecretString>,
    /// File of keys with their tenants, weights and limits
    #[arg(long, env, value_name = "PATH")]
    pub api_key_file: Option<PathBuf>,

    /// Requests at the same time; above it they are answered with 429
    #[arg(long, env, default_value_t = 1024)]
    pub max_concurrent_requests: usize,
    /// Answers to one prompt of which `best_of` tells the best, on LoRAX's routes
    #[arg(long, env, default_value_t = 2)]
    pub max_best_of: usize,
    /// Prompts of one request
    #[arg(long, env, default_value_t = 128)]
    pub max_client_batch_size: usize,
    /// Seconds in which a request must have its whole answer [default: no bound]
    #[arg(long, env, value_name = "SECONDS", value_parser = seconds)]
    #[serde(with = "as_optional_seconds")]
    pub request_timeout: Option<Duration>,
    /// Stop sequences of one request
    #[arg(long, env, default_value_t = 4)]
    pub max_stop_sequences: usize,
    /// Tokens of a prompt [default: max-total-tokens - 1]
    #[arg(long, env)]
    pub max_input_length: Option<usize>,
    /// Tokens of prompt and output together; lowered, with a warning, to what fits [default: what the model's positions
    /// and the memory of the KV cache allow]
    #[arg(long, env, visible_alias = "max-model-len")]
    pub max_total_tokens: Option<usize>,
    /// Most prompt tokens in one step, which begins with 512 and has slowly more while prompts wait [default: no bound]
    #[arg(long, env, visible_alias = "max-num-batched-tokens")]
    pub max_batch_prefill_tokens: Option<usize>,
    /// Reuse keys and values of equal prefixes
    #[arg(
        long,
        env,
        visible_alias = "enable-prefix-caching",
        default_value_t = true,
        action = ArgAction::Set,
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    pub prefix_caching: bool,
    /// Whose requests may share blocks of the prefix cache
    #[arg(long, env, default_value = "tenant")]
    pub prefix_cache_scope: PrefixCacheScope,
    /// Sets of names of metrics
    #[arg(long, env, value_name = "NAMES", value_delimiter = ',', default_value = "native,vllm,legacy")]
    pub metrics: Vec<MetricNames>,
    /// Adapters that metrics show by name, those that are used most; also tenants
    #[arg(long, env, value_name = "NUMBER", default_value_t = 50)]
    pub metrics_top: usize,
    /// Threads that tokenize
    #[arg(long, env, default_value_t = 2)]
    pub validation_workers: usize,
    /// Replaces the model's tokenizer_config.json; a chat template in it goes before all of the model's
    #[arg(long, env)]
    pub tokenizer_config_path: Option<PathBuf>,
    /// Where the adapter of --adapter-id comes from, and those of requests that do not say: local, hub, s3, gs, az, or
    /// pbase [default: local with adapter-dir, otherwise hub]
    #[arg(long, env)]
    pub adapter_source: Option<String>,
    /// Where the adapters of requests that do not say come from [default: adapter-source]
    #[arg(long, env, value_name = "SOURCE")]
    pub default_adapter_source: Option<String>,
    /// Buckets that adapters may be read from, or prefixes in them, such as s3://bucket/team; they are read with the
    /// server's own credentials
    #[arg(long, env, value_delimiter = ',', action = ArgAction::Append)]
    pub adapter_buckets: Vec<String>,
    /// Seconds for which a source's answer, that a credential may read an adapter, is used again; 0 asks every time
    #[arg(long, env, value_name = "SECONDS", value_parser = seconds, default_value = "60")]
    #[serde(with = "as_seconds")]
    pub adapter_auth_ttl_s: Duration,
    /// Folder of the adapters that were downloaded, which several servers may share [default: lorax/adapters in the
    /// user's cache folder]
    #[arg(long, env, value_name = "PATH")]
    pub adapter_cache: Option<PathBuf>,
    /// Bytes that adapters may take in this folder
    #[arg(long, env, value_name = "BYTES", value_parser = bytes, default_value = "64GiB")]
    pub adapter_cache_size: u64,
    /// Largest adapter, by its files; larger ones are refused before they are read [default: a quarter of
    /// adapter-host-memory, but 512MiB if those fit]
    #[arg(long, env, value_name = "BYTES", value_parser = bytes)]
    pub max_adapter_size: Option<u64>,
    /// Questions to one source at the same time, of which one tenant may have half; as many again may be slow
    #[arg(long, env, default_value_t = 32)]
    pub max_adapter_lookups: u32,
    /// Downloads from one source at the same time, counted likewise
    #[arg(long, env, default_value_t = 16)]
    pub max_adapter_downloads: u32,
    /// Adapters of one source that are read into host memory at the same time, counted likewise
    #[arg(long, env, default_value_t = 8)]
    pub max_adapter_stages: u32,
    /// The adapter of requests that name none, kept in host memory; `__base_model__` still names the base model
    #[arg(long, env, value_name = "ID")]
    pub adapter_id: Option<String>,
    /// Merge this adapter into the weights of the model when it is loaded, instead of adding it to requests: the model is
    /// the merged one then, for all requests, and their adapters are added to it
    #[arg(
        long,
        env,
        default_value_t = false,
        action = ArgAction::Set,
        value_parser = BoolishValueParser::new(),
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    pub merge_adapter_weights: bool,
    /// Adapters to keep in host memory from the start; several are separated by commas. All others are loaded when
    /// requests name them, as without this flag
    #[arg(long, env, value_name = "ID", value_delimiter = ',', action = ArgAction::Append)]
    pub preloaded_adapter_ids: Vec<String>,
    /// Where these come from [default: adapter-source]
    #[arg(long, env, value_name = "SOURCE")]
    pub preloaded_adapter_source: Option<String>,
    /// Adapters with names of their own, as vLLM has them: `NAME=PATH`, or `{"name": NAME, "path": PATH}`
    #[arg(long, env, value_name = "NAME=PATH", num_args = 1.., action = ArgAction::Append)]
    pub lora_modules: Vec<String>,
    /// Largest LoRA rank that is served [default: no bound]
    #[arg(long, env, value_name = "RANK")]
    pub max_lora_rank: Option<u32>,
    /// Has no effect, because adapters are always enabled; for command lines of vLLM
    #[arg(long, env, action = ArgAction::SetTrue)]
    pub enable_lora: bool,
    /// Has no effect, because adapter-host-memory bounds the bytes of adapters in host memory; for command lines of vLLM
    #[arg(long, env, value_name = "COUNT")]
    pub max_cpu_loras: Option<u32>,
    /// File that keeps the adapters that were registered over HTTP, for the next start [default: none]
    #[arg(long, env, value_name = "PATH")]
    pub adapter_manifest: Option<PathBuf>,
    /// The key of the routes that register and remove adapters, sent as `Authorization: Bearer KEY`. Without it whoever
    /// may use the server may use these. The environment variable hides it from other users of this machine
    #[arg(long, env = "LORAX_ADMIN_TOKEN", hide_env_values = true, value_name = "KEY")]
    #[serde(serialize_with = "as_plain_secrets::optional")]
    pub admin_token: Option<SecretString>,
    /// File that records where adapters were and went, to be played again; it has no names and no secrets
    #[arg(long, env, value_name = "PATH")]
    pub adapter_trace: Option<PathBuf>,

    /// Seconds that a step may take before the shards are taken to hang [default: 20 times the longest step of the
    /// warm-up, at least 10]
    #[arg(long, env, value_name = "SECONDS", value_parser = seconds)]
    #[serde(with = "as_optional_seconds")]
    pub step_timeout: Option<Duration>,
    /// Seconds that an adapter may take to be found and read before its requests fail
    #[arg(long, env, value_name = "SECONDS", value_parser = seconds, default_value = "60")]
    #[serde(with = "as_seconds")]
    pub prepare_timeout: Duration,
    /// Seconds after which a busy adapter leaves its slot to others that wait, and after which one that waits for a slot
    /// gets it out of turn
    #[arg(long, env, value_name = "SECONDS", value_parser = seconds, default_value = "2")]
    #[serde(with = "as_seconds")]
    pub adapter_cycle_time_s: Duration,
    /// Seconds between SIGTERM, from which on the server calls itself not ready, and the end of accepting connections
    #[arg(long, env, value_name = "SECONDS", value_parser = seconds, default_value = "0")]
    #[serde(with = "as_seconds")]
    pub shutdown_delay: Duration,
    /// Seconds that streams may take to finish on shutdown
    #[arg(long, env, value_name = "SECONDS", value_parser = seconds, default_value = "30")]
    #[serde(with = "as_seconds")]
    pub shutdown_deadline: Duration,
}

/// Bodies are held in memory, and a file as large is no prompt.
const MOST_BODY: u64 = 1 << 30;
/// Sources of adapters.
const ADAPTER_SOURCES: [&str; 6] = ["local", "hub", "s3", "gs", "az", "pbase"];
/// More bytes than any machine has: sums of such sizes do not overflow.
const MOST_BYTES: u64 = 1 << 50;
/// Over a century: sums of such durations do not overflow, and a timer takes them.
const LONGEST: Duration = Duration::from_secs(1 << 32);
/// The shortest deadline of work that is healthy.
const SHORTEST: Duration = Duration::from_millis(1);

impl RouterConfig {
    /// Connections of one client address at the same time.
    pub fn connections_per_address(&self) -> usize {
        self.max_connections_per_address.unwrap_or(self.max_connections.div_ceil(2))
    }

    /// Where the adapter of `--adapter-id` comes from, with these settings of the shards.
    pub fn adapter_source_beside(&self, shard: &ShardConfig) -> &str {
        let otherwise = if shard.adapter_dir.is_some() { "local" } else { "hub" };
        self.adapter_source.as_deref().unwrap_or(otherwise)
    }

    /// The adapter of requests that name none.
    pub fn default_adapter(&self) -> Option<&str> {
        self.adapter_id.as_deref().filter(|id| !id.is_empty() && !self.merge_adapter_weights)
    }

    /// The adapter that is merged into the model's weights.
    pub fn merged_adapter(&self) -> Option<&str> {
        self.adapter_id.as_deref().filter(|id| !id.is_empty() && self.merge_adapter_weights)
    }

    /// Refuses values that cannot work.
    pub fn check(&self) -> Result<(), ConfigError> {
        for (flag, value, bounds) in [
            ("--max-concurrent-requests", self.max_concurrent_requests, (1, 1 << 20)),
            ("--max-best-of", self.max_best_of, (1, 1 << 7)),
            ("--max-client-batch-size", self.max_client_batch_size, (1, 1 << 16)),
            ("--max-stop-sequences", self.max_stop_sequences, (0, 1 << 10)),
            ("--validation-workers", self.validation_workers, (1, 1 << 10)),
            ("--metrics-top", self.metrics_top, (0, 1000)),
            ("--router-threads", self.router_threads, (1, 1 << 10)),
            ("--max-connections", self.max_connections, (1, 1 << 20)),
            ("--max-connections-per-address", self.connections_per_address(), (1, 1 << 20)),
            ("--max-input-length", self.max_input_length.unwrap_or(1), (1, usize::MAX)),
            ("--max-total-tokens", self.max_total_tokens.unwrap_or(2), (2, usize::MAX)),
            ("--max-batch-prefill-tokens", self.max_batch_prefill_tokens.unwrap_or(1), (1, 1 << 20)),
            ("--max-adapter-lookups", self.max_adapter_lookups as usize, (1, 1 << 10)),
            ("--max-adapter-downloads", self.max_adapter_downloads as usize, (1, 1 << 10)),
            ("--max-adapter-stages", self.max_adapter_stages as usize, (1, 1 << 10)),
            ("--max-lora-rank", self.max_lora_rank.unwrap_or(1) as usize, (1, 1 << 16)),
        ] {
            within(flag, value, bounds, spell_number)?;
        }
        within("--max-body-size", self.max_body_size, (1, MOST_BODY), spell_bytes)?;
        // Less would never let the largest body in.
        let memory = (self.max_body_size, 1 << 50);
        within("--max-body-memory", self.max_body_memory, memory, spell_bytes)?;
        within("--adapter-cache-size", self.adapter_cache_size, (0, MOST_BYTES), spell_bytes)?;
        within("--max-adapter-size", self.max_adapter_size.unwrap_or(1), (1, MOST_BYTES), spell_bytes)?;
        for (flag, value, least) in [
            ("--body-timeout", self.body_timeout, SHORTEST),
            ("--request-timeout", self.request_timeout.unwrap_or(SHORTEST), SHORTEST),
            ("--step-timeout", self.step_timeout.unwrap_or(SHORTEST), SHORTEST),
            ("--prepare-timeout", self.prepare_timeout, SHORTEST),
            ("--adapter-auth-ttl-s", self.adapter_auth_ttl_s, Duration::ZERO),
            ("--adapter-cycle-time-s", self.adapter_cycle_time_s, SHORTEST),
            ("--shutdown-delay", self.shutdown_delay, Duration::ZERO),
            ("--shutdown-deadline", self.shutdown_deadline, Duration::ZERO),
        ] {
            within(flag, value, (least, LONGEST), spell_seconds)?;
        }
        if let (Some(input), Some(total)) = (self.max_input_length, self.max_total_tokens)
            && input >= total
        {
            return Err(ConfigError::NoOutput { input, total });
        }
        if self.merge_adapter_weights && self.merged_adapter().is_none() {
            return Err(ConfigError::NoMergedAdapter);
        }
        self.check_sources()?;
        let is_name = |name: &&String| !name.trim().is_empty() && !name.chars().any(char::is_control);
        if let Some(name) = self.served_model_name.iter().find(|name| !is_name(name)) {
            return Err(ConfigError::ServedModelName(name.clone()));
        }
        let sendable = |key: &SecretString| {
            let key = key.expose_secret();
            !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic())
        };
        match self.api_keys.iter().position(|key| !sendable(key)) {
            Some(index) => Err(ConfigError::ApiKey(index + 1)),
            None if !self.admin_token.as_ref().is_none_or(sendable) => Err(ConfigError::AdminToken),
            None => Ok(()),
        }
    }

    fn check_sources(&self) -> Result<(), ConfigError> {
        for (flag, source) in [
            ("--adapter-source", &self.adapter_source),
            ("--default-adapter-source", &self.default_adapter_source),
            ("--preloaded-adapter-source", &self.preloaded_adapter_source),
        ] {
            if let Some(name) = source.as_ref().filter(|name| !ADAPTER_SOURCES.contains(&&***name)) {
                return Err(ConfigError::AdapterSource { flag, name: name.clone() });
            }
        }
        Ok(())
    }
}

impl Default for RouterConfig {
    fn default() -> RouterConfig {
        crate::defaults()
    }
}
