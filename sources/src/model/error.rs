//! Why a model's files cannot be had.

use std::path::PathBuf;

use crate::{
    BucketError, SourceKind,
    hub::{HubError, NoHome},
};

/// Why a model's files cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The path exists and is not a model.
    #[error("{} is neither a folder with a config.json nor a GGUF file", .0.display())]
    NotAModel(PathBuf),
    /// There is no folder for the hub's files.
    #[error(transparent)]
    NoHome(#[from] NoHome),
    /// Models do not come from there.
    #[error("models do not come from the source \"{0}\", only from local, hub, s3, gs and az")]
    NoSuchSource(SourceKind),
    /// The bucket cannot be read.
    #[error("{id}: {failure}")]
    Bucket {
        /// The model.
        id: String,
        /// The cause.
        failure: BucketError,
    },
    /// The bucket lacks a file that the model needs.
    #[error("{id} has no file {file:?}")]
    NotInBucket {
        /// The model.
        id: String,
        /// The file.
        file: String,
    },
    /// This is neither a path nor a hub id.
    #[error("{0:?} is neither a path that exists nor a hub id")]
    NotAnId(String),
    /// The hub refused, or what it sent cannot be kept.
    #[error("{id}: {source}")]
    Hub {
        /// The model.
        id: String,
        /// The cause.
        source: HubError,
    },
    /// The hub does not answer, and the model was not downloaded before.
    #[error("{id} at {revision} is not in the cache, and the hub cannot be reached: {source}")]
    Unreachable {
        /// The model.
        id: String,
        /// The revision that was asked for.
        revision: String,
        /// The cause.
        source: HubError,
    },
    /// The model was not downloaded before, and downloads are off.
    #[error("{id} at {revision} is not in the cache, and HF_HUB_OFFLINE is set")]
    Offline {
        /// The model.
        id: String,
        /// The revision that was asked for.
        revision: String,
    },
    /// The repository has no weights that we can load.
    #[error("{id} has neither safetensors, pytorch_model.bin nor GGUF files; it has: {files}")]
    NoWeights {
        /// The model.
        id: String,
        /// The files that it has.
        files: String,
    },
    /// The repository has several models as GGUF files, and none of them is named.
    #[error(
        "{id} has several GGUF files, so that one must be named, as {id}/FILE or {id}:TYPE; it has: {files}"
    )]
    SeveralGgufs {
        /// The model.
        id: String,
        /// The GGUF files that it has.
        files: String,
    },
    /// No GGUF file, or more than one, has the name that was asked for.
    #[error("{id} has {count} GGUF files that {asked:?} names; it has: {files}")]
    NoSuchGguf {
        /// The model.
        id: String,
        /// The name that was asked for.
        asked: String,
        /// The number of files with that name.
        count: usize,
        /// The GGUF files that it has.
        files: String,
    },
    /// The model is in several GGUF files, and one of them is not in the repository.
    #[error("{id} has no file {file}, without which the other parts of the model are of no use")]
    PartOfGguf {
        /// The model.
        id: String,
        /// The file.
        file: String,
    },
    /// The cache was filled by somebody who did not keep a list of the repository's files, so that there may be others
    /// to which this name would lead as well.
    #[error(
        "{id} is in the cache without a list of its files, so that its GGUF file must be named by its whole name: \
         {id}/FILE"
    )]
    Unlisted {
        /// The model.
        id: String,
    },
    /// The index of the weights is broken.
    #[error("{}: {message}", path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

impl ModelError {
    /// Returns whether the user named something that cannot be had.
    pub fn is_usage(&self) -> bool {
        match self {
            ModelError::Hub { source, .. } => source.is_refusal(),
            ModelError::Bucket { failure, .. } => failure.is_refusal(),
            ModelError::Unreachable { .. } => false,
            _ => true,
        }
    }
}
