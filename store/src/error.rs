//! Errors of the store.

use std::{io, path::PathBuf};

/// Why the store could not do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no room in the folder, for all servers that use it together.
    #[error("{bytes} bytes are needed, and of {limit} in the folder {used} are in use")]
    Full {
        /// The bytes that were asked for.
        bytes: u64,
        /// The bytes that are published, reserved, or being removed.
        used: u64,
        /// The bound.
        limit: u64,
    },
    /// The files of a partial adapter have more bytes than were reserved.
    #[error("the files take {bytes} bytes, and {reserved} were reserved")]
    TooLarge {
        /// The bytes of the files.
        bytes: u64,
        /// The reservation.
        reserved: u64,
    },
    /// A file of a partial adapter has a name that the store does not take, or is no plain file.
    #[error("{name:?} cannot be a file of an adapter: {reason}")]
    Name {
        /// The name, relative to the folder.
        name: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A partial adapter has no files.
    #[error("there are no files to publish")]
    Empty,
    /// The folder holds something else.
    #[error("{path} is not a cache of adapters: {reason}")]
    Foreign {
        /// The folder, or the file in it.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A file or folder could not be used.
    #[error("cannot use {path}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// Names the path that an operation failed at.
pub(crate) trait At<T> {
    fn at(self, path: impl Into<PathBuf>) -> Result<T, StoreError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, path: impl Into<PathBuf>) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Io { path: path.into(), source })
    }
}

/// `None` for what is not there.
pub(crate) fn optional<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
