//! Adapters in host memory, by content, and what is known of folders.

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

/// Versions and contents that are remembered: each takes a few hundred bytes.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1 << 16).expect("not zero");

struct Resident<A> {
    adapter: Arc<A>,
    bytes: usize,
}

/// See the module.
pub(super) struct Cache<A> {
    /// Bytes of the resident adapters, and of those that are being laid out, at most.
    limit: usize,
    resident: LruCache<ContentHash, Resident<A>>,
    bytes: usize,
    /// Bytes of adapters that are being laid out.
    reserved: usize,
    /// Adapters that were evicted while a slot held them, whose memory they are since.
    lent: HashMap<ContentHash, Weak<A>>,
    /// What is known of versions; shared by callers who ask at the same time.
    known: LruCache<Version, Arc<OnceCell<Prepared>>>,
    /// Where each adapter was read last.
    folders: LruCache<ContentHash, PathBuf>,
}

impl<A> Cache<A> {
    /// An empty cache of at most `limit` bytes.
    pub(super) fn new(limit: usize) -> Cache<A> {
        Cache {
            limit,
            resident: LruCache::unbounded(),
            bytes: 0,
            reserved: 0,
            lent: HashMap::new(),
            known: LruCache::new(REMEMBERED),
            folders: LruCache::new(REMEMBERED),
        }
    }

    /// The host copy of an adapter, if it is still there.
    pub(super) fn get(&mut self, content: ContentHash) -> Option<Arc<A>> {
        match self.resident.get(&content) {
            Some(resident) => Some(resident.adapter.clone()),
            None => self.lent.get(&content)?.upgrade(),
        }
    }

    /// Evicts the adapters that were used least recently until `bytes` more fit. Callers keep what is reserved at the
    /// same time below the limit.
    pub(super) fn reserve(&mut self, bytes: usize) {
        self.reserved += bytes;
        self.lent.retain(|_, adapter| adapter.strong_count() > 0);
        while self.bytes + self.reserved > self.limit {
            let Some((content, evicted)) = self.resident.pop_lru() else { break };
            self.bytes -= evicted.bytes;
            self.lent.insert(content, Arc::downgrade(&evicted.adapter));
        }
    }

    /// Gives back what [`Self::reserve`] has set aside.
    pub(super) fn release(&mut self, bytes: usize) {
        self.reserved -= bytes;
    }

    /// Keeps an adapter that was read from a folder, in memory that was reserved until now. Returns the copy to use: the one that
    /// was there before, if there was one.
    pub(super) fn insert(
        &mut self,
        content: ContentHash,
        adapter: Arc<A>,
        bytes: usize,
        folder: PathBuf,
    ) -> Arc<A> {
        self.folders.put(content, folder);
        if let Some(resident) = self.get(content) {
            return resident;
        }
        self.bytes += bytes;
        self.resident.put(content, Resident { adapter: adapter.clone(), bytes });
        adapter
    }

    /// The adapters that are kept, and the bytes that each takes.
    pub(super) fn held(&self) -> Vec<(ContentHash, usize)> {
        self.resident.iter().map(|(content, resident)| (*content, resident.bytes)).collect()
    }

    /// Where an adapter was read last.
    pub(super) fn folder(&mut self, content: ContentHash) -> Option<PathBuf> {
        self.folders.get(&content).cloned()
    }

    /// What is known of a version, which may be nothing yet.
    pub(super) fn known(&mut self, version: &Version) -> Arc<OnceCell<Prepared>> {
        self.known.get_or_insert_ref(version, Arc::default).clone()
    }

    /// Forgets what was known of a version, unless somebody has learnt it anew since.
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
            cache.insert(ContentHash(content), Arc::new(()), 0, "folder".into());
        }
        assert_eq!((cache.known.len(), cache.folders.len()), (REMEMBERED.get(), REMEMBERED.get()));
        assert!(
            !Arc::ptr_eq(&first, &cache.known(&version(0))),
            "the one that was used least recently is gone"
        );
        assert_eq!(cache.folder(ContentHash([0; 32])), None);
    }
}
