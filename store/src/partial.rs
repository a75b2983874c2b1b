//! Adapters that are being written.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use crate::{
    Fetched, Store, StoreError,
    entry::{Entry, EntryFile, Named, Stamp, files_in, open_plain},
    error::At,
    layout::{FILES, LOCK, RECORD, create, create_folder, remove, sized_name, sync_folder},
};

/// Room for an adapter, and the folder to write its files into. If it is dropped, both are given back.
#[derive(Debug)]
pub struct Partial {
    store: Store,
    path: PathBuf,
    files: PathBuf,
    reserved: u64,
    /// Locked while this process lives and has not published it.
    lock: File,
    published: bool,
}

impl Partial {
    pub(crate) fn reserve(store: &Store, bytes: u64) -> Result<Partial, StoreError> {
        let mut locked = store.locked()?;
        let (used, limit) = (locked.used()?, store.limit());
        if bytes > limit.saturating_sub(used) {
            return Err(StoreError::Full { bytes, used, limit });
        }
        let path = store.layout().partial().join(sized_name(bytes));
        create_folder(&path).at(&path)?;
        let files = path.join(FILES);
        let prepare = || {
            let lock = create(&path.join(LOCK))?;
            lock.lock()?;
            create_folder(&files)?;
            Ok(lock)
        };
        match prepare() {
            Ok(lock) => {
                drop(locked);
                Ok(Partial { store: store.clone(), path, files, reserved: bytes, lock, published: false })
            }
            Err(error) => {
                // The first error is the one to tell. What cannot be removed now is removed by whoever needs room.
                let _ = remove(&path);
                Err(error).at(path)
            }
        }
    }

    /// The folder for the adapter's files. One folder below it is allowed.
    pub fn folder(&self) -> &Path {
        &self.files
    }

    /// The bytes that were reserved.
    pub fn reserved(&self) -> u64 {
        self.reserved
    }

    /// Publishes the files under their hash, as what `version` is and what `reference` leads to now. If the same content
    /// is there already, that one stays.
    ///
    /// # Errors
    ///
    /// If there are no files, more bytes than were reserved, or files that an adapter does not have, and if the disk
    /// fails. Nothing is published then, and the room is given back.
    pub fn publish(mut self, version: [u8; 32], reference: [u8; 16]) -> Result<Fetched, StoreError> {
        let named = Named::new(&version, &reference);
        let (entry, content, stamps) = self.seal(named.clone())?;
        let fetched = Fetched { content, bytes: entry.bytes() };
        let target = self.store.layout().entry(&content);
        loop {
            // One that is there is held, so that it is right and stays.
            let there = self.store.hold(content)?;
            let store = self.store.clone();
            let mut locked = store.locked()?;
            if there.is_some() {
                if locked.add(&content, named.clone())? {
                    return Ok(fetched);
                }
                continue;
            }
            if target.exists() {
                continue;
            }
            locked.index(&content, &named)?;
            // From here on an entry without a lock, for a moment; nobody else looks while the folder is locked.
            self.lock.unlock().at(&self.path)?;
            locked.change(&self.path, &target)?;
            self.published = true;
            self.store.has_hashed(content, stamps);
            drop(locked);
            let contents = self.store.layout().contents();
            sync_folder(&contents).at(contents)?;
            return Ok(fetched);
        }
    }

    /// Checks and hashes the files, writes them through to the disk, and adds the record.
    fn seal(&self, named: Named) -> Result<(Entry, [u8; 32], Vec<Stamp>), StoreError> {
        let names = files_in(&self.files)?;
        let open: Vec<File> = names
            .iter()
            .map(|name| {
                let path = self.files.join(name);
                open_sealed(&path).at(path)
            })
            .collect::<Result<_, _>>()?;
        let found: Vec<fs::Metadata> =
            open.iter().map(File::metadata).collect::<io::Result<_>>().at(&self.files)?;
        let stamps: Vec<Stamp> = found.iter().map(Stamp::of).collect();
        let files: Vec<EntryFile> = names
            .iter()
            .zip(&found)
            .map(|(name, found)| EntryFile { name: name.clone(), bytes: found.len() })
            .collect();
        let entry = Entry { files, versions: vec![named] };
        if entry.bytes() > self.reserved {
            return Err(StoreError::TooLarge { bytes: entry.bytes(), reserved: self.reserved });
        }
        let parts: Vec<(&str, &File)> = names.iter().map(String::as_str).zip(&open).collect();
        let content = crate::content_of(&parts).at(&self.files)?;
        let write = || {
            open.iter().try_for_each(File::sync_all)?;
            let mut record = create(&self.path.join(RECORD))?;
            record.write_all(entry.to_json().as_bytes())?;
            record.sync_all()?;
            for below in names.iter().filter_map(|name| Path::new(name).parent()) {
                let folder = self.files.join(below);
                fs::set_permissions(&folder, Permissions::from_mode(0o700))?;
                sync_folder(&folder)?;
            }
            sync_folder(&self.files)?;
            sync_folder(&self.path)
        };
        write().at(&self.path)?;
        Ok((entry, content, stamps))
    }
}

/// Opens a file that has been written, whose owner alone may read it from now on.
fn open_sealed(path: &Path) -> io::Result<File> {
    let file = open_plain(path)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        // The name, which is the reservation, goes last.
        if let Err(error) = remove(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "cannot remove a partial adapter");
        }
    }
}
