//! Adapters in host memory: resolved with the caller's rights, read and checked once, kept by content.

mod cache;
mod resolve;
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

use cache::Cache;
pub use resolve::{ResolveError, Roots};
use version::Version;

/// Most adapters that are read and checked at the same time; half of the cores are for others, too.
const PARALLEL: usize = 8;
/// Parts that the memory for reading is counted in.
const PARTS: usize = 1024;

/// How much adapters may take.
#[derive(Debug, Clone, Copy)]
pub struct HostLimits {
    /// Bytes of host memory that they are kept in. What is read at the same time takes no more than that beside them,
    /// unless a single one takes more.
    pub bytes: usize,
    /// How long one may take to be read and checked.
    pub read_timeout: Duration,
}

/// Why an adapter cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The reference leads nowhere, or where the caller may not read.
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
    /// It cannot be laid out.
    #[error("adapter {id}: {source}")]
    Stage {
        /// The adapter, as it was named.
        id: String,
        /// The cause.
        source: kernels::Error,
    },
    /// It alone is larger than all of the memory for adapters.
    #[error("adapter {id} takes {bytes} bytes, adapters have {limit}")]
    TooLarge {
        /// The adapter, as it was named.
        id: String,
        /// Its size.
        bytes: usize,
        /// The bound.
        limit: usize,
    },
    /// It takes too long to be read. Others are read meanwhile.
    #[error("adapter {id} could not be read within {} s", limit.as_secs_f32())]
    Slow {
        /// The adapter, as it was named.
        id: String,
        /// The time that it had.
        limit: Duration,
    },
    /// The thread that read it died.
    #[error("adapter {id}: reading it was interrupted")]
    Interrupted {
        /// The adapter, as it was named.
        id: String,
    },
}

/// Why an adapter that was prepared cannot be had again.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// This process has never read it, or has read tens of thousands of others since.
    #[error("it was never prepared")]
    Unknown,
    /// Its files are another adapter by now.
    #[error("its files have changed")]
    Changed,
    /// Its files cannot be read any more.
    #[error(transparent)]
    Read(#[from] PrepareError),
}

/// A host copy on its way.
pub type Fetch<B> = oneshot::Receiver<Result<Arc<<B as kernels::Adapters>::HostAdapter>, FetchError>>;

/// What a caller learns of an adapter.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// Its identity.
    pub content: ContentHash,
    /// Bytes in a slot.
    pub bytes: usize,
    /// Its largest LoRA rank.
    pub max_lora_rank: usize,
    /// Modules that it changes.
    pub sites: Vec<String>,
}

/// What is known of an adapter, and its host copy.
type Read<B> = (Prepared, Arc<<B as kernels::Adapters>::HostAdapter>);

/// See the module.
pub struct Adapters<B: Backend> {
    ops: Arc<B>,
    model: BaseModel,
    sites: Vec<LoraSite>,
    roots: Roots,
    limits: HostLimits,
    runtime: Handle,
    permits: Arc<Semaphore>,
    /// Memory for reading, in parts of [`Adapters::part`] bytes.
    memory: Arc<Semaphore>,
    cache: Mutex<Cache<B::HostAdapter>>,
}

