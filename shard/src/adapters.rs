//! Adapters in host memory: resolved with the caller's rights, read and checked once, kept by content.

mod resolve;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::SystemTime,
};

use kernels::{Backend, LoraSite};
use model::adapter::{self, AdapterError, BaseModel, ContentHash};
use tokio::{
    runtime::Handle,
    sync::{OnceCell, Semaphore, oneshot},
};

pub use resolve::{ResolveError, Roots};

/// Most adapters that are read and checked at the same time; half of the cores are for others, too.
const PARALLEL: usize = 8;

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
    /// This process has never read it.
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
pub type Fetch<B> = oneshot::Receiver<Result<Arc<<B as Backend>::HostAdapter>, FetchError>>;

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

/// A folder as it was when it was read: when one of the files changes, it is another adapter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Version {
    folder: PathBuf,
    files: Vec<Option<(u64, SystemTime)>>,
}

/// What is known of an adapter, and its host copy.
type Read<B> = (Prepared, Arc<<B as Backend>::HostAdapter>);

struct Resident<B: Backend> {
    adapter: Arc<B::HostAdapter>,
    bytes: usize,
    used: u64,
}

struct Cache<B: Backend> {
    /// What is known of versions; shared by callers who ask at the same time.
    known: HashMap<Version, Arc<OnceCell<Prepared>>>,
    resident: HashMap<ContentHash, Resident<B>>,
    /// Where each adapter was read last.
    folders: HashMap<ContentHash, PathBuf>,
    bytes: usize,
    clock: u64,
}

/// See the module.
pub struct Adapters<B: Backend> {
    ops: Arc<B>,
    model: BaseModel,
    sites: Vec<LoraSite>,
    roots: Roots,
    limit: usize,
    runtime: Handle,
    permits: Arc<Semaphore>,
    cache: Mutex<Cache<B>>,
}

impl<B: Backend> Adapters<B> {
    /// An empty cache of at most `limit` bytes, over the folders of `roots`; what it reads by itself, it reads on
    /// `runtime`.
    pub fn new(
        ops: Arc<B>,
        model: BaseModel,
        sites: Vec<LoraSite>,
        roots: Roots,
        limit: usize,
        runtime: Handle,
    ) -> Adapters<B> {
        let cache = Cache {
            known: HashMap::new(),
            resident: HashMap::new(),
            folders: HashMap::new(),
            bytes: 0,
            clock: 0,
        };
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Adapters {
            ops,
            model,
            sites,
            roots,
            limit,
            runtime,
            permits: Arc::new(Semaphore::new((cores / 2).clamp(1, PARALLEL))),
            cache: Mutex::new(cache),
        }
    }

    fn cache(&self) -> MutexGuard<'_, Cache<B>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves a reference and makes sure that its adapter is in host memory. The reference is resolved every time,
    /// whatever is cached: that is where access is checked.
    pub async fn prepare(self: &Arc<Self>, source: &str, id: &str) -> Result<Prepared, PrepareError> {
        let interrupted = |_| PrepareError::Interrupted { id: id.into() };
        let (this, source, name) = (self.clone(), source.to_owned(), id.to_owned());
        // Folders may be far away.
        let version = tokio::task::spawn_blocking(move || this.version(&source, &name));
        let version = version.await.map_err(interrupted)??;
        let known = self.cache().known.entry(version.clone()).or_default().clone();
        if let Some(prepared) = known.get().filter(|prepared| self.get(prepared.content).is_some()) {
            return Ok(prepared.clone());
        }
        // A task of its own: it goes on when its caller leaves, whom others may have joined.
        let (this, name) = (self.clone(), id.to_owned());
        let reading = self.runtime.spawn(async move { this.read_version(version, known, &name).await });
        reading.await.map_err(interrupted)?
    }

    /// A folder as it is now.
    fn version(&self, source: &str, id: &str) -> Result<Version, PrepareError> {
        let folder = self.roots.resolve(source, id)?;
        let file = |name| {
            let data = folder.join(name).metadata().ok()?;
            Some((data.len(), data.modified().ok()?))
        };
        let files = [adapter::CONFIG_FILE, adapter::WEIGHTS_FILE].map(file).to_vec();
        Ok(Version { folder, files })
    }

