//! Why an adapter cannot be had from its source.

use std::{io, path::PathBuf};

use crate::{Reference, SourceKind};

/// Why an adapter cannot be had. None of these holds a credential, nor an address with a signature in it.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The source has no such adapter, or does not say whether it has.
    #[error("adapter \"{adapter}\" does not exist{hint}")]
    NotFound {
        /// The adapter.
        adapter: Reference,
        /// What else may be the cause, with a separator in front.
        hint: &'static str,
    },
    /// It may not be read.
    #[error("adapter \"{adapter}\" {reason}")]
    Denied {
        /// The adapter.
        adapter: Reference,
        /// Who forbids it.
        reason: Denial,
    },
    /// The source cannot be reached, or failed in the middle.
    #[error("adapter \"{adapter}\": {cause}")]
    Unavailable {
        /// The adapter.
        adapter: Reference,
        /// The cause.
        cause: String,
    },
    /// What the source has is not an adapter, or its answer is not what its interface says.
    #[error("adapter \"{adapter}\": {fault}")]
    Invalid {
        /// The adapter.
        adapter: Reference,
        /// What is wrong.
        fault: String,
    },
    /// It has more bytes than may be written.
    #[error("adapter \"{adapter}\" has {bytes} bytes, and there is room for {limit}")]
    TooLarge {
        /// The adapter.
        adapter: Reference,
        /// Its bytes.
        bytes: u64,
        /// The bound.
        limit: u64,
    },
    /// The source has another version by now.
    #[error("adapter \"{adapter}\" has changed at its source")]
    Changed {
        /// The adapter.
        adapter: Reference,
    },
    /// It is not on this machine, and the source must not be asked.
    #[error("adapter \"{adapter}\" is not in the cache, and HF_HUB_OFFLINE is set")]
    Offline {
        /// The adapter.
        adapter: Reference,
    },
    /// The server has not been told how to reach the source.
    #[error("adapter source \"{kind}\" needs {needs}")]
    NotConfigured {
        /// The source.
        kind: SourceKind,
        /// What is missing.
        needs: &'static str,
    },
    /// A file cannot be written here.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// Who forbids that an adapter is read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// The server, because of the folder in which it is.
    #[error("is outside of the folders that adapters may be read from")]
    Folder,
    /// The server, because of the bucket in which it is.
    #[error("is outside of the buckets that adapters may be read from (--adapter-buckets)")]
    Bucket,
    /// The bucket, which does not let the server read it.
    #[error("may not be read: {0}")]
    Store(&'static str),
    /// The source, which knows the credential and does not let it read the adapter, or does not know it.
    #[error("may not be read with this credential: {0}")]
    Credential(String),
}
