//! What can be wrong with a configuration.

use std::{io, path::PathBuf};

/// Why a configuration was refused. A value is named by its flag, because that is where users set it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not a configuration.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// There is no such rank.
    #[error("--rank {rank}: the configuration has {ranks} ranks, counted from 0")]
    Rank {
        /// The rank that was asked for.
        rank: usize,
        /// The number of ranks.
        ranks: usize,
    },
    /// A value is below its bound.
    #[error("{flag} must be at least {least}")]
    TooSmall {
        /// The flag.
        flag: &'static str,
        /// The bound, with its unit.
        least: String,
    },
    /// A value is above its bound.
    #[error("{flag} must be at most {most}")]
    TooLarge {
        /// The flag.
        flag: &'static str,
        /// The bound, with its unit.
        most: String,
    },
    /// A fraction is not one.
    #[error("{0} must be between 0 and 1")]
    Fraction(&'static str),
    /// No room is left for an answer.
    #[error("--max-input-length {input} must be less than --max-total-tokens {total}")]
    NoOutput {
        /// Tokens of a prompt.
        input: usize,
        /// Tokens of prompt and output together.
        total: usize,
    },
    /// There is no adapter to merge.
    #[error("--merge-adapter-weights needs --adapter-id, the adapter to merge")]
    NoMergedAdapter,
    /// Adapters cannot come from there.
    #[error("{flag} {name:?}: it must be local, hub, s3, gs, az, or pbase")]
    AdapterSource {
        /// The flag.
        flag: &'static str,
        /// Its value.
        name: String,
    },
    /// A name of the model that could name nothing.
    #[error("--served-model-name {0:?}: a name must have a character, and none that cannot be seen")]
    ServedModelName(String),
    /// An API key that no client could send. The key is not told, only which of them it is.
    #[error("--api-key: key {0} must be visible ASCII characters, at least one")]
    ApiKey(usize),
    /// The same of the administrator's.
    #[error("--admin-token must be visible ASCII characters, at least one")]
    AdminToken,
}
