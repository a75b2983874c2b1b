//! The store: finding, holding and deleting what has been published.

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use crate::{
    Partial, StoreError,
    entry::{Entry, Named, Stamp, identity, open_plain},
    error::{At, optional},
    layout::{
        FILES, LOCK, Layout, RECORD, create, create_folder, names, remove, size_in, small_text, sync_folder,
        unhex,
    },
    room::{Gate, Locked, Taken, take},
};

/// What `VERSION` says.
const LAYOUT: &str = "lorax adapters 1\n";

/// A folder of adapters. Clones are the same store.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    layout: Layout,
    limit: u64,
    gate: Gate,
    /// The stamps that the files of contents had when this process hashed them.
    hashed: Mutex<HashMap<[u8; 32], Vec<Stamp>>>,
}

/// An adapter on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OnDisk {
    /// Its hash.
    pub content: [u8; 32],
    /// Bytes of its files.
    pub bytes: u64,
    /// The versions that it came from.
    pub versions: Vec<[u8; 32]>,
}

/// What a version is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// The hash of the adapter.
    pub content: [u8; 32],
    /// Bytes of its files.
    pub bytes: u64,
}

/// What has become of an entry that was to be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deletion {
    /// It is gone.
    Gone,
    /// Somebody holds it, here or in another process. It stays.
    Held,
}

/// Keeps an adapter's files where they are until it is dropped.
#[derive(Debug)]
pub struct Hold {
    folder: PathBuf,
    _lock: File,
}

impl Hold {
    /// The folder of the adapter's files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Store {
    /// Opens the folder at `root`, which is made if it is not there, and removes what processes have left in it that
    /// have ended. All servers that share a folder should give it the same limit, in bytes; each keeps its own.
    ///
    /// # Errors
    ///
    /// If the folder holds something else or another layout, or cannot be used.
    pub fn open(root: &Path, limit: u64) -> Result<Store, StoreError> {
        fs::create_dir_all(root).at(root)?;
        let layout = Layout { root: root.canonicalize().at(root)? };
        check(&layout)?;
        let gate = Gate::new(open_lock(&layout)?);
        let locked = gate.lock(&layout)?;
        make(&layout)?;
        drop(locked);
        let store = Store { inner: Arc::new(Inner { layout, limit, gate, hashed: Mutex::default() }) };
        store.clean()?;
        store.locked()?.prune()?;
        Ok(store)
    }

    /// The adapters on the disk, the least recently used first. Entries that are not whole are removed; whether their
    /// bytes are right is not looked at before they are held.
    ///
    /// # Errors
    ///
    /// If the folder cannot be read.
    pub fn scan(&self) -> Result<Vec<OnDisk>, StoreError> {
        let order = self.locked()?.by_use()?;
        let mut found = Vec::with_capacity(order.len());
        for (_, content) in order {
            let folder = self.layout().entry(&content);
            let Some(seen) = self.seen(&folder)? else { continue };
            match Entry::read(&folder)? {
                Some(entry) if entry.stamps(&folder)?.is_some() && folder.join(LOCK).exists() => {
                    let versions: BTreeSet<[u8; 32]> = entry.versions().collect();
                    let versions = versions.into_iter().collect();
                    found.push(OnDisk { content, bytes: entry.bytes(), versions });
                }
                _ => self.discard(&content, seen)?,
            }
        }
        Ok(found)
    }

    /// What a version is, if it has been published, perhaps by another server. This counts as a use.
    ///
    /// # Errors
    ///
    /// If the folder cannot be read.
    pub fn find(&self, version: [u8; 32]) -> Result<Option<Fetched>, StoreError> {
        let path = self.layout().version(&version);
        let Some(content) = small_text(&path).at(&path)?.and_then(|text| unhex(&text)) else {
            return Ok(None);
        };
        let folder = self.layout().entry(&content);
        let Some(entry) = Entry::read(&folder)? else { return Ok(None) };
        if !entry.versions().any(|known| known == version) {
            return Ok(None);
        }
        if let Some(lock) = optional(open_plain(&folder.join(LOCK))).at(&folder)? {
            touch(&lock);
        }
        Ok(Some(Fetched { content, bytes: entry.bytes() }))
    }

    /// Remembers that a reference has led to a version, if that is on the disk.
    ///
    /// # Errors
    ///
    /// If the folder cannot be read or written.
    pub fn name(&self, reference: [u8; 16], version: [u8; 32]) -> Result<(), StoreError> {
        if self.named(reference)? == Some(version) {
            return Ok(());
        }
        match self.find(version)? {
            Some(fetched) => self.locked()?.add(&fetched.content, Named::new(&version, &reference)).map(drop),
            None => Ok(()),
        }
    }

