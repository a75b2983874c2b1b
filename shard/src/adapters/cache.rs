//! The LRU cache of host copies by content hash, and of the properties of versions.

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    path::PathBuf,
    sync::{Arc, Weak},
};

use lru::LruCache;
use model::adapter::ContentHash;
use tokio::sync::OnceCell;

use super::{Prepared, version::Version};

/// The number of versions and of content hashes that are remembered. Each takes a few hundred bytes.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1 << 16).expect("not zero");

struct Resident<A> {
    adapter: Arc<A>,
    bytes: usize,
}

/// Properties of an adapter that are remembered after it has been evicted.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    /// Its folder.
    pub(super) folder: PathBuf,
    /// The number of tokens that it has rows for, including those of the model.
    pub(super) vocab: usize,
    /// The vector that is added to hidden states.
    pub(super) hidden_shift: Option<Arc<[f32]>>,
}

/// Both caches, and the memory that host copies take.
pub(super) struct Cache<A> {
    /// The bound on `bytes + reserved`.
    limit: usize,
    resident: LruCache<ContentHash, Resident<A>>,
    /// Bytes of the resident adapters.
    bytes: usize,
    /// Bytes of adapters that are being staged.
    reserved: usize,
    /// Adapters that were evicted while a load or a slot still held them. They no longer count towards `bytes`.
    lent: HashMap<ContentHash, Weak<A>>,
    /// The properties of versions. Callers that ask for a version at the same time share its cell.
    known: LruCache<Version, Arc<OnceCell<Prepared>>>,
    /// The folder from which each adapter was last read, and its number of tokens.
    origins: LruCache<ContentHash, Origin>,
}

impl<A> Cache<A> {
    /// Makes an empty cache of at most `limit` bytes.
    pub(super) fn new(limit: usize) -> Cache<A> {
        Cache {
            limit,
            resident: LruCache::unbounded(),
            bytes: 0,
            reserved: 0,
            lent: HashMap::new(),
            known: LruCache::new(REMEMBERED),
            origins: LruCache::new(REMEMBERED),
        }
    }

    /// The host copy of an adapter, if it is in memory.
    pub(super) fn get(&mut self, content: ContentHash) -> Option<Arc<A>> {
        match self.resident.get(&content) {
            Some(resident) => Some(resident.adapter.clone()),
            None => self.lent.get(&content)?.upgrade(),
        }
    }

    /// Evicts the least recently used adapters until `bytes` more fit, and reserves these. Callers make sure that all
    /// reservations together stay below the limit.
    pub(super) fn reserve(&mut self, bytes: usize) {
        self.reserved += bytes;
        self.lent.retain(|_, adapter| adapter.strong_count() > 0);
        while self.bytes + self.reserved > self.limit {
            let Some((content, evicted)) = self.resident.pop_lru() else { break };
            self.bytes -= evicted.bytes;
            self.lent.insert(content, Arc::downgrade(&evicted.adapter));
        }
    }

    /// Ends a reservation of [`Self::reserve`].
    pub(super) fn release(&mut self, bytes: usize) {
        self.reserved -= bytes;
    }

    /// Adds an adapter that was read from a folder. Returns the copy to use, which is an older one if there is one in
    /// memory.
    pub(super) fn insert(
        &mut self,
        content: ContentHash,
        adapter: Arc<A>,
        bytes: usize,
        origin: Origin,
    ) -> Arc<A> {
        self.origins.put(content, origin);
        if let Some(resident) = self.get(content) {
            return resident;
        }
        self.bytes += bytes;
        self.resident.put(content, Resident { adapter: adapter.clone(), bytes });
        adapter
    }

    /// The resident adapters, and the bytes that each takes.
    pub(super) fn held(&self) -> Vec<(ContentHash, usize)> {
        self.resident.iter().map(|(content, resident)| (*content, resident.bytes)).collect()
    }

    /// The remembered properties of an adapter.
    pub(super) fn origin(&mut self, content: ContentHash) -> Option<Origin> {
        self.origins.get(&content).cloned()
    }

    /// The cell of a version's properties, which is empty until they are known.
    pub(super) fn known(&mut self, version: &Version) -> Arc<OnceCell<Prepared>> {
        self.known.get_or_insert_ref(version, Arc::default).clone()
    }

    /// Forgets the cell of a version, unless another one has taken its place.
    pub(super) fn forget(&mut self, version: &Version, known: &Arc<OnceCell<Prepared>>) {
        if self.known.peek(version).is_some_and(|present| Arc::ptr_eq(present, known)) {
            self.known.pop(version);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_is_known_of_versions_and_contents_is_bounded() {
        let mut cache = Cache::<()>::new(1);
        let count = REMEMBERED.get() + 1000;
        let version = |i: usize| Version::of(Path::new(&format!("/nowhere/{i}")));
        let first = cache.known(&version(0));
        for i in 0..count {
            cache.known(&version(i));
            let mut content = [0; 32];
            content[..8].copy_from_slice(&i.to_le_bytes());
            let origin = Origin { folder: "folder".into(), vocab: 96, hidden_shift: None };
            cache.insert(ContentHash(content), Arc::new(()), 0, origin);
        }
        assert_eq!((cache.known.len(), cache.origins.len()), (REMEMBERED.get(), REMEMBERED.get()));
        assert!(
            !Arc::ptr_eq(&first, &cache.known(&version(0))),
            "the one that was used least recently is gone"
        );
        assert!(cache.origin(ContentHash([0; 32])).is_none());
    }
}
