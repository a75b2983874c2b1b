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
use tokio::sync::{OnceCell, Semaphore};

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

struct Resident<B: Backend> {
    adapter: Arc<B::HostAdapter>,
    bytes: usize,
    used: u64,
}

struct Cache<B: Backend> {
    /// What is known of versions; shared by callers who ask at the same time.
    known: HashMap<Version, Arc<OnceCell<Prepared>>>,
    resident: HashMap<ContentHash, Resident<B>>,
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
    permits: Semaphore,
    cache: Mutex<Cache<B>>,
}

impl<B: Backend> Adapters<B> {
    /// An empty cache of at most `limit` bytes, over the folders of `roots`.
    pub fn new(
        ops: Arc<B>,
        model: BaseModel,
        sites: Vec<LoraSite>,
        roots: Roots,
        limit: usize,
    ) -> Adapters<B> {
        let cache = Cache { known: HashMap::new(), resident: HashMap::new(), bytes: 0, clock: 0 };
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Adapters {
            ops,
            model,
            sites,
            roots,
            limit,
            permits: Semaphore::new((cores / 2).clamp(1, PARALLEL)),
            cache: Mutex::new(cache),
        }
    }

    fn cache(&self) -> MutexGuard<'_, Cache<B>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves a reference and makes sure that its adapter is in host memory. The reference is resolved every time,
    /// whatever is cached: that is where access is checked.
    pub async fn prepare(self: &Arc<Self>, source: &str, id: &str) -> Result<Prepared, PrepareError> {
        let folder = self.roots.resolve(source, id)?;
        let version = Version {
            files: [adapter::CONFIG_FILE, adapter::WEIGHTS_FILE]
                .map(|file| {
                    let data = folder.join(file).metadata().ok()?;
                    Some((data.len(), data.modified().ok()?))
                })
                .to_vec(),
            folder,
        };
        let known = self.cache().known.entry(version.clone()).or_default().clone();
        if let Some(prepared) = known.get().filter(|prepared| self.get(prepared.content).is_some()) {
            return Ok(prepared.clone());
        }
        // Evicted since: read it again.
        let known = if known.initialized() {
            let mut cache = self.cache();
            let entry = cache.known.entry(version.clone()).or_default();
            if Arc::ptr_eq(entry, &known) {
                *entry = Arc::default();
            }
            entry.clone()
        } else {
            known
        };
        let result = known.get_or_try_init(|| self.read(version.folder.clone(), id)).await.cloned();
        if result.is_err() {
            // A broken adapter leaves nothing behind, and is read anew when it is asked for again.
            self.cache().known.remove(&version);
        }
        result
    }

    async fn read(self: &Arc<Self>, folder: PathBuf, id: &str) -> Result<Prepared, PrepareError> {
        let interrupted = |_| PrepareError::Interrupted { id: id.into() };
        let _permit =
            self.permits.acquire().await.map_err(|_| PrepareError::Interrupted { id: id.into() })?;
        let (this, id_there) = (self.clone(), id.to_owned());
        tokio::task::spawn_blocking(move || this.read_blocking(&folder, id_there))
            .await
            .map_err(interrupted)?
    }

    fn read_blocking(&self, folder: &std::path::Path, id: String) -> Result<Prepared, PrepareError> {
        let adapter = match adapter::read(folder, &self.model) {
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
        self.cache().insert(adapter.hash, staged, bytes, self.limit);
        tracing::info!(
            adapter = id,
            bytes,
            lora_rank = adapter.max_lora_rank,
            "adapter ready in host memory"
        );
        Ok(Prepared {
            content: adapter.hash,
            bytes,
            max_lora_rank: adapter.max_lora_rank,
            sites: adapter.sites,
        })
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
