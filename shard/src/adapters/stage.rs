//! Copies adapters into host memory, and removes them, as the router orders.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use kernels::Backend;
use model::{
    LoadError,
    adapter::{self, AdapterError, AdapterFolder, ContentHash, IsCancelled, MergeError, Recipe},
};
use tokio::{
    sync::{Mutex as AsyncMutex, OwnedMutexGuard},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    Adapters,
    files::{AdapterPart, OpenPart},
    host::{HostCopy, Properties},
};

/// The time after which a stage gives its permit to another one, so that files that cannot be read keep nobody waiting
/// who could be served.
const SLOW: Duration = Duration::from_secs(1);

/// An adapter that the router wants in host memory.
#[derive(Debug, Clone, PartialEq)]
pub struct StageOrder {
    /// The router's session.
    pub session: u64,
    /// The hash of its content, by which it is known from here on.
    pub content: ContentHash,
    /// Its name, for messages.
    pub name: String,
    /// Where its files are.
    pub parts: Vec<AdapterPart>,
    /// How its parts are merged. `None`: there is one part, which is the adapter as it is.
    pub merge: Option<Recipe>,
    /// Bytes that are reserved for it.
    pub max_bytes: u64,
}

/// The answer to a [`StageOrder`].
#[derive(Debug, Clone, PartialEq)]
pub enum StageAnswer {
    /// The adapter is in host memory.
    Staged(Arc<Properties>),
    /// It takes so many bytes, which are more than are reserved. Nothing was read but its headers.
    NeedsRoom(u64),
    /// A file is not there any more, or has changed since it was hashed.
    Gone,
}

/// Why an adapter could not be staged.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The call belongs to a session that is not the present one.
    #[error("a stage of session {got} in session {current}")]
    OtherSession {
        /// The call's session.
        got: u64,
        /// The session that has begun, or 0.
        current: u64,
    },
    /// Its content is named by a hash of another length.
    #[error("a content hash of {0} bytes")]
    ContentHash(usize),
    /// It has other than one part, and is not merged.
    #[error("adapter {name} has {parts} parts, and no way to merge them")]
    Parts {
        /// The adapter.
        name: String,
        /// The number of its parts.
        parts: usize,
    },
    /// A way to merge adapters is not known.
    #[error("a merge with {value} for its {field}")]
    Recipe {
        /// The field.
        field: &'static str,
        /// Its value.
        value: i32,
    },
    /// Its parts cannot be merged.
    #[error("adapter {name}: {source}")]
    Merge {
        /// The adapter.
        name: String,
        /// The cause.
        source: MergeError,
    },
    /// The order names no such file.
    #[error("adapter {name}: {file} is missing")]
    File {
        /// The adapter.
        name: String,
        /// The file.
        file: &'static str,
    },
    /// A file could not be opened.
    #[error("adapter {name}: {source}")]
    Io {
        /// The adapter.
        name: String,
        /// The cause.
        source: io::Error,
    },
    /// The files are not an adapter that this model can serve exactly.
    #[error("adapter {name}: {source}")]
    Adapter {
        /// The adapter.
        name: String,
        /// The cause.
        source: AdapterError,
    },
    /// The backend cannot stage it.
    #[error("adapter {name}: {source}")]
    Backend {
        /// The adapter.
        name: String,
        /// The cause.
        source: kernels::Error,
    },
    /// Reading it took too long.
    #[error("adapter {name} could not be read within {} s", limit.as_secs_f32())]
    Slow {
        /// The adapter.
        name: String,
        /// The time limit.
        limit: Duration,
    },
    /// The thread that read it died.
    #[error("adapter {name}: reading it was interrupted")]
    Interrupted {
        /// The adapter.
        name: String,
    },
}

