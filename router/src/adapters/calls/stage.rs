//! Stages: copies into the host memory of every rank, and their removal.

use std::{
    fs, io,
    path::Path,
    time::{Duration, Instant},
};

use exchange::{Content, Fault, Place, StageFault, Version};
use scheduler::AdapterKey;
use sources::is_of_text;
use store::Hold;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{Payload, Session, Shared, blocking, error::CallError};
use crate::{
    adapters::{Merge, Part, Recipe},
    metrics::CallKind,
    ranks::StageError,
    wire::stage::{AdapterFile, AdapterPart, StageAnswer, StageOrder, Staged},
};

/// Where the files of an adapter are, and what keeps them there.
type Files = (AdapterPart, Option<Hold>);
/// The same of a merge, and how it is merged.
type MergeFiles = (Vec<AdapterPart>, Option<Recipe>, Vec<Hold>);

/// Time between two attempts to remove a copy.
const AGAIN: Duration = Duration::from_millis(100);

/// What is to be staged.
pub(super) struct Order {
    pub(super) content: Content,
    pub(super) place: Place,
    pub(super) max_bytes: u64,
    pub(super) payload: Payload,
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
            staged = self.stage_in(order, session) => staged,
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

    async fn stage_in(&self, order: &Order, session: &Session) -> Result<Staged, StageFault> {
        let Order { content, max_bytes, ref payload, .. } = *order;
        let found = match payload {
            Payload::Adapter(wanted) => {
                let part = self.part_of(order).await.map_err(|error| error.stage_fault(&wanted.reference))?;
                part.map(|(part, hold)| (vec![part], None, Vec::from_iter(hold)))
            }
            Payload::Merge(merge) => self.parts_of(merge).await?,
        };
        let (parts, merge, _holds) = found.ok_or(StageFault::Gone)?;
        let name = match payload {
            Payload::Adapter(wanted) => wanted.reference.to_string(),
            Payload::Merge(merge) => merge.name(),
        };
        let order =
            StageOrder { content: AdapterKey(content.0), name: name.clone(), parts, merge, max_bytes };
        let begun = Instant::now();
        match self.means.ranks.stage(session.number, &order).await {
            Ok(StageAnswer::Staged(staged)) => {
                self.means.book.staged(content, staged.clone(), begun.elapsed());
                let rank = staged.max_lora_rank;
                let Some(most) = self.means.max_lora_rank.filter(|most| rank > *most) else {
                    return Ok(staged);
                };
                // If the session ends meanwhile, nobody waits for the answer.
                self.unstage(content, session).await;
                let message =
                    format!("adapter \"{name}\" has LoRA rank {rank}, and --max-lora-rank is {most}");
                Err(StageFault::Failed(Fault::Invalid(message.into())))
            }
            Ok(StageAnswer::NeedsRoom { bytes }) => Err(StageFault::NeedsRoom { bytes }),
            Ok(StageAnswer::Gone) => Err(StageFault::Gone),
            Err(error) => Err(StageFault::Failed(fault(&error))),
        }
    }

    /// Where the files of an adapter are, and what keeps them there. `None` if they are gone.
    async fn part_of(&self, order: &Order) -> Result<Option<Files>, CallError> {
        match order.place {
            Place::InPlace(version) => Ok(self.in_place(version)),
            Place::Cache => self.cached(order.content).await,
        }
    }

    /// The same of the parts of a merge. They are known by their contents alone, so that it does not matter which of
    /// several copies is read.
    async fn parts_of(&self, merge: &Merge) -> Result<Option<MergeFiles>, StageFault> {
        let (mut parts, mut holds) = (Vec::new(), Vec::new());
        for Part { name, content, weight } in &merge.parts {
            let cached = match self.means.store {
                Some(_) => self.cached(*content).await.map_err(|error| error.stage_fault(name))?,
                None => None,
            };
            let Some((part, hold)) = cached.or_else(|| self.in_place(self.version_in_place(*content)?))
            else {
                return Ok(None);
            };
            parts.push(AdapterPart { name: name.clone(), weight: *weight, ..part });
            holds.extend(hold);
        }
        Ok(Some((parts, Some(merge.recipe), holds)))
    }

    /// The files of a version that is read where it lies.
    fn in_place(&self, version: Version) -> Option<Files> {
        let found = self.found(version)?;
        let file = |file: &sources::AdapterFile| AdapterFile { name: file.name.clone(), stamp: file.stamp };
        let files = found.files.iter().filter(|file| !is_of_text(&file.name)).map(file);
        Some((AdapterPart::new(found.in_place.clone()?, files.collect()), None))
    }

    /// The files of a copy on the disk.
    async fn cached(&self, content: Content) -> Result<Option<Files>, CallError> {
        let store = self.store()?;
        blocking(move || {
            let Some(hold) = store.hold(content.0)? else { return Ok(None) };
            let files = files_of(hold.folder())?;
            Ok(Some((AdapterPart::new(hold.folder().to_owned(), files), Some(hold))))
        })
        .await
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

/// The files of a copy on the disk that shards read, which never change. They lie in no folder of their own.
fn files_of(folder: &Path) -> io::Result<Vec<AdapterFile>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_file() && !is_of_text(&name) {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names.into_iter().map(|name| AdapterFile { name, stamp: None }).collect())
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
