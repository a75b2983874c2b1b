//! What an entry of the store says of itself, and whether its files are what it says.

use std::{
    fs::{self, File, Metadata, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Component, Path},
};

use serde::{Deserialize, Serialize};

use crate::{
    StoreError,
    error::{At, optional},
    layout::{FILES, RECORD, hex, small_text, unhex},
};

/// Versions of a content that are remembered; a new one takes the place of the oldest.
const VERSIONS: usize = 64;
/// Files that an adapter may have.
const MOST_FILES: usize = 64;

/// The record of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    pub(crate) files: Vec<EntryFile>,
    pub(crate) versions: Vec<Named>,
}

/// A file of an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EntryFile {
    pub(crate) name: String,
    pub(crate) bytes: u64,
}

/// A version that had this content, and a reference that led to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Named {
    pub(crate) version: String,
    pub(crate) reference: String,
}

/// What changes when a file is written: if it has not changed, the file's hash has not either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    pub(crate) fn of(file: &Metadata) -> Self {
        Self {
            device: file.dev(),
            inode: file.ino(),
            bytes: file.size(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        }
    }
}

/// Which file or folder a path leads to.
pub(crate) fn identity(found: &Metadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

impl Named {
    pub(crate) fn new(version: &[u8; 32], reference: &[u8; 16]) -> Self {
        Self { version: hex(version), reference: hex(reference) }
    }
}

impl Entry {
    /// Of the entry in `folder`; `None` if it has no record, or one that is not whole.
    pub(crate) fn read(folder: &Path) -> Result<Option<Entry>, StoreError> {
        let path = folder.join(RECORD);
        let text = small_text(&path).at(&path)?;
        let entry: Option<Entry> = text.and_then(|text| serde_json::from_str(&text).ok());
        Ok(entry.filter(Entry::is_plain))
    }

    /// Whether all names in the record are such that they may become parts of paths.
    fn is_plain(&self) -> bool {
        let file = |file: &EntryFile| checked(Path::new(&file.name)).is_ok();
        let named =
            |named: &Named| unhex::<32>(&named.version).is_some() && unhex::<16>(&named.reference).is_some();
        !self.files.is_empty() && self.files.iter().all(file) && self.versions.iter().all(named)
    }

    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).fold(0, u64::saturating_add)
    }

    pub(crate) fn versions(&self) -> impl Iterator<Item = [u8; 32]> {
        self.versions.iter().filter_map(|named| unhex(&named.version))
    }

    /// Remembers another version or reference. Returns what is forgotten for it, or `None` if it was known.
    pub(crate) fn add(&mut self, named: Named) -> Option<Vec<Named>> {
        if self.versions.contains(&named) {
            return None;
        }
        self.versions.push(named);
        let surplus = self.versions.len().saturating_sub(VERSIONS);
        Some(self.versions.drain(..surplus).collect())
    }

    /// The stamps of the entry's files; `None` if one is missing, has another size or is no plain file.
    pub(crate) fn stamps(&self, folder: &Path) -> Result<Option<Vec<Stamp>>, StoreError> {
        let stamp = |file: &EntryFile| {
            let path = folder.join(FILES).join(&file.name);
            let found = optional(fs::symlink_metadata(&path)).at(&path)?;
            Ok(found
                .filter(|found| found.is_file() && found.len() == file.bytes)
                .map(|found| Stamp::of(&found)))
        };
        self.files.iter().map(stamp).collect()
    }

    /// The hash of the entry's files.
    pub(crate) fn hash(&self, folder: &Path) -> Result<[u8; 32], StoreError> {
        let files: Vec<File> = self
            .files
            .iter()
            .map(|file| {
                let path = folder.join(FILES).join(&file.name);
                open_plain(&path).at(path)
            })
            .collect::<Result<_, _>>()?;
        let named: Vec<(&str, &File)> =
            self.files.iter().zip(&files).map(|(file, open)| (file.name.as_str(), open)).collect();
        crate::content_of(&named).at(folder)
    }
}

/// Opens a file for reading, unless it is a link, or something whose opening waits.
pub(crate) fn open_plain(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
}

/// A name that a source chose for a file: one or two plain parts, none of which is hidden.
pub(crate) fn checked(name: &Path) -> Result<&str, StoreError> {
    let refuse = |reason| Err(StoreError::Name { name: name.into(), reason });
    let Some(text) = name.to_str() else { return refuse("it is not UTF-8") };
    let parts: Vec<Component<'_>> = name.components().collect();
    if parts.is_empty() || parts.len() > 2 {
        return refuse("it is not in the folder or in one below it");
    }
    for part in &parts {
        let Component::Normal(part) = part else { return refuse("it leads out of the folder") };
        let part = part.to_str().unwrap_or_default();
        if part.starts_with('.') {
            return refuse("it is hidden");
        }
        if part.len() > 255 || part.chars().any(char::is_control) {
            return refuse("it is too long or has control characters");
        }
    }
    // What is left to differ is how the parts are joined: "a//b", "a/./b", "a/".
    let joined: Vec<&str> = text.split('/').collect();
    if joined.len() != parts.len() { refuse("it is not in its simplest form") } else { Ok(text) }
}

/// The names of the files below a folder, sorted.
pub(crate) fn files_in(folder: &Path) -> Result<Vec<String>, StoreError> {
    let mut found = Vec::new();
    walk(folder, Path::new(""), &mut found)?;
    found.sort();
    if found.is_empty() { Err(StoreError::Empty) } else { Ok(found) }
}

fn walk(root: &Path, below: &Path, found: &mut Vec<String>) -> Result<(), StoreError> {
    let folder = root.join(below);
    for item in fs::read_dir(&folder).at(&folder)? {
        let item = item.at(&folder)?;
        let name = below.join(item.file_name());
        let kind = item.file_type().at(item.path())?;
        let text = checked(&name)?;
        if kind.is_dir() && below.as_os_str().is_empty() {
            walk(root, &name, found)?;
        } else if !kind.is_file() {
            return Err(StoreError::Name { name, reason: "it is not a plain file" });
        } else if found.len() == MOST_FILES {
            return Err(StoreError::Name { name, reason: "there are too many files" });
        } else {
            found.push(text.to_owned());
        }
    }
    Ok(())
}