impl<B: Backend> Adapters<B> {
    /// An empty cache over the folders of `roots`; what it reads by itself, it reads on `runtime`.
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
        }
    }

    fn cache(&self) -> MutexGuard<'_, Cache<B::HostAdapter>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of a part of the memory for reading.
    fn part(&self) -> usize {
        (self.limits.bytes / PARTS).max(1)
    }

    /// Resolves a reference and makes sure that its adapter is in host memory. The reference is resolved every time,
    /// whatever is cached: that is where access is checked.
    pub async fn prepare(self: &Arc<Self>, source: &str, id: &str) -> Result<Prepared, PrepareError> {
        let interrupted = |_| PrepareError::Interrupted { id: id.into() };
        let (this, source, name) = (self.clone(), source.to_owned(), id.to_owned());
        // Folders may be far away.
        let version = tokio::task::spawn_blocking(move || -> Result<_, PrepareError> {
            let now = SystemTime::now();
            Ok((Version::of(&this.roots.resolve(&source, &name)?), now))
        });
        let (version, now) = version.await.map_err(interrupted)??;
        let known = self.cache().known(&version);
        if let Some(prepared) = known.get().filter(|prepared| self.get(prepared.content).is_some()) {
            return Ok(prepared.clone());
        }
        // A task of its own: it goes on when its caller leaves, whom others may have joined.
        let (this, name) = (self.clone(), id.to_owned());
        let reading =
            self.runtime.spawn(async move { this.read_version((version, now), known, &name).await });
        reading.await.map_err(interrupted)?
    }

    /// Reads a version, as of a time, that is not in memory, once for all who ask at the same time.
    async fn read_version(
        self: &Arc<Self>,
        (version, as_of): (Version, SystemTime),
        mut known: Arc<OnceCell<Prepared>>,
        id: &str,
    ) -> Result<Prepared, PrepareError> {
        if known.initialized() {
            // Evicted since: read it again.
            let mut cache = self.cache();
            cache.forget(&version, &known);
            known = cache.known(&version);
        }
        let read = async || Ok(self.read(version.folder().to_owned(), id).await?.0);
        let result = known.get_or_try_init(read).await.cloned();
        let folder = version.folder().to_owned();
        let after = tokio::task::spawn_blocking(move || Version::of(&folder)).await;
        // A broken adapter is read anew when it is asked for again, and so is one whose files may have changed since.
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
                // It keeps its memory, but not its place among those that are read.
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
        // Beside its host copy, what is read of it.
        let parts = (host_bytes + model::adapter::read_bytes(&shapes, &self.sites)).div_ceil(self.part());
        let parts = parts.min(PARTS.min(self.limits.bytes.max(1))) as u32;
        // Whoever asked waits no longer than this, and a thread must not wait longer: there is a limited number.
        let limit = self.limits.read_timeout;
        let memory = self.runtime.block_on(async { timeout(limit, self.memory.acquire_many(parts)).await });
        let Ok(memory) = memory else { return Err(PrepareError::Slow { id, limit }) };
        let Ok(_memory) = memory else { return Err(PrepareError::Interrupted { id }) };
        let adapter = opened.read().map_err(adapter_error)?;
        // Others are evicted before memory is taken in their place.
        self.cache().reserve(host_bytes);
        let staged = self.ops.stage(&self.sites, &adapter.parts);
        let mut cache = self.cache();
        cache.release(host_bytes);
        let staged = Arc::new(staged.map_err(stage_error)?);
        let bytes = self.ops.adapter_bytes(&staged);
        let staged = cache.insert(adapter.hash, staged, host_bytes, folder.to_owned());
        drop(cache);
        let lora_rank = adapter.max_lora_rank;
        tracing::info!(adapter = id, bytes, lora_rank, "adapter ready in host memory");
        let prepared =
            Prepared { content: adapter.hash, bytes, max_lora_rank: lora_rank, sites: adapter.sites };
        Ok((prepared, staged))
    }

    /// The host copy of an adapter, if it is still there.
    pub fn get(&self, content: ContentHash) -> Option<Arc<B::HostAdapter>> {
        self.cache().get(content)
    }

    /// The adapters in host memory, and the bytes that each takes.
    pub fn held(&self) -> Vec<(ContentHash, usize)> {
        self.cache().held()
    }

    /// Reads an adapter again that memory pressure has taken since it was prepared. Whoever holds the result has the
    /// copy: it cannot be taken once more before it is used.
    pub fn fetch(self: &Arc<Self>, content: ContentHash) -> Fetch<B> {
        let (found, waiting) = oneshot::channel();
        let this = self.clone();
        self.runtime.spawn(async move {
            // The slot may not be wanted any more.
            let _ = found.send(this.read_again(content).await);
        });
        waiting
    }

    async fn read_again(self: &Arc<Self>, content: ContentHash) -> Result<Arc<B::HostAdapter>, FetchError> {
        let folder = self.cache().folder(content).ok_or(FetchError::Unknown)?;
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (prepared, adapter) = self.read(folder, &name).await?;
        if prepared.content == content { Ok(adapter) } else { Err(FetchError::Changed) }
    }
}
