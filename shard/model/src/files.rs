//! Opens files of models and adapters, but only regular ones: opening a pipe would wait for its writer, and reading a
//! device might never end.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use crate::{LoadError, Result};

/// Opens a regular file, or a link to one.
pub(crate) fn open(path: &Path) -> Result<File> {
    let regular = |path: &Path| match fs::metadata(path)?.is_file() {
        true => File::open(path),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")),
    };
    regular(path).map_err(|source| LoadError::Io { path: path.into(), source })
}

/// Reads a file that was opened by this path. Errors: it is longer than `limit` bytes.
pub(crate) fn read(path: &Path, file: &File, limit: u64) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    let io = |source| LoadError::Io { path: path.into(), source };
    file.take(limit + 1).read_to_end(&mut content).map_err(io)?;
    if content.len() as u64 > limit {
        return Err(io(io::Error::new(io::ErrorKind::FileTooLarge, format!("longer than {limit} bytes"))));
    }
    Ok(content)
}
