//! Lookups: may this credential read this reference, and what does it name?

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use exchange::{Fault, Found, Version};
use sources::{Reference, SourceError, SourceKind};
use tokio_util::sync::CancellationToken;

use super::{Shared, blocking, caught, error::CallError};
use crate::{
    adapters::{Wanted, ids},
    metrics::CallKind,
};

impl Shared {
    /// Asks the source. If it must not be asked, what the reference led to last is the answer.
    pub(super) async fn look_up(&self, wanted: &Wanted, abort: &CancellationToken) -> Result<Found, Fault> {
        let counted = self.means.metrics.call(CallKind::Lookup);
        let result = match caught(self.ask_source(wanted, abort)).await {
            Err(CallError::Source(offline @ SourceError::Offline { .. })) => {
                self.last_found(&wanted.reference).await.and_then(|found| found.ok_or(offline.into()))
            }
            result => result,
        };
        let result = result.map_err(|error| error.fault(&wanted.reference));
        counted.end(result.as_ref().err());
        result
    }

    async fn ask_source(&self, wanted: &Wanted, abort: &CancellationToken) -> Result<Found, CallError> {
        let Wanted { reference, credential } = wanted;
        let lookup = self.means.sources.lookup(reference, credential.as_ref());
        let found = if reference.kind == SourceKind::Local {
            // A thread that hangs in a file system goes on, whatever becomes of whoever waits for it.
            lookup.await?
        } else {
            tokio::select! {
                found = lookup => found?,
                () = abort.cancelled() => return Err(Fault::Slow.into()),
            }
        };
        let version = Version(found.version);
        let fresh_for = if found.is_free { Duration::ZERO } else { self.means.fresh_for };
        let answer = Found { version, bytes: found.bytes, in_place: found.in_place.is_some(), fresh_for };
        self.found.lock().unwrap_or_else(PoisonError::into_inner).put(version, Arc::new(found));
        Ok(answer)
    }

    /// What is on the disk of a reference.
    async fn last_found(&self, reference: &Reference) -> Result<Option<Found>, CallError> {
        let (store, fresh_for) = (self.store()?, self.means.fresh_for);
        let name = ids::reference(reference).0.to_le_bytes();
        blocking(move || {
            let Some(version) = store.named(name)? else { return Ok(None) };
            let fetched = store.find(version)?;
            let found = |bytes| Found { version: Version(version), bytes, in_place: false, fresh_for };
            Ok(fetched.map(|fetched| found(fetched.bytes)))
        })
        .await
    }
}