    /// Reads a version that is not in memory, once for all who ask at the same time.
    async fn read_version(
        self: &Arc<Self>,
        version: Version,
        mut known: Arc<OnceCell<Prepared>>,
        id: &str,
    ) -> Result<Prepared, PrepareError> {
        if known.initialized() {
            // Evicted since: read it again.
            let mut cache = self.cache();
            let entry = cache.known.entry(version.clone()).or_default();
            if Arc::ptr_eq(entry, &known) {
                *entry = Arc::default();
            }
            known = entry.clone();
        }
        let read = async || Ok(self.read(version.folder.clone(), id).await?.0);
        let result = known.get_or_try_init(read).await.cloned();
        let mut cache = self.cache();
        match &result {
            // What the folder was before is not asked for any more.
            Ok(_) => cache.known.retain(|other, _| other.folder != version.folder || *other == version),
            // A broken adapter leaves nothing behind, and is read anew when it is asked for again.
            Err(_) => drop(cache.known.remove(&version)),
        }
        result
    }

    async fn read(self: &Arc<Self>, folder: PathBuf, id: &str) -> Result<Read<B>, PrepareError> {
        let interrupted = || PrepareError::Interrupted { id: id.into() };
        let permit = self.permits.clone().acquire_owned().await.map_err(|_| interrupted())?;
        let (this, id_there) = (self.clone(), id.to_owned());
        let reading = tokio::task::spawn_blocking(move || {
            // Until it has ended, whoever waits for it.
            let _permit = permit;
            this.read_blocking(folder, id_there)
        });
        reading.await.map_err(|_| interrupted())?
    }

    fn read_blocking(&self, folder: PathBuf, id: String) -> Result<Read<B>, PrepareError> {
        let adapter = match adapter::read(&folder, &self.model) {
            Ok(adapter) => adapter,
            Err(source) => return Err(PrepareError::Adapter { id, source }),
        };
        let staged = match self.ops.stage(&self.sites, &adapter.parts) {
            Ok(staged) => Arc::new(staged),
            Err(source) => return Err(PrepareError::Stage { id, source }),
        };
        let bytes = self.ops.adapter_bytes(&staged);
        if bytes > self.limit {
            return Err(PrepareError::TooLarge { id, bytes, limit: self.limit });
        }
        let mut cache = self.cache();
        cache.insert(adapter.hash, staged.clone(), bytes, self.limit);
        cache.folders.insert(adapter.hash, folder);
        drop(cache);
        tracing::info!(
            adapter = id,
            bytes,
            lora_rank = adapter.max_lora_rank,
            "adapter ready in host memory"
        );
        let prepared = Prepared {
            content: adapter.hash,
            bytes,
            max_lora_rank: adapter.max_lora_rank,
            sites: adapter.sites,
        };
        Ok((prepared, staged))
    }

    /// The adapters in host memory, and the bytes that each takes.
    pub fn held(&self) -> Vec<(ContentHash, usize)> {
        self.cache().resident.iter().map(|(content, resident)| (*content, resident.bytes)).collect()
    }

    /// The host copy of an adapter, if it is still there.
    pub fn get(&self, content: ContentHash) -> Option<Arc<B::HostAdapter>> {
        let mut cache = self.cache();
        cache.clock += 1;
        let clock = cache.clock;
        let resident = cache.resident.get_mut(&content)?;
        resident.used = clock;
        Some(resident.adapter.clone())
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
        let folder = self.cache().folders.get(&content).cloned().ok_or(FetchError::Unknown)?;
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (prepared, adapter) = self.read(folder, &name).await?;
        if prepared.content == content { Ok(adapter) } else { Err(FetchError::Changed) }
    }
}

impl<B: Backend> Cache<B> {
    fn insert(&mut self, content: ContentHash, adapter: Arc<B::HostAdapter>, bytes: usize, limit: usize) {
        if self.resident.contains_key(&content) {
            return;
        }
        while self.bytes + bytes > limit {
            // What a slot holds stays: dropping our reference would free nothing.
            let oldest = self
                .resident
                .iter()
                .filter(|(_, resident)| Arc::strong_count(&resident.adapter) == 1)
                .min_by_key(|(_, resident)| resident.used)
                .map(|(content, _)| *content);
            let Some(evicted) = oldest.and_then(|oldest| self.resident.remove(&oldest)) else { break };
            self.bytes -= evicted.bytes;
        }
        self.bytes += bytes;
        self.clock += 1;
        self.resident.insert(content, Resident { adapter, bytes, used: self.clock });
    }
}
