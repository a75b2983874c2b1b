//! The files of an adapter, and whether they are still those that the router has hashed.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use model::adapter::{AdapterFiles, CONFIG_FILE, WEIGHTS_FILES};
use rustix::fs::OFlags;

use super::StageError;

/// A folder with the files of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterPart {
    /// Its name in a merge, for messages.
    pub name: String,
    /// Its absolute path.
    pub folder: PathBuf,
    /// The configuration and the file with the tensors.
    pub files: Vec<AdapterFile>,
    /// Its weight in a merge.
    pub weight: f64,
}

/// A file of an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterFile {
    /// Its path in the folder.
    pub name: PathBuf,
    /// What it was when it was hashed; `None` for files that never change.
    pub stamp: Option<Stamp>,
}

/// Distinguishes a file from every other file, and from itself after a change. Its ctime is a part of it, which programs
/// cannot set, while archives and image layers set the mtime at will.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// The device that it is on.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Its mtime in seconds and nanoseconds.
    pub modified: (i64, i64),
    /// Its ctime in seconds and nanoseconds.
    pub changed: (i64, i64),
}

impl Stamp {
    /// The stamp of a file with these attributes.
    pub fn of(data: &Metadata) -> Stamp {
        Stamp {
            device: data.dev(),
            inode: data.ino(),
            size: data.size(),
            modified: (data.mtime(), data.mtime_nsec()),
            changed: (data.ctime(), data.ctime_nsec()),
        }
    }
}

/// A file, and what it was when it was hashed.
struct Opened {
    file: File,
    stamp: Option<Stamp>,
}

impl Opened {
    /// Opens a file of a folder. `None`: it is not there, or is another one by now.
    fn open(folder: &Path, file: &AdapterFile) -> io::Result<Option<Opened>> {
        // Without this flag, opening a pipe would wait for its writer.
        let flags = OFlags::NONBLOCK.bits() as i32;
        let opened = File::options().read(true).custom_flags(flags).open(folder.join(&file.name));
        let opened = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => Opened { file: opened?, stamp: file.stamp },
        };
        if !opened.is_unchanged()? {
            return Ok(None);
        }
        match opened.file.metadata()?.is_file() {
            true => Ok(Some(opened)),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")),
        }
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        let Some(stamp) = self.stamp else { return Ok(true) };
        Ok(Stamp::of(&self.file.metadata()?) == stamp)
    }
}

/// The open files of a part. They are read through the same handles by which they are checked, so that no other file can
/// take their names in between.
pub(super) struct OpenPart {
    config: Opened,
    weights: Opened,
    weights_name: PathBuf,
}

impl OpenPart {
    /// Opens the files of a part. `None`: some file is not there, or is another one by now.
    pub(super) fn open(part: &AdapterPart, name: &str) -> Result<Option<OpenPart>, StageError> {
        let find = |wanted: &'static str| part.files.iter().find(|file| file.name.ends_with(wanted));
        let missing = |file| StageError::File { name: name.into(), file };
        let config = find(CONFIG_FILE).ok_or_else(|| missing(CONFIG_FILE))?;
        let weights = WEIGHTS_FILES.into_iter().find_map(find).ok_or_else(|| missing(WEIGHTS_FILES[0]))?;
        let open = |file| {
            Opened::open(&part.folder, file).map_err(|source| StageError::Io { name: name.into(), source })
        };
        let (Some(config), Some(weights_file)) = (open(config)?, open(weights)?) else { return Ok(None) };
        Ok(Some(OpenPart { config, weights: weights_file, weights_name: weights.name.clone() }))
    }

    /// The files, for reading.
    pub(super) fn files(&self) -> io::Result<AdapterFiles> {
        Ok(AdapterFiles {
            config: self.config.file.try_clone()?,
            weights: self.weights.file.try_clone()?,
            weights_path: self.weights_name.clone(),
        })
    }

    /// Whether no file has changed since it was hashed.
    pub(super) fn is_unchanged(&self) -> io::Result<bool> {
        Ok(self.config.is_unchanged()? && self.weights.is_unchanged()?)
    }
}
