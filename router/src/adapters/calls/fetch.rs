//! Fetches: copies to the disk, and hashes of folders that are read where they lie.

use std::{
    sync::{
        PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use exchange::{Content, Fault, Fetched, Version};
use sources::{Destination, Found};
use store::{Deletion, Partial, Store, StoreError};
use tokio_util::sync::CancellationToken;

use super::{Shared, blocking, caught, error::CallError, in_place};
use crate::{
    adapters::{Wanted, ids},
    metrics::CallKind,
};

impl Shared {
    /// Gets the bytes of a version, and their hash.
    pub(super) async fn fetch(
        &self,
        version: Version,
        max_bytes: u64,
        wanted: &Wanted,
        abort: &CancellationToken,
    ) -> Result<Fetched, Fault> {
        let counted = self.means.metrics.call(CallKind::Fetch);
        let begun = Instant::now();
        let found = self.found(version);
        let in_place = found.clone().and_then(|found| Some((found.in_place.clone()?, found)));
        let result = match in_place {
            Some((folder, found)) => {
                let hashed = blocking(move || in_place::hash(&found, &folder)).await;
                if let Ok(Fetched { content, .. }) = hashed {
                    self.in_place.lock().unwrap_or_else(PoisonError::into_inner).put(content, version);
                }
                hashed
            }
            None => caught(self.copy(version, found.as_deref(), max_bytes, wanted, abort)).await,
        };
        let result = result.map_err(|error| error.fault(&wanted.reference));
        counted.end(result.as_ref().err());
        if let Ok(fetched) = &result {
            self.means.book.fetched(fetched.content, fetched.bytes, begun.elapsed());
        }
        result
    }

    async fn copy(
        &self,
        version: Version,
        found: Option<&Found>,
        max_bytes: u64,
        wanted: &Wanted,
        abort: &CancellationToken,
    ) -> Result<Fetched, CallError> {
        let store = self.store()?;
        let reference = ids::reference(&wanted.reference).0.to_le_bytes();
        // Another server that shares the cache may have it.
        let there = blocking(move || {
            let there = store.find(version.0)?;
            if there.is_some() {
                store.name(reference, version.0)?;
            }
            Ok(there)
        });
        if let Some(there) = there.await? {
            return Ok(fetched(there));
        }
        // One whose files have been forgotten is looked up again.
        let found = found.ok_or(Fault::Changed)?;
        let store = self.store()?;
        let partial = blocking(move || Ok(reserve(&store, max_bytes)?)).await?;
        let downloaded = tokio::select! {
            downloaded = self.download(found, &partial, max_bytes, wanted) => downloaded,
            () = abort.cancelled() => Err(Fault::Slow.into()),
        };
        blocking(move || {
            // Dropping it removes it.
            let partial = downloaded.map(|()| partial)?;
            Ok(fetched(partial.publish(version.0, reference)?))
        })
        .await
    }

    async fn download(
        &self,
        found: &Found,
        partial: &Partial,
        max_bytes: u64,
        wanted: &Wanted,
    ) -> Result<(), CallError> {
        let so_far = AtomicU64::new(0);
        let progress = |bytes: u64| {
            let before = so_far.fetch_max(bytes, Ordering::Relaxed);
            self.means.metrics.downloaded_bytes.increment(bytes.saturating_sub(before));
        };
        let into = Destination { folder: partial.folder(), max_bytes, progress: &progress };
        let Wanted { reference, credential } = wanted;
        Ok(self.means.sources.fetch(reference, found, credential.as_ref(), into).await?)
    }

    /// Removes a copy from the disk. One that another server uses stays there for that one.
    pub(super) async fn delete(&self, content: Content) {
        let Ok(store) = self.store() else { return };
        match blocking(move || Ok(store.delete(content.0)?)).await {
            Ok(Deletion::Gone) => {}
            Ok(Deletion::Held) => {
                tracing::debug!(adapter = ?content, "another server keeps an adapter on the disk")
            }
            Err(error) => {
                tracing::warn!(adapter = ?content, "an adapter could not be removed from the disk: {error}")
            }
        }
    }
}

/// Takes room on the disk. There is some as far as this server knows; if others that share the folder have taken it, what
/// was used least of all goes, whoever has fetched it: one that is missed later is fetched again.
fn reserve(store: &Store, bytes: u64) -> Result<Partial, StoreError> {
    match store.reserve(bytes) {
        Err(StoreError::Full { .. }) => {
            store.make_room(bytes)?;
            store.reserve(bytes)
        }
        answer => answer,
    }
}

fn fetched(there: store::Fetched) -> Fetched {
    Fetched { content: Content(there.content), bytes: there.bytes }
}
