//! Where to look for adapters, as flags and the environment say.

use std::{io, path::PathBuf};

use crate::{
    NameError,
    bucket::BucketSettings,
    hub::{HubError, HubSettings, flag},
};

/// How to reach each source.
#[derive(Debug, Clone)]
pub struct SourceSettings {
    /// The folder below which relative names of the source `local` are looked up (`--adapter-dir`).
    pub adapter_dir: Option<PathBuf>,
    /// Further folders that adapters may be read from (`--adapter-roots`).
    pub adapter_roots: Vec<PathBuf>,
    /// The hub. Its token is the server's own, which is used for adapters only if `use_hub_token` is set.
    pub hub: HubSettings,
    /// Buckets, of which requests may name none unless some are added here.
    pub buckets: BucketSettings,
    /// Whether a request without a credential asks the hub with the server's own token
    /// (`LORAX_USE_GLOBAL_HF_TOKEN=1`).
    pub use_hub_token: bool,
}

/// Why the sources cannot be used as they are set.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// No connection to a hub can be made with these settings.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// A text names no bucket.
    #[error("--adapter-buckets {0}: {1}")]
    Bucket(String, NameError),
    /// The value of a variable is not an address.
    #[error("{0} is not a URL")]
    Url(&'static str),
    /// A folder cannot be read.
    #[error("{}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl SourceSettings {
    /// What flags name, and what the environment says of the rest.
    pub fn from_env(adapter_dir: Option<PathBuf>, adapter_roots: Vec<PathBuf>) -> SourceSettings {
        let use_hub_token = flag("LORAX_USE_GLOBAL_HF_TOKEN");
        let (hub, buckets) = (HubSettings::from_env(), BucketSettings::from_env(Vec::new()));
        SourceSettings { adapter_dir, adapter_roots, hub, buckets, use_hub_token }
    }

    /// The same, with buckets that requests may name (`--adapter-buckets`).
    pub fn with_buckets(mut self, allowed: &[String]) -> Result<SourceSettings, SettingsError> {
        for text in allowed {
            self.buckets
                .allowed
                .push(text.parse().map_err(|fault| SettingsError::Bucket(text.clone(), fault))?);
        }
        Ok(self)
    }
}
