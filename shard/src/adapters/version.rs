//! Which files an adapter is read from.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use model::adapter;

/// A folder and its files as they were at one time. Whatever replaces or rewrites one of them makes it another version:
/// the time of modification can be set at will, as archives and layers of images do, but not the inode together with
/// the time of its last change.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Version {
    folder: PathBuf,
    /// Of the folder and its files; none of a file that is not there.
    stamps: [Option<Stamp>; 4],
}

/// What tells a file from every other, and from itself after a change.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// The coarsest clock that a file system with fractions of seconds takes its times from ticks every 10 ms.
const FINE: Duration = Duration::from_millis(50);
/// Others count seconds, or pairs of them.
const COARSE: Duration = Duration::from_secs(3);

impl Stamp {
    fn of(data: &Metadata) -> Stamp {
        Stamp {
            device: data.dev(),
            inode: data.ino(),
            size: data.size(),
            modified: (data.mtime(), data.mtime_nsec()),
            changed: (data.ctime(), data.ctime_nsec()),
        }
    }

    /// Whether a change after `now` would show: the clock has ticked since the last one.
    fn is_settled(&self, now: SystemTime) -> bool {
        let (seconds, nanos) = self.changed;
        let tick = if nanos == 0 { COARSE } else { FINE };
        let changed = Duration::new(seconds.try_into().unwrap_or(0), nanos.try_into().unwrap_or(0));
        UNIX_EPOCH + changed + tick < now
    }
}

impl Version {
    /// A folder, with all links in its path followed, as it is now.
    pub(super) fn of(folder: &Path) -> Version {
        let [safetensors, torch] = adapter::WEIGHTS_FILES;
        let [config, safetensors, torch] =
            [adapter::CONFIG_FILE, safetensors, torch].map(|name| folder.join(name));
        let files = [folder.to_owned(), config, safetensors, torch];
        let stamps = files.map(|file| fs::metadata(file).ok().map(|data| Stamp::of(&data)));
        Version { folder: folder.to_owned(), stamps }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether every change after `now` makes it another version. One that follows another within a tick of the file
    /// system's clock does not show.
    pub(super) fn is_settled(&self, now: SystemTime) -> bool {
        self.stamps.iter().flatten().all(|stamp| stamp.is_settled(now))
    }
}
