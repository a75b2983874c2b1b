//! The LRU cache of adapters in host memory. An adapter is read and checked once, and is known by the hash of its
//! content.

mod cache;
mod files;
mod host;
mod merge;
mod resolve;
mod stage;
mod version;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, SystemTime},
};

use kernels::{Backend, LoraSite};
use model::adapter::{AdapterError, AdapterFolder, BaseModel, ContentHash};
use tokio::{
    runtime::Handle,
    sync::{OnceCell, Semaphore, oneshot},
    time::timeout,
};

use cache::{Cache, Origin};
pub use files::{AdapterFile, AdapterPart, Stamp};
use host::Host;
pub use host::{HostCopy, Properties};
pub use resolve::{ResolveError, Roots};
use stage::Turns;
pub use stage::{StageAnswer, StageError, StageOrder};
use version::Version;

/// The largest number of adapters that are read and checked at the same time. It is also bounded by half of the cores.
const PARALLEL: usize = 8;
/// The number of permits that the memory for reading is divided into.
const PARTS: usize = 1024;

/// Bounds on host memory and time.
#[derive(Debug, Clone, Copy)]
pub struct HostLimits {
    /// Bytes of the cache. Reading takes as many bytes at most beside it, unless a single adapter needs more.
    pub bytes: usize,
    /// How long reading and checking one adapter may take.
    pub read_timeout: Duration,
}

/// Why an adapter could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The reference does not lead to a folder that may be read.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// The files are not an adapter that this model can serve exactly.
    #[error("adapter {id}: {source}")]
    Adapter {
        /// The adapter, as it was named.
        id: String,
        /// The cause.
        source: AdapterError,
    },
    /// The backend cannot stage it.
    #[error("adapter {id}: {source}")]
    Stage {
        /// The adapter, as it was named.
        id: String,
        /// The cause.
        source: kernels::Error,
    },
    /// It is larger than the whole cache.
    #[error("adapter {id} takes {bytes} bytes, adapters have {limit}")]
    TooLarge {
        /// The adapter, as it was named.
        id: String,
        /// Its size.
        bytes: usize,
        /// The bound.
        limit: usize,
    },
    /// Reading it took too long. Other adapters are read meanwhile.
    #[error("adapter {id} could not be read within {} s", limit.as_secs_f32())]
    Slow {
        /// The adapter, as it was named.
        id: String,
        /// The time limit.
        limit: Duration,
    },
    /// The thread that read it died.
    #[error("adapter {id}: reading it was interrupted")]
    Interrupted {
        /// The adapter, as it was named.
        id: String,
    },
}

/// Why an adapter that was evicted could not be read again.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// This process has never prepared it, or has prepared tens of thousands of others since.
    #[error("it was never prepared")]
    Unknown,
    /// Its files have been replaced by another adapter's.
    #[error("its files have changed")]
    Changed,
    /// Its files can no longer be read.
    #[error(transparent)]
    Read(#[from] PrepareError),
}

/// Receives a host copy that is being read again.
pub type Fetch<B> = oneshot::Receiver<Result<Arc<<B as kernels::Adapters>::HostAdapter>, FetchError>>;

/// The properties of an adapter that has been prepared.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The hash of its content, which identifies it.
    pub content: ContentHash,
    /// Bytes that it takes in a slot.
    pub bytes: usize,
    /// Its largest LoRA rank.
    pub max_lora_rank: usize,
    /// The modules that it changes.
    pub sites: Vec<String>,
}

/// An adapter's properties and its host copy.
type Read<B> = (Prepared, Arc<<B as kernels::Adapters>::HostAdapter>);

/// The cache, and what is needed to fill it.
pub struct Adapters<B: Backend> {
    ops: Arc<B>,
    model: BaseModel,
    sites: Vec<LoraSite>,
    roots: Roots,
    limits: HostLimits,
    runtime: Handle,
    permits: Arc<Semaphore>,
    /// Memory for reading: each permit stands for [`Adapters::part`] bytes.
    memory: Arc<Semaphore>,
    cache: Mutex<Cache<B::HostAdapter>>,
    /// The adapters that the router has staged.
    host: Mutex<Host<B::HostAdapter>>,
    /// Permits for reading what is staged: as many as may read without taking the cores from those who compute.
    stages: Semaphore,
    /// Memory for merging beside the results.
    merges: merge::Memory,
    turns: Turns,
}

