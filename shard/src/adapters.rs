//! The adapters in host memory. The router says which these are: a stage puts one there, an unstage takes it out, and
//! nothing else does. They are known by hashes of their content, which are the router's, too.

mod files;
mod host;
mod merge;
mod stage;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use kernels::{Backend, LoraSite};
use model::adapter::{BaseModel, ContentHash};
use tokio::sync::Semaphore;

pub use files::{AdapterFile, AdapterPart, Stamp};
use host::Host;
pub use host::{HostCopy, Properties};
use stage::Turns;
pub use stage::{StageAnswer, StageError, StageOrder};

/// The largest number of adapters that are read and checked at the same time. It is also bounded by half of the cores.
const PARALLEL: usize = 8;

/// The adapters in host memory, and what is needed to read others.
pub struct Adapters<B: Backend> {
    ops: Arc<B>,
    model: BaseModel,
    sites: Vec<LoraSite>,
    /// How long reading one adapter may take.
    read_timeout: Duration,
    host: Mutex<Host<B::HostAdapter>>,
    /// Permits for reading: as many as may read without taking the cores from those who compute.
    stages: Semaphore,
    /// Memory for merging beside the results.
    merges: merge::Memory,
    turns: Turns,
}

impl<B: Backend> Adapters<B> {
    /// Adapters of a model with these sites; none is in host memory. Reading one may take as long as `read_timeout`.
    pub fn new(ops: Arc<B>, model: BaseModel, sites: Vec<LoraSite>, read_timeout: Duration) -> Adapters<B> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Adapters {
            ops,
            model,
            sites,
            read_timeout,
            host: Mutex::default(),
            stages: Semaphore::new((cores / 2).clamp(1, PARALLEL)),
            merges: merge::Memory::default(),
            turns: Turns::default(),
        }
    }

    fn host(&self) -> MutexGuard<'_, Host<B::HostAdapter>> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a session: stages of the one before are refused from now on. Returns what is in host memory, used last told
    /// last.
    pub fn begin_session(&self, session: u64) -> Vec<Arc<Properties>> {
        self.host().begin_session(session)
    }

    /// An adapter in host memory.
    pub fn staged(&self, content: ContentHash) -> Option<HostCopy<B::HostAdapter>> {
        self.host().get(content)
    }
}
