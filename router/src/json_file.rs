//! Files of JSON.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::de::DeserializeOwned;

/// The reason that there is nothing to be had of a file.
#[derive(Debug, thiserror::Error)]
pub enum JsonFileError {
    /// It cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It is not JSON, or not of the expected form.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
}

/// Reads a file.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, JsonFileError> {
    let text = fs::read(path).map_err(|source| JsonFileError::Io { path: path.into(), source })?;
    serde_json::from_slice(&text).map_err(|source| JsonFileError::Json { path: path.into(), source })
}

/// Reads a file that need not be there.
pub(crate) fn read_if_exists<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, JsonFileError> {
    match read(path) {
        Ok(value) => Ok(Some(value)),
        Err(JsonFileError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