impl<B: Backend> Adapters<B> {
    /// Makes an empty cache of adapters in the folders of `roots`, which are read on `runtime`.
    pub fn new(
        ops: Arc<B>,
        model: BaseModel,
        sites: Vec<LoraSite>,
        roots: Roots,
        limits: HostLimits,
        runtime: Handle,
    ) -> Adapters<B> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Adapters {
            ops,
            model,
            sites,
            roots,
            limits,
            runtime,
            permits: Arc::new(Semaphore::new((cores / 2).clamp(1, PARALLEL))),
            memory: Arc::new(Semaphore::new(PARTS.min(limits.bytes.max(1)))),
            cache: Mutex::new(Cache::new(limits.bytes)),
            host: Mutex::default(),
            stages: Semaphore::new((cores / 2).clamp(1, PARALLEL)),
            merges: merge::Memory::default(),
            turns: Turns::default(),
        }
    }

    fn cache(&self) -> MutexGuard<'_, Cache<B::HostAdapter>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of one permit of the memory for reading.
    fn part(&self) -> usize {
        (self.limits.bytes / PARTS).max(1)
    }

    /// Resolves a reference, and makes sure that its adapter is in host memory. The reference is resolved every time,
    /// even if the adapter is cached, because resolving checks access.
    pub async fn prepare(self: &Arc<Self>, source: &str, id: &str) -> Result<Prepared, PrepareError> {
        let interrupted = |_| PrepareError::Interrupted { id: id.into() };
        let (this, source, name) = (self.clone(), source.to_owned(), id.to_owned());
        // Resolving reads the file system, which may be slow.
        let version = tokio::task::spawn_blocking(move || -> Result<_, PrepareError> {
            let now = SystemTime::now();
            Ok((Version::of(&this.roots.resolve_adapter(&source, &name)?), now))
        });
        let (version, now) = version.await.map_err(interrupted)??;
        let known = self.cache().known(&version);
        if let Some(prepared) = known.get().filter(|prepared| self.get(prepared.content).is_some()) {
            return Ok(prepared.clone());
        }
        // Reading has a task of its own, so that it goes on if this caller leaves while others wait for the same
        // adapter.
        let (this, name) = (self.clone(), id.to_owned());
        let reading =
            self.runtime.spawn(async move { this.read_version((version, now), known, &name).await });
        reading.await.map_err(interrupted)?
    }

    /// Reads a version that is not in memory, as it was at a time. Callers that ask for it at the same time share one
    /// read.
    async fn read_version(
        self: &Arc<Self>,
        (version, as_of): (Version, SystemTime),
        mut known: Arc<OnceCell<Prepared>>,
        id: &str,
    ) -> Result<Prepared, PrepareError> {
        if known.initialized() {
            // It has been evicted: read it again.
            let mut cache = self.cache();
            cache.forget(&version, &known);
            known = cache.known(&version);
        }
        let read = async || Ok(self.read(version.folder().to_owned(), id).await?.0);
        let result = known.get_or_try_init(read).await.cloned();
        let folder = version.folder().to_owned();
        let after = tokio::task::spawn_blocking(move || Version::of(&folder)).await;
        // A failure is not remembered, nor is an adapter whose files may have changed while they were read.
        if result.is_err() || !version.is_settled(as_of) || after.ok().as_ref() != Some(&version) {
            self.cache().forget(&version, &known);
        }
        result
    }

    async fn read(self: &Arc<Self>, folder: PathBuf, id: &str) -> Result<Read<B>, PrepareError> {
        let interrupted = || PrepareError::Interrupted { id: id.into() };
        let _permit = self.permits.clone().acquire_owned().await.map_err(|_| interrupted())?;
        let (this, id_there) = (self.clone(), id.to_owned());
        let reading = tokio::task::spawn_blocking(move || this.read_blocking(&folder, id_there));
        let limit = self.limits.read_timeout;
        match timeout(limit, reading).await {
            Ok(read) => read.map_err(|error| {
                tracing::error!("staging of adapter {id} panicked: {error}");
                interrupted()
            })?,
            Err(_) => {
                // The thread goes on and keeps its memory, but its permit is free for another adapter.
                tracing::error!("staging of adapter {id} has not ended within {} s", limit.as_secs_f32());
                Err(PrepareError::Slow { id: id.into(), limit })
            }
        }
    }

    fn read_blocking(&self, folder: &Path, id: String) -> Result<Read<B>, PrepareError> {
        let adapter_error = |source| PrepareError::Adapter { id: id.clone(), source };
        let stage_error = |source| PrepareError::Stage { id: id.clone(), source };
        let opened = AdapterFolder::open(folder, &self.model).map_err(adapter_error)?;
        let shapes = opened.shapes();
        let host_bytes = self.ops.host_bytes(&self.sites, &shapes).map_err(stage_error)?;
        if host_bytes > self.limits.bytes {
            return Err(PrepareError::TooLarge { id, bytes: host_bytes, limit: self.limits.bytes });
        }
        // Reading takes memory for the host copy and for the tensors that are read.
        let parts = (host_bytes + opened.read_bytes()).div_ceil(self.part());
        let parts = parts.min(PARTS.min(self.limits.bytes.max(1))) as u32;
        // The caller waits no longer than this. The thread must not wait longer either: the number of threads is
        // limited.
        let limit = self.limits.read_timeout;
        let memory = self.runtime.block_on(async { timeout(limit, self.memory.acquire_many(parts)).await });
        let Ok(memory) = memory else { return Err(PrepareError::Slow { id, limit }) };
        let Ok(_memory) = memory else { return Err(PrepareError::Interrupted { id }) };
        let adapter = opened.read().map_err(adapter_error)?;
        // Evict other adapters before memory is allocated for this one.
        self.cache().reserve(host_bytes);
        let staged = self.ops.stage(&self.sites, &adapter.parts);
        let mut cache = self.cache();
        cache.release(host_bytes);
        let staged = Arc::new(staged.map_err(stage_error)?);
        let bytes = self.ops.adapter_bytes(&staged);
        let hidden_shift = adapter.hidden_shift.map(Arc::from);
        let origin = Origin { folder: folder.to_owned(), vocab: adapter.vocab, hidden_shift };
        let staged = cache.insert(adapter.hash, staged, host_bytes, origin);
        drop(cache);
        let lora_rank = adapter.max_lora_rank;
        tracing::info!(adapter = id, bytes, lora_rank, "adapter ready in host memory");
        let prepared =
            Prepared { content: adapter.hash, bytes, max_lora_rank: lora_rank, sites: adapter.sites };
        Ok((prepared, staged))
    }

    /// The host copy of an adapter, if it is in memory.
    pub fn get(&self, content: ContentHash) -> Option<Arc<B::HostAdapter>> {
        self.staged(content).map(|copy| copy.adapter).or_else(|| self.cache().get(content))
    }

    /// The number of tokens that an adapter has rows for, including those of the model.
    pub fn vocab(&self, content: ContentHash) -> usize {
        if let Some(copy) = self.staged(content) {
            return copy.properties.vocab;
        }
        self.cache().origin(content).map_or(self.model.decoder.vocab, |origin| origin.vocab)
    }

    /// The vector that an adapter adds to hidden states.
    pub fn hidden_shift(&self, content: ContentHash) -> Option<Arc<[f32]>> {
        if let Some(copy) = self.staged(content) {
            return copy.properties.hidden_shift.clone();
        }
        self.cache().origin(content)?.hidden_shift
    }

    /// The adapters in host memory, and the bytes that each takes.
    pub fn held(&self) -> Vec<(ContentHash, usize)> {
        self.cache().held()
    }

    /// Reads an adapter again that was evicted after it had been prepared. The result holds the host copy itself, so
    /// that it cannot be evicted again before it is used.
    pub fn fetch(self: &Arc<Self>, content: ContentHash) -> Fetch<B> {
        let (found, waiting) = oneshot::channel();
        let this = self.clone();
        self.runtime.spawn(async move {
            // Sending fails if the slot has been emptied meanwhile.
            let _ = found.send(this.read_again(content).await);
        });
        waiting
    }

    async fn read_again(self: &Arc<Self>, content: ContentHash) -> Result<Arc<B::HostAdapter>, FetchError> {
        let Origin { folder, .. } = self.cache().origin(content).ok_or(FetchError::Unknown)?;
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (prepared, adapter) = self.read(folder, &name).await?;
        if prepared.content == content { Ok(adapter) } else { Err(FetchError::Changed) }
    }
}
