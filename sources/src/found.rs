//! What a source has of an adapter.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::SourceError;

/// An adapter at its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// A digest of a name of bytes that never change: of a repository and a commit; of a folder and the stamps of its
    /// files; of a bucket's keys, sizes and entity tags.
    pub version: [u8; 32],
    /// The bytes of all files together.
    pub bytes: u64,
    /// The configuration, the weights, and what there is of the tokenizer.
    pub files: Vec<AdapterFile>,
    /// The folder on this machine in which the files are, with all links followed. They are read where they are.
    pub in_place: Option<PathBuf>,
    /// Whether the question costs nothing, so that its answer need not be kept.
    pub is_free: bool,
}

/// A file of an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterFile {
    /// Its path in the adapter's folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// What tells it from other files, for a file of this machine.
    pub stamp: Option<Stamp>,
    /// Its name at the source, from which it is fetched.
    pub(crate) key: String,
    /// The source's name of its content, if it has one that must not change.
    pub(crate) tag: Option<String>,
}

/// Distinguishes a file from every other file, and from itself after a change. A rewritten file is known by its ctime,
/// which programs cannot set, while archives and image layers set the mtime at will; a replaced one by its inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// The file system.
    pub device: u64,
    /// The file in it.
    pub inode: u64,
    /// Its bytes.
    pub size: u64,
    /// The seconds and nanoseconds of its last change of content.
    pub modified: (i64, i64),
    /// The seconds and nanoseconds of its last change of any kind.
    pub changed: (i64, i64),
}

/// The time after which a change shows on a file system whose times have fractions of seconds. The coarsest of their
/// clocks ticks every 10 ms.
const FINE: Duration = Duration::from_millis(50);
/// The same for file systems that store whole seconds, or every other second.
const COARSE: Duration = Duration::from_secs(3);

impl Stamp {
    /// The stamp of an open file, or of one whose links have been followed.
    pub fn of(data: &Metadata) -> Stamp {
        Stamp {
            device: data.dev(),
            inode: data.ino(),
            size: data.size(),
            modified: (data.mtime(), data.mtime_nsec()),
            changed: (data.ctime(), data.ctime_nsec()),
        }
    }

    /// How long after `now` a change may happen that does not show, because the file system's clock has not ticked
    /// since the last one.
    pub(crate) fn settles_in(&self, now: SystemTime) -> Duration {
        let (seconds, nanos) = self.changed;
        let tick = if nanos == 0 { COARSE } else { FINE };
        let changed = Duration::new(seconds.try_into().unwrap_or(0), nanos.try_into().unwrap_or(0));
        (UNIX_EPOCH + changed + tick).duration_since(now).unwrap_or_default()
    }

    /// What a digest of it is made from.
    pub(crate) fn bytes(&self) -> [u8; 56] {
        let (modified, changed) = (self.modified, self.changed);
        let times = [modified.0, modified.1, changed.0, changed.1].map(i64::cast_unsigned);
        let mut bytes = [0; 56];
        let all = [self.device, self.inode, self.size].into_iter().chain(times);
        for (place, value) in bytes.chunks_exact_mut(8).zip(all) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }
}

/// Where an adapter is to be put.
#[derive(Clone, Copy)]
pub struct Destination<'a> {
    /// An empty folder.
    pub folder: &'a Path,
    /// The most bytes that may be written.
    pub max_bytes: u64,
    /// Is told the bytes that have come so far.
    pub progress: &'a (dyn Fn(u64) + Send + Sync),
}

impl Destination<'_> {
    /// Where a file is to be put. Creates the folder that it has within that of the adapter.
    pub(crate) fn place(&self, file: &AdapterFile) -> Result<PathBuf, SourceError> {
        let path = self.folder.join(&file.name);
        let folder = path.parent().unwrap_or(self.folder);
        match fs::create_dir_all(folder) {
            Ok(()) => Ok(path),
            Err(source) => Err(SourceError::Io { path: folder.into(), source }),
        }
    }
}

/// A digest over parts, none of which can be taken for a piece of another.
pub(crate) struct Digest(blake3::Hasher);

impl Digest {
    /// A digest of something of this kind.
    pub(crate) fn of(kind: &str) -> Digest {
        Digest(blake3::Hasher::new()).with(kind)
    }

    #[must_use]
    pub(crate) fn with(mut self, part: impl AsRef<[u8]>) -> Digest {
        let part = part.as_ref();
        self.0.update(&(part.len() as u64).to_le_bytes()).update(part);
        self
    }

    pub(crate) fn end(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}
