//! Adapters in folders of this machine, which are read where they are.

mod roots;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use roots::Roots;

use crate::{
    AdapterFile, Found, Reference, SourceError, SourceKind, Stamp, adapter_files::Layout, found::Digest,
};

/// The source `local`.
#[derive(Debug)]
pub(crate) struct Local {
    roots: Arc<Roots>,
    /// The number of versions that were told apart by nothing else.
    unsettled: AtomicU64,
}

/// What was found, and how long to wait until a later change of it would show.
struct Look {
    found: Found,
    settles_in: Duration,
}

/// Longest wait for the clock of a file system to tick. One whose clock is ahead by more than this is on another
/// machine.
const LONGEST_TICK: Duration = Duration::from_secs(3);

impl Local {
    /// Relative names are looked up below `dir`. Absolute names may lie below `dir` or any of `roots`. Errors: one of
    /// these folders does not exist.
    pub(crate) fn new(dir: Option<&Path>, roots: &[PathBuf]) -> Result<Local, (PathBuf, io::Error)> {
        Ok(Local { roots: Arc::new(Roots::new(dir, roots)?), unsettled: AtomicU64::new(0) })
    }

    /// The root below which a name would be, by its spelling alone.
    pub(crate) fn root_of(&self, id: &str) -> &Path {
        self.roots.root_of(id)
    }

    /// Finds an adapter. If its files have changed a moment ago, the answer comes when the file system's clock has
    /// ticked: from then on every change makes another version.
    pub(crate) async fn lookup(&self, adapter: &Reference) -> Result<Found, SourceError> {
        let mut look = self.look_from_a_thread(adapter).await?;
        if !look.settles_in.is_zero() && look.settles_in <= LONGEST_TICK {
            tokio::time::sleep(look.settles_in).await;
            look = self.look_from_a_thread(adapter).await?;
        }
        if !look.settles_in.is_zero() {
            // It is being written, or the file system's clock is another machine's. No two answers are the same version
            // then, so that nothing that was read of this one is used again.
            let number = self.unsettled.fetch_add(1, Relaxed).to_le_bytes();
            let digest = Digest::of("unsettled").with(look.found.version).with(number);
            look.found.version = digest.with(std::process::id().to_le_bytes()).end();
        }
        Ok(look.found)
    }

    async fn look_from_a_thread(&self, adapter: &Reference) -> Result<Look, SourceError> {
        let (roots, name) = (self.roots.clone(), adapter.clone());
        let looked = tokio::task::spawn_blocking(move || look(&roots, &name));
        looked.await.unwrap_or_else(|error| {
            Err(SourceError::Unavailable { adapter: adapter.clone(), cause: error.to_string() })
        })
    }
}

/// Looks at an adapter's files.
fn look(roots: &Roots, adapter: &Reference) -> Result<Look, SourceError> {
    let now = SystemTime::now();
    let folder = roots.folder(adapter)?;
    let invalid = |fault: &str| SourceError::Invalid { adapter: adapter.clone(), fault: fault.into() };
    // A link is there wherever it leads; whether a file may be read is found out below.
    let has = |name: &str| {
        let path = folder.join(name);
        let parent = path.parent().is_some_and(|parent| roots.canonical(adapter, parent).is_ok());
        parent && fs::symlink_metadata(path).is_ok()
    };
    let layout = Layout::find(has).map_err(invalid)?;
    let folder = match layout.folder {
        None => folder,
        Some(inner) => roots.canonical(adapter, &folder.join(inner))?,
    };
    let layout = Layout { folder: None, ..layout };
    let mut files = Vec::new();
    let mut version = Digest::of(SourceKind::Local.name()).with(folder.as_os_str().as_encoded_bytes());
    let mut settles_in = Duration::ZERO;
    for (name, key) in layout.files() {
        let path = roots.canonical(adapter, &folder.join(&key))?;
        let data = fs::metadata(&path).map_err(|error| unreadable(adapter, &error))?;
        if !data.is_file() {
            return Err(invalid(&format!("{name} is not a file")));
        }
        let stamp = Stamp::of(&data);
        settles_in = settles_in.max(stamp.settles_in(now));
        version = version.with(name).with(stamp.bytes());
        files.push(AdapterFile { name: name.into(), bytes: stamp.size, stamp: Some(stamp), key, tag: None });
    }
    let bytes = files.iter().map(|file| file.bytes).sum();
    let found = Found { version: version.end(), bytes, files, in_place: Some(folder), is_free: true };
    Ok(Look { found, settles_in })
}

/// The path is not told: a caller knows it by another name.
fn unreadable(adapter: &Reference, error: &io::Error) -> SourceError {
    let adapter = adapter.clone();
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => SourceError::NotFound { adapter, hint: "" },
        _ => SourceError::Unavailable { adapter, cause: error.to_string() },
    }
}