    /// The version that a reference led to last, if that is still on the disk.
    ///
    /// # Errors
    ///
    /// If the folder cannot be read.
    pub fn named(&self, reference: [u8; 16]) -> Result<Option<[u8; 32]>, StoreError> {
        let path = self.layout().reference(&reference);
        let version = small_text(&path).at(&path)?.and_then(|text| unhex(&text));
        Ok(version.filter(|version| self.layout().version(version).exists()))
    }

    /// The folder of a content's files, whether it is there or not.
    pub fn path(&self, content: [u8; 32]) -> PathBuf {
        self.layout().entry(&content).join(FILES)
    }

    /// Holds an adapter: nobody deletes it meanwhile. `None` if it is not there, is being deleted, or turns out not to be
    /// what its name says. The first time, its files are hashed. This counts as a use.
    ///
    /// # Errors
    ///
    /// If the folder or a file cannot be read.
    pub fn hold(&self, content: [u8; 32]) -> Result<Option<Hold>, StoreError> {
        let folder = self.layout().entry(&content);
        let Some(seen) = self.seen(&folder)? else { return Ok(None) };
        let path = folder.join(LOCK);
        let lock = match take(&path, false).at(&path)? {
            Taken::Mine(lock) => lock,
            Taken::Busy => return Ok(None),
            Taken::Absent => return self.discard(&content, seen).map(|()| None),
        };
        // It may have been deleted, and published again, between opening and locking.
        let there = optional(fs::symlink_metadata(&path)).at(&path)?;
        if there.map(|there| identity(&there)) != Some(identity(&lock.metadata().at(&path)?)) {
            return Ok(None);
        }
        if !self.is_right(&content, &folder)? {
            drop(lock);
            return self.discard(&content, seen).map(|()| None);
        }
        touch(&lock);
        Ok(Some(Hold { folder: folder.join(FILES), _lock: lock }))
    }

    /// Removes an adapter from the disk, unless somebody holds it. One that is not there is gone.
    ///
    /// # Errors
    ///
    /// If it could not be removed altogether. What is left counts as used, until it is removed by the next that needs
    /// room or opens the folder.
    pub fn delete(&self, content: [u8; 32]) -> Result<Deletion, StoreError> {
        let mut locked = self.locked()?;
        let lock = self.layout().entry(&content).join(LOCK);
        let taken = take(&lock, true).at(&lock)?;
        if matches!(taken, Taken::Busy) {
            return Ok(Deletion::Held);
        }
        let doomed = locked.take_out(&content)?;
        drop((taken, locked));
        self.removed(doomed)?;
        Ok(Deletion::Gone)
    }

    /// Makes room for `bytes` bytes: removes adapters that nobody holds, the least recently used first, whichever server
    /// has published them. Returns the contents that are gone, which may be too few.
    ///
    /// # Errors
    ///
    /// If one could not be removed.
    pub fn make_room(&self, bytes: u64) -> Result<Vec<[u8; 32]>, StoreError> {
        self.clean()?;
        let mut locked = self.locked()?;
        let mut surplus = locked.used()?.saturating_add(bytes).saturating_sub(self.inner.limit);
        let (mut gone, mut doomed) = (Vec::new(), Vec::new());
        for (_, content) in locked.by_use()? {
            if surplus == 0 {
                break;
            }
            let lock = self.layout().entry(&content).join(LOCK);
            let taken = take(&lock, true).at(&lock)?;
            if matches!(taken, Taken::Busy) {
                continue;
            }
            let Some(folder) = locked.take_out(&content)? else { continue };
            let name = folder.file_name().and_then(|name| name.to_str());
            surplus = surplus.saturating_sub(name.and_then(size_in).unwrap_or(0));
            gone.push(content);
            doomed.push(folder);
        }
        drop(locked);
        doomed.into_iter().try_for_each(|folder| self.removed(Some(folder)))?;
        Ok(gone)
    }

    /// The bound of the folder, in bytes.
    pub fn limit(&self) -> u64 {
        self.inner.limit
    }

    /// Bytes that are published, reserved or on their way out, by all servers.
    ///
    /// # Errors
    ///
    /// If the folder cannot be read.
    pub fn used(&self) -> Result<u64, StoreError> {
        self.locked()?.used()
    }

    /// Takes room for an adapter of `bytes` bytes, and makes a folder for its files. What processes have left that have
    /// ended is removed if there is no room otherwise; published adapters are not.
    ///
    /// # Errors
    ///
    /// [`StoreError::Full`] if there is no room, or if the folder cannot be used.
    pub fn reserve(&self, bytes: u64) -> Result<Partial, StoreError> {
        match Partial::reserve(self, bytes) {
            Err(StoreError::Full { .. }) => {
                self.clean()?;
                Partial::reserve(self, bytes)
            }
            answer => answer,
        }
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.inner.layout
    }