impl StageError {
    /// Whether another attempt may succeed: the fault is not the adapter's.
    pub fn is_passing(&self) -> bool {
        let is_passing = |error: &io::Error| {
            let of_content =
                [io::ErrorKind::InvalidInput, io::ErrorKind::FileTooLarge, io::ErrorKind::UnexpectedEof];
            !of_content.contains(&error.kind())
        };
        let is_passing_fault = |error: &AdapterError| match error {
            AdapterError::File(LoadError::Io { source, .. }) => is_passing(source),
            _ => false,
        };
        match self {
            StageError::Io { source, .. } => is_passing(source),
            StageError::Adapter { source, .. } => is_passing_fault(source),
            StageError::Merge { source: MergeError::Part { source, .. }, .. } => is_passing_fault(source),
            StageError::Backend { source, .. } => !source.is_argument(),
            StageError::Interrupted { .. } | StageError::Slow { .. } => true,
            _ => false,
        }
    }
}

/// The right to work on a content: whoever has it knows that no thread reads that content.
type Turn = OwnedMutexGuard<()>;

/// Contents that are being staged or removed, each with the lock that orders the work on it.
#[derive(Default)]
pub(super) struct Turns(Mutex<HashMap<ContentHash, Weak<AsyncMutex<()>>>>);

impl Turns {
    async fn of(&self, content: ContentHash) -> Turn {
        let lock = {
            let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| turn.strong_count() > 0);
            let turn = turns.entry(content).or_default();
            turn.upgrade().unwrap_or_else(|| {
                let lock = Arc::default();
                *turn = Arc::downgrade(&lock);
                lock
            })
        };
        lock.lock_owned().await
    }
}

/// What came of reading an adapter.
pub(super) enum Read<A> {
    Copy(HostCopy<A>),
    NeedsRoom(u64),
    Gone,
}

impl<B: Backend> Adapters<B> {
    /// Copies an adapter into host memory. If this future is dropped, nothing is staged, and reading ends before the next
    /// tensor.
    pub async fn stage(self: &Arc<Self>, order: StageOrder) -> Result<StageAnswer, StageError> {
        let (session, content) = (order.session, order.content);
        self.host().expect(session)?;
        let turn = self.turns.of(content).await;
        if let Some(held) = self.staged(content) {
            return Ok(StageAnswer::Staged(held.properties));
        }
        // The turn comes back with the result, so that it ends when either has been used or dropped.
        let (read, _turn) = self.read_on_a_thread(order, turn).await?;
        let copy = match read {
            Read::Copy(copy) => copy,
            Read::NeedsRoom(bytes) => return Ok(StageAnswer::NeedsRoom(bytes)),
            Read::Gone => return Ok(StageAnswer::Gone),
        };
        let properties = copy.properties.clone();
        let mut host = self.host();
        let expected = host.expect(session);
        if let Err(error) = expected {
            drop(host);
            return Err(error);
        }
        host.insert(copy);
        Ok(StageAnswer::Staged(properties))
    }

    /// Removes an adapter from host memory. A stage of it that is under way ends first.
    pub async fn unstage(&self, session: u64, content: ContentHash) -> Result<(), StageError> {
        self.host().expect(session)?;
        let _turn = self.turns.of(content).await;
        let removed = {
            let mut host = self.host();
            host.expect(session)?;
            host.remove(content)
        };
        drop(removed);
        Ok(())
    }

    /// Reads an adapter on a thread of its own. If this future is dropped, the turn ends with the thread.
    async fn read_on_a_thread(
        self: &Arc<Self>,
        order: StageOrder,
        turn: Turn,
    ) -> Result<(Read<B::HostAdapter>, Turn), StageError> {
        let name = order.name.clone();
        let interrupted = || StageError::Interrupted { name: name.clone() };
        let permit = self.stages.acquire().await.map_err(|_| interrupted())?;
        let cancelled = CancellationToken::new();
        let _cancels = cancelled.clone().drop_guard();
        let this = self.clone();
        let mut reading = tokio::task::spawn_blocking(move || {
            let read = this.read_copy(&order, &cancelled);
            (read, turn)
        });
        let limit = self.read_timeout;
        let ended = match timeout(SLOW.min(limit), &mut reading).await {
            Ok(ended) => ended,
            Err(_) => {
                drop(permit);
                let Ok(ended) = timeout(limit.saturating_sub(SLOW), reading).await else {
                    tracing::error!(
                        "staging of adapter {name} has not ended within {} s",
                        limit.as_secs_f32()
                    );
                    return Err(StageError::Slow { name, limit });
                };
                ended
            }
        };
        let (read, turn) = ended.map_err(|error| {
            tracing::error!("staging of adapter {name} panicked: {error}");
            interrupted()
        })?;
        Ok((read?, turn))
    }

