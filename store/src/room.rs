//! What has room in the folder, and the removal of what nobody needs. Everything here needs the folder's lock.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use crate::{
    StoreError,
    entry::{Entry, Named},
    error::{At, optional},
    layout::{FILES, LOCK, Layout, hex, names, size_in, sized_name, small_text, unhex},
};

/// The folder's lock, for the threads of this process and for other processes.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// It holds a number that is another one after each change to the contents, so that they need not be counted anew
    /// while it stays.
    file: File,
    /// That number, and the bytes of all contents, when they were counted last.
    counted: Option<(u64, u64)>,
    /// Bytes of the contents that were there then. A content never changes.
    sizes: HashMap<[u8; 32], u64>,
}

/// The locked folder.
pub(crate) struct Locked<'a> {
    state: MutexGuard<'a, State>,
    layout: &'a Layout,
}

/// Whether a lock could be had.
pub(crate) enum Taken {
    /// The lock is the caller's while the file is open.
    Mine(File),
    /// Somebody has it.
    Busy,
    /// There is no such file.
    Absent,
}

/// Takes a lock if nobody has it: all of it, or a share.
pub(crate) fn take(path: &Path, exclusive: bool) -> io::Result<Taken> {
    let Some(file) = optional(crate::entry::open_plain(path))? else { return Ok(Taken::Absent) };
    match if exclusive { file.try_lock() } else { file.try_lock_shared() } {
        Ok(()) => Ok(Taken::Mine(file)),
        Err(fs::TryLockError::WouldBlock) => Ok(Taken::Busy),
        Err(fs::TryLockError::Error(error)) => Err(error),
    }
}

impl Gate {
    pub(crate) fn new(file: File) -> Self {
        Self { state: Mutex::new(State { file, counted: None, sizes: HashMap::new() }) }
    }

    /// Waits for the lock. It is held for small changes only, and a process that ends gives it back.
    pub(crate) fn lock<'a>(&'a self, layout: &'a Layout) -> Result<Locked<'a>, StoreError> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.file.lock().at(layout.lock())?;
        Ok(Locked { state, layout })
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.state.file.unlock() {
            tracing::error!(%error, path = %self.layout.lock().display(), "cannot unlock the cache of adapters");
        }
    }
}