    pub(crate) fn locked(&self) -> Result<Locked<'_>, StoreError> {
        self.inner.gate.lock(self.layout())
    }

    /// Remembers that this process has hashed a content, whose files had these stamps.
    pub(crate) fn has_hashed(&self, content: [u8; 32], stamps: Vec<Stamp>) {
        self.inner.hashed.lock().unwrap_or_else(PoisonError::into_inner).insert(content, stamps);
    }

    /// Whether the files of an entry are those of its content.
    fn is_right(&self, content: &[u8; 32], folder: &Path) -> Result<bool, StoreError> {
        let Some(entry) = Entry::read(folder)? else { return Ok(false) };
        let Some(stamps) = entry.stamps(folder)? else { return Ok(false) };
        let known =
            self.inner.hashed.lock().unwrap_or_else(PoisonError::into_inner).get(content) == Some(&stamps);
        if known {
            return Ok(true);
        }
        let right = entry.hash(folder)? == *content;
        if right {
            self.has_hashed(*content, stamps);
        }
        Ok(right)
    }

    /// Which folder an entry is now.
    fn seen(&self, folder: &Path) -> Result<Option<(u64, u64)>, StoreError> {
        let found = optional(fs::symlink_metadata(folder)).at(folder)?;
        Ok(found.as_ref().map(identity))
    }

    /// Removes an entry that was seen not to be whole, whoever holds it, because nobody can use it. One that has been
    /// published since stays.
    fn discard(&self, content: &[u8; 32], seen: (u64, u64)) -> Result<(), StoreError> {
        let mut locked = self.locked()?;
        let folder = self.layout().entry(content);
        if self.seen(&folder)? != Some(seen) {
            return Ok(());
        }
        tracing::warn!(path = %folder.display(), "an adapter on the disk is damaged and is removed");
        let doomed = locked.take_out(content)?;
        drop(locked);
        self.removed(doomed)
    }

    /// Removes what was taken out of the contents.
    fn removed(&self, doomed: Option<PathBuf>) -> Result<(), StoreError> {
        doomed.map_or(Ok(()), |folder| remove(&folder).at(folder))
    }

    /// Removes what processes have left that have ended.
    fn clean(&self) -> Result<(), StoreError> {
        let doomed = self.locked()?.abandoned()?;
        doomed.into_iter().try_for_each(|folder| self.removed(Some(folder)))
    }
}

/// Whether the folder is a store, or one in which a store can be made. Nothing is written before this is known.
fn check(layout: &Layout) -> Result<(), StoreError> {
    let path = layout.version_file();
    if path.exists() {
        let found = small_text(&path).at(&path)?;
        if found.as_deref() == Some(LAYOUT) {
            return Ok(());
        }
        let found = found.as_deref().map_or("no text", str::trim);
        let reason = format!("it says {found:?} instead of {:?}", LAYOUT.trim());
        return Err(StoreError::Foreign { path, reason });
    }
    // A process that was killed while it made the store has left these.
    let ours = |name: &String| name == "lock" || name == "new";
    match names(&layout.root).at(&layout.root)?.into_iter().find(|name| !ours(name)) {
        // Another process may have made the store just now.
        Some(_) if path.exists() => check(layout),
        Some(other) => {
            let reason = format!("it has no file VERSION, but holds {other}");
            Err(StoreError::Foreign { path: layout.root.clone(), reason })
        }
        None => Ok(()),
    }
}

/// The file whose lock is the folder's.
fn open_lock(layout: &Layout) -> Result<File, StoreError> {
    let path = layout.lock();
    match create(&path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            File::options().read(true).write(true).open(&path).at(path)
        }
        made => made.at(path),
    }
}

/// Makes what is not there yet. The folder must be locked. `VERSION` comes first, because it is what names a store.
fn make(layout: &Layout) -> Result<(), StoreError> {
    let path = layout.version_file();
    if !path.exists() {
        layout.put(&path, LAYOUT).at(&path)?;
    }
    for folder in
        [layout.contents(), layout.partial(), layout.removing(), layout.versions(), layout.references()]
    {
        match create_folder(&folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.at(folder)?,
        }
    }
    sync_folder(&layout.root).at(&layout.root)
}

/// Notes a use. That the order of use is a little wrong harms nobody.
fn touch(lock: &File) {
    if let Err(error) = lock.set_modified(SystemTime::now()) {
        tracing::debug!(%error, "cannot note the use of an adapter");
    }
}

impl Locked<'_> {
    /// Remembers another version or reference of a content. Returns whether the content is there.
    pub(crate) fn add(&mut self, content: &[u8; 32], named: Named) -> Result<bool, StoreError> {
        let folder = self.layout().entry(content);
        let Some(mut entry) = Entry::read(&folder)? else { return Ok(false) };
        self.index(content, &named)?;
        if let Some(forgotten) = entry.add(named) {
            let path = folder.join(RECORD);
            self.layout().put(&path, &entry.to_json()).at(path)?;
            let kept = |old: &&Named| !entry.versions.iter().any(|new| new.version == old.version);
            forgotten.iter().filter(kept).try_for_each(|old| self.forget(content, old))?;
        }
        Ok(true)
    }
}
