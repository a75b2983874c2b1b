//! Stages: copies into the host memory of every rank, and their removal.

use std::{fs, io, path::Path, time::Duration};

use exchange::{Content, Fault, Place, StageFault, Staged};
use scheduler::AdapterKey;
use sources::Reference;
use store::Hold;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{Session, Shared, blocking, error::CallError};
use crate::{
    metrics::CallKind,
    ranks::StageError,
    wire::stage::{AdapterFile, AdapterPart, StageAnswer, StageOrder, Stamp},
};

/// Time between two attempts to remove a copy.
const AGAIN: Duration = Duration::from_millis(100);

/// What is to be staged.
pub(super) struct Order {
    pub(super) content: Content,
    pub(super) place: Place,
    pub(super) max_bytes: u64,
    pub(super) adapter: Reference,
}

impl Shared {
    /// Copies an adapter into the host memory of all ranks. `None` if the session ends before.
    pub(super) async fn stage(
        &self,
        order: &Order,
        session: &Session,
        abort: &CancellationToken,
    ) -> Option<Result<Staged, StageFault>> {
        let counted = self.means.metrics.call(CallKind::Stage);
        let staged = tokio::select! {
            staged = self.stage_in(order, session.number) => staged,
            () = session.ended.cancelled() => return None,
            () = abort.cancelled() => {
                // Some ranks may have it already.
                self.unstage(order.content, session).await?;
                Err(StageFault::Failed(Fault::Slow))
            }
        };
        if staged == Err(StageFault::Failed(Fault::SessionLost)) {
            // The engine is about to say so.
            session.ended.cancelled().await;
            return None;
        }
        let fault = match &staged {
            Err(StageFault::Failed(fault)) => Some(fault),
            _ => None,
        };
        counted.end(fault);
        Some(staged)
    }

    async fn stage_in(&self, order: &Order, session: u64) -> Result<Staged, StageFault> {
        let found = self.part_of(order).await.map_err(|error| error.stage_fault(&order.adapter))?;
        let (part, _hold) = found.ok_or(StageFault::Gone)?;
        let order = StageOrder {
            content: AdapterKey(order.content.0),
            name: order.adapter.to_string(),
            parts: vec![part],
            max_bytes: order.max_bytes,
        };
        match self.means.ranks.stage(session, &order).await {
            Ok(StageAnswer::Staged(staged)) => {
                Ok(Staged { host_bytes: staged.host_bytes, slot_bytes: staged.slot_bytes })
            }
            Ok(StageAnswer::NeedsRoom { bytes }) => Err(StageFault::NeedsRoom { bytes }),
            Ok(StageAnswer::Gone) => Err(StageFault::Gone),
            Err(error) => Err(StageFault::Failed(fault(&error))),
        }
    }

    /// Where the files of an adapter are, and what keeps them there. `None` if they are gone.
    async fn part_of(&self, order: &Order) -> Result<Option<(AdapterPart, Option<Hold>)>, CallError> {
        let part = |folder, files| AdapterPart { folder, files, weight: 1.0 };
        match order.place {
            Place::InPlace(version) => Ok(self.found(version).and_then(|found| {
                let file = |file: &sources::AdapterFile| AdapterFile {
                    name: file.name.clone(),
                    stamp: file.stamp.map(stamp),
                };
                Some((part(found.in_place.clone()?, found.files.iter().map(file).collect()), None))
            })),
            Place::Cache => {
                let (store, content) = (self.store()?, order.content);
                blocking(move || {
                    let Some(hold) = store.hold(content.0)? else { return Ok(None) };
                    let files = files_of(hold.folder())?;
                    Ok(Some((part(hold.folder().to_owned(), files), Some(hold))))
                })
                .await
            }
        }
    }

    /// Removes a copy from the host memory of all ranks. `None` if the session ends before.
    pub(super) async fn unstage(&self, content: Content, session: &Session) -> Option<()> {
        let unstage = async {
            while let Err(error) = self.means.ranks.unstage(session.number, AdapterKey(content.0)).await {
                tracing::warn!(adapter = ?content, "an adapter could not be removed from host memory: {error}");
                sleep(AGAIN).await;
            }
        };
        tokio::select! {
            () = unstage => Some(()),
            () = session.ended.cancelled() => None,
        }
    }
}

/// The files of a copy on the disk, which never change.
fn files_of(folder: &Path) -> io::Result<Vec<AdapterFile>> {
    let names = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<io::Result<Vec<_>>>()?;
    names.sort_unstable();
    Ok(names.into_iter().map(|name| AdapterFile { name, stamp: None }).collect())
}

fn stamp(stamp: sources::Stamp) -> Stamp {
    let sources::Stamp { device, inode, size, modified, changed } = stamp;
    Stamp { device, inode, size, modified, changed }
}

fn fault(error: &StageError) -> Fault {
    let message = error.to_string().into();
    match error {
        StageError::Invalid(_) => Fault::Invalid(message),
        StageError::Slow(_) => Fault::Slow,
        StageError::SessionEnded(_) => Fault::SessionLost,
        StageError::Unavailable(_) | StageError::Wire { .. } | StageError::Differs { .. } => {
            Fault::Ranks(message)
        }
    }
}
