//! Tells whether the files of an adapter have changed since it was read.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use model::adapter;

use super::Stamp;

/// A folder and its files as they were at one time. A file that is replaced or rewritten makes another version. This is
/// seen by its inode and its ctime, which programs cannot set, while archives and image layers set the mtime at will.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Version {
    folder: PathBuf,
    /// The stamps of the folder and its files; `None` for a file that does not exist.
    stamps: [Option<Stamp>; 4],
}

/// The time after which a change shows on a file system whose times have fractions of seconds. The coarsest of their
/// clocks ticks every 10 ms.
const FINE: Duration = Duration::from_millis(50);
/// The same for file systems that store whole seconds, or every other second.
const COARSE: Duration = Duration::from_secs(3);

impl Stamp {
    /// Whether a change after `now` would show, because the file system's clock has ticked since the last change.
    fn is_settled(&self, now: SystemTime) -> bool {
        let (seconds, nanos) = self.changed;
        let tick = if nanos == 0 { COARSE } else { FINE };
        let changed = Duration::new(seconds.try_into().unwrap_or(0), nanos.try_into().unwrap_or(0));
        UNIX_EPOCH + changed + tick < now
    }
}

impl Version {
    /// The present version of a folder. All links in its path must have been followed.
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

    /// Whether every change after `now` makes another version. A change does not show if it follows another one within
    /// the same tick of the file system's clock.
    pub(super) fn is_settled(&self, now: SystemTime) -> bool {
        self.stamps.iter().flatten().all(|stamp| stamp.is_settled(now))
    }
}