    fn read_copy(
        &self,
        order: &StageOrder,
        cancelled: &CancellationToken,
    ) -> Result<Read<B::HostAdapter>, StageError> {
        let mut opened = Vec::new();
        for part in &order.parts {
            let name = if order.merge.is_some() { &part.name } else { &order.name };
            match OpenPart::open(part, name)? {
                Some(part) => opened.push(part),
                None => return Ok(Read::Gone),
            }
        }
        let read = match (&order.merge, &opened[..]) {
            (Some(recipe), parts) => self.read_merge(order, recipe, parts, cancelled),
            (None, [part]) => self.read_part(order, part, &|| cancelled.is_cancelled()),
            (None, parts) => Err(StageError::Parts { name: order.name.clone(), parts: parts.len() }),
        };
        // Files that have changed meanwhile may have been read half before and half after that, and any error may come of
        // it.
        let are_unchanged = opened.iter().try_fold(true, |all, part| Ok(all && part.is_unchanged()?));
        match are_unchanged {
            Ok(true) => read,
            Ok(false) => Ok(Read::Gone),
            Err(source) => Err(StageError::Io { name: order.name.clone(), source }),
        }
    }

    fn read_part(
        &self,
        order: &StageOrder,
        opened: &OpenPart,
        is_cancelled: IsCancelled<'_>,
    ) -> Result<Read<B::HostAdapter>, StageError> {
        let name = || order.name.clone();
        let adapter_error = |source| StageError::Adapter { name: name(), source };
        let backend_error = |source| StageError::Backend { name: name(), source };
        let files = opened.files().map_err(|source| StageError::Io { name: name(), source })?;
        let folder = AdapterFolder::of(files, &self.model).map_err(adapter_error)?;
        let host_bytes = self.ops.host_bytes(&self.sites, &folder.shapes()).map_err(backend_error)?;
        if host_bytes as u64 > order.max_bytes {
            return Ok(Read::NeedsRoom(host_bytes as u64));
        }
        let staged = folder.stage(&*self.ops, &self.sites, order.content.number(), is_cancelled);
        let (adapter, read) = staged.map_err(|source| match source {
            AdapterError::Backend(source) => backend_error(source),
            source => adapter_error(source),
        })?;
        Ok(self.host_copy(order, adapter, read, host_bytes))
    }

    /// An adapter that has been staged, with its properties.
    pub(super) fn host_copy(
        &self,
        order: &StageOrder,
        adapter: B::HostAdapter,
        read: adapter::Properties,
        host_bytes: usize,
    ) -> Read<B::HostAdapter> {
        let properties = Properties {
            content: order.content,
            host_bytes,
            slot_bytes: self.ops.adapter_bytes(&adapter),
            max_lora_rank: read.max_lora_rank,
            sites: read.sites,
            vocab: read.vocab,
            beside_sums: read.beside_sums,
            invocation: read.invocation,
            hidden_shift: read.hidden_shift.map(Arc::from),
        };
        let Properties { slot_bytes, max_lora_rank, .. } = properties;
        tracing::info!(adapter = order.name, slot_bytes, max_lora_rank, "adapter ready in host memory");
        Read::Copy(HostCopy { properties: Arc::new(properties), adapter: Arc::new(adapter) })
    }
}