impl Locked<'_> {
    pub(crate) fn layout(&self) -> &Layout {
        self.layout
    }

    /// Bytes that are published, reserved or on their way out.
    pub(crate) fn used(&mut self) -> Result<u64, StoreError> {
        let changes = self.changes()?;
        let mut used = match self.state.counted {
            Some((then, bytes)) if then == changes => bytes,
            _ => self.count()?,
        };
        self.state.counted = Some((changes, used));
        for folder in [self.layout.partial(), self.layout.removing()] {
            let names = names(&folder).at(&folder)?;
            used = names.iter().filter_map(|name| size_in(name)).fold(used, u64::saturating_add);
        }
        Ok(used)
    }

    /// Bytes of all contents.
    fn count(&mut self) -> Result<u64, StoreError> {
        let (mut bytes, mut sizes) = (0_u64, HashMap::new());
        for content in self.contents()? {
            let entry = self.layout.entry(&content);
            let known = match self.state.sizes.get(&content) {
                Some(bytes) => Some(*bytes),
                None => Entry::read(&entry)?.map(|record| record.bytes()),
            };
            // The size of an entry that is not whole says nothing of the one that takes its place.
            bytes = bytes.saturating_add(known.map_or_else(|| entry_bytes(&entry), Ok)?);
            sizes.extend(known.map(|bytes| (content, bytes)));
        }
        self.state.sizes = sizes;
        Ok(bytes)
    }

    fn changes(&self) -> Result<u64, StoreError> {
        let mut number = [0; 8];
        match self.state.file.read_exact_at(&mut number, 0) {
            // Nothing has changed since the file was made.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
            read => read.map(|()| u64::from_le_bytes(number)).at(self.layout.lock()),
        }
    }

    /// Moves an entry in or out. The number is written first, because a process may be killed after it.
    pub(crate) fn change(&mut self, from: &Path, to: &Path) -> Result<Option<()>, StoreError> {
        let number = self.changes()?.wrapping_add(1);
        self.state.file.write_all_at(&number.to_le_bytes(), 0).at(self.layout.lock())?;
        optional(fs::rename(from, to)).at(from)
    }

    /// Counts the contents anew, in case somebody else has changed them.
    fn forget_count(&mut self) {
        self.state.counted = None;
    }

    /// All contents that have an entry, whole or not.
    pub(crate) fn contents(&self) -> Result<Vec<[u8; 32]>, StoreError> {
        let folder = self.layout.contents();
        Ok(names(&folder).at(&folder)?.iter().filter_map(|name| unhex(name)).collect())
    }

    /// Marks what processes have left that have ended. Returns the folders that are to be removed when the lock is
    /// free again.
    pub(crate) fn abandoned(&mut self) -> Result<Vec<PathBuf>, StoreError> {
        self.forget_count();
        let folder = self.layout.partial();
        for name in names(&folder).at(&folder)?.into_iter().filter(|name| size_in(name).is_some()) {
            let path = folder.join(&name);
            // One without a lock is being made or removed: the former happens while the folder is locked.
            let alive = matches!(take(&path.join(LOCK), true).at(&path)?, Taken::Busy);
            if !alive {
                optional(fs::rename(&path, self.layout.removing().join(&name))).at(&path)?;
            }
        }
        let folder = self.layout.removing();
        let found = names(&folder).at(&folder)?;
        Ok(found.into_iter().filter(|name| size_in(name).is_some()).map(|name| folder.join(name)).collect())
    }

    /// Removes versions and references that lead nowhere, which a process that was killed may have left.
    pub(crate) fn prune(&mut self) -> Result<(), StoreError> {
        optional(fs::remove_file(self.layout.new_file())).at(self.layout.new_file())?;
        let folder = self.layout.versions();
        for name in names(&folder).at(&folder)? {
            let Some(version) = unhex::<32>(&name) else { continue };
            if self.lead(&version)?.is_none() {
                self.unlink(&folder.join(name))?;
            }
        }
        let folder = self.layout.references();
        for name in names(&folder).at(&folder)?.into_iter().filter(|name| unhex::<16>(name).is_some()) {
            let path = folder.join(name);
            let version = small_text(&path).at(&path)?.and_then(|text| unhex::<32>(&text));
            let leads = version.is_some_and(|version| self.layout.version(&version).exists());
            if !leads {
                self.unlink(&path)?;
            }
        }
        Ok(())
    }

    /// The content of a version, if both are here and belong together.
    fn lead(&self, version: &[u8; 32]) -> Result<Option<[u8; 32]>, StoreError> {
        let path = self.layout.version(version);
        let Some(content) = small_text(&path).at(&path)?.and_then(|text| unhex(&text)) else {
            return Ok(None);
        };
        let entry = Entry::read(&self.layout.entry(&content))?;
        Ok(entry.is_some_and(|entry| entry.versions().any(|known| known == *version)).then_some(content))
    }

    /// Remembers what a version is, and that a reference led to it. A process that is killed in between leaves a version
    /// that leads nowhere.
    pub(crate) fn index(&mut self, content: &[u8; 32], named: &Named) -> Result<(), StoreError> {
        let version = self.layout.versions().join(&named.version);
        self.layout.put(&version, &hex(content)).at(version)?;
        let reference = self.layout.references().join(&named.reference);
        self.layout.put(&reference, &named.version).at(reference)
    }

    /// Forgets that a version was this content, and that a reference led to it.
    pub(crate) fn forget(&mut self, content: &[u8; 32], named: &Named) -> Result<(), StoreError> {
        self.unlink_if(self.layout.versions().join(&named.version), &hex(content))?;
        self.unlink_if(self.layout.references().join(&named.reference), &named.version)
    }

    /// Removes a small file, if that is what it says.
    fn unlink_if(&self, path: PathBuf, text: &str) -> Result<(), StoreError> {
        if small_text(&path).at(&path)?.is_some_and(|found| found == text) {
            self.unlink(&path)
        } else {
            Ok(())
        }
    }

    fn unlink(&self, path: &Path) -> Result<(), StoreError> {
        optional(fs::remove_file(path)).at(path).map(drop)
    }

    /// Takes an entry out of the contents. Returns the folder to remove when the lock is free again.
    pub(crate) fn take_out(&mut self, content: &[u8; 32]) -> Result<Option<PathBuf>, StoreError> {
        let entry = self.layout.entry(content);
        let record = Entry::read(&entry)?;
        let doomed = self.layout.removing().join(sized_name(entry_bytes(&entry)?));
        let moved = self.change(&entry, &doomed)?;
        for named in record.iter().flat_map(|record| &record.versions) {
            self.forget(content, named)?;
        }
        Ok(moved.map(|()| doomed))
    }

    /// All entries with the time of their last use, the least recently used first.
    pub(crate) fn by_use(&self) -> Result<Vec<(SystemTime, [u8; 32])>, StoreError> {
        let used = |content| last_use(&self.layout.entry(&content)).map(|time| (time, content));
        let mut found: Vec<_> = self.contents()?.into_iter().map(used).collect::<Result<_, _>>()?;
        found.sort();
        Ok(found)
    }
}

/// When an entry was used last. One without a lock, which nobody can use, comes first.
pub(crate) fn last_use(entry: &Path) -> Result<SystemTime, StoreError> {
    let path = entry.join(LOCK);
    let found = optional(fs::symlink_metadata(&path)).at(&path)?;
    found.map_or(Ok(SystemTime::UNIX_EPOCH), |found| found.modified().at(path))
}

/// Bytes of an entry's files: by its record, or as far as can be found without one.
fn entry_bytes(entry: &Path) -> Result<u64, StoreError> {
    if let Some(record) = Entry::read(entry)? {
        return Ok(record.bytes());
    }
    lengths(&entry.join(FILES)).at(entry)
}

/// The lengths of the files in a folder and in those below it.
fn lengths(folder: &Path) -> io::Result<u64> {
    let Some(items) = optional(fs::read_dir(folder))? else { return Ok(0) };
    let mut sum = 0_u64;
    for item in items {
        let item = item?;
        let bytes = if item.file_type()?.is_dir() { lengths(&item.path())? } else { item.metadata()?.len() };
        sum = sum.saturating_add(bytes);
    }
    Ok(sum)
}
