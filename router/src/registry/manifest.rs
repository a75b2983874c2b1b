//! The file of registrations, from which a restart takes them.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sources::Reference;

/// The version of the file.
const VERSION: u32 = 1;

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It is not what this program writes. It is left as it is.
    #[error("{}: not a list of registered adapters: {reason}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another server keeps its registrations there.
    #[error("{}: another server uses it", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
}

/// A registration as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kept {
    /// The name by which requests ask for it.
    pub(super) id: String,
    pub(super) adapter_id: String,
    pub(super) adapter_source: String,
    pub(super) pinned: bool,
    /// Whether it was registered with a credential, which is not kept.
    pub(super) needs_credential: bool,
    /// Seconds since 1970.
    pub(super) created: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    version: u32,
    adapters: Vec<Kept>,
}

/// The file, which this server alone writes.
#[derive(Debug)]
pub(super) struct Manifest {
    path: PathBuf,
    /// Locked while this process lives.
    _lock: File,
}

impl Manifest {
    /// Opens the file, and reads what it has. One that is not there has nothing, and is not made before it has.
    pub(super) fn open(path: &Path) -> Result<(Manifest, Vec<(Kept, Reference)>), ManifestError> {
        let failed = |source| ManifestError::Io { path: path.into(), source };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let lock = options.open(beside(path, ".lock")).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ManifestError::Busy { path: path.into() }),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let kept = match fs::read(path) {
            Ok(text) => parse(&text).map_err(|reason| ManifestError::Broken { path: path.into(), reason })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(failed(error)),
        };
        Ok((Manifest { path: path.into(), _lock: lock }, kept))
    }

    /// Puts other registrations in place of those that it has: all of them or, if that fails, none.
    pub(super) fn write(&self, adapters: Vec<Kept>) -> Result<(), ManifestError> {
        let write = || -> io::Result<()> {
            let new = beside(&self.path, ".new");
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&serde_json::to_vec_pretty(&Text { version: VERSION, adapters })?)?;
            file.sync_all()?;
            fs::rename(&new, &self.path)?;
            match self.path.parent() {
                Some(folder) => File::open(folder)?.sync_all(),
                None => Ok(()),
            }
        };
        write().map_err(|source| ManifestError::Io { path: self.path.clone(), source })
    }
}

fn parse(text: &[u8]) -> Result<Vec<(Kept, Reference)>, String> {
    let text: Text = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    if text.version != VERSION {
        return Err(format!("its version is {}, and this program knows {VERSION}", text.version));
    }
    let named = |kept: Kept| {
        let parsed = Reference::parse(&kept.adapter_source, &kept.adapter_id);
        let reference = parsed.map_err(|error| format!("{:?}: {error}", kept.id))?;
        Ok((kept, reference))
    };
    text.adapters.into_iter().map(named).collect()
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}
