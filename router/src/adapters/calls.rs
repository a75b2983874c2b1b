//! Calls that the exchange has told the driver to make. Each is a task, and is answered once, when nothing of it is
//! left.

mod error;
mod fetch;
mod in_place;
mod lookup;
mod stage;
mod text;

use std::{
    collections::HashMap,
    future::pending,
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, resume_unwind},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use exchange::{CallId, Content, Fault, Fetched, Output, StageFault, Version};
use futures::FutureExt;
use lru::LruCache;
use sources::{Found, Sources};
use store::{OnDisk, Store};
use tokio::task::{JoinError, JoinSet, spawn_blocking};
use tokio_util::sync::CancellationToken;

use super::{Book, Payload};
use crate::{metrics::AdapterMetrics, ranks::Ranks, wire::stage::Staged};
use error::CallError;
pub(super) use text::Files;

/// Versions whose files are remembered. One that has been forgotten is looked up again.
const FOUND: NonZeroUsize = NonZeroUsize::new(1 << 16).expect("not zero");

/// The end of a call.
#[derive(Debug)]
pub(super) enum Answer {
    LookedUp { call: CallId, result: Result<exchange::Found, Fault> },
    Fetched { call: CallId, result: Result<Fetched, Fault> },
    Staged { call: CallId, content: Content, result: Result<Staged, StageFault> },
    Deleted(Content),
    Unstaged { content: Content, session: u64 },
}

/// Everything that calls need.
pub(super) struct Means {
    pub(super) sources: Arc<Sources>,
    /// The cache on the disk, if there is one.
    pub(super) store: Option<Store>,
    pub(super) ranks: Ranks,
    pub(super) metrics: Arc<AdapterMetrics>,
    /// For how long the answer of a source may be used again whose questions are not free.
    pub(super) fresh_for: Duration,
    /// The largest LoRA rank that is served, if there is a bound.
    pub(super) max_lora_rank: Option<u32>,
    pub(super) book: Arc<Book>,
}

/// What all calls share.
struct Shared {
    means: Means,
    /// What was found of a version.
    found: Mutex<LruCache<Version, Arc<Found>>>,
    /// The version from which a content was read in place last.
    in_place: Mutex<LruCache<Content, Version>>,
}

impl Shared {
    fn store(&self) -> Result<Store, CallError> {
        self.means.store.clone().ok_or(CallError::NoCache)
    }

    /// The version from which a content was read in place last.
    fn version_in_place(&self, content: Content) -> Option<Version> {
        self.in_place.lock().unwrap_or_else(PoisonError::into_inner).get(&content).copied()
    }

    fn found(&self, version: Version) -> Option<Arc<Found>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).get(&version).cloned()
    }
}

/// A session with the ranks.
#[derive(Clone)]
struct Session {
    number: u64,
    ended: CancellationToken,
}

/// Calls that have not ended.
pub(super) struct Calls {
    shared: Arc<Shared>,
    /// Calls, and the answers of those that have one: calls to the ranks end with their session.
    running: JoinSet<(Option<CallId>, Option<Answer>)>,
    aborts: HashMap<CallId, CancellationToken>,
    session: Session,
}

impl Calls {
    pub(super) fn new(means: Means) -> Calls {
        let shared = Shared {
            means,
            found: Mutex::new(LruCache::new(FOUND)),
            in_place: Mutex::new(LruCache::new(FOUND)),
        };
        let session = Session { number: 0, ended: CancellationToken::new() };
        Calls { shared: Arc::new(shared), running: JoinSet::new(), aborts: HashMap::new(), session }
    }

    /// The files of adapters.
    pub(super) fn files(&self) -> Files {
        Files(self.shared.clone())
    }

    /// The copies that are on the disk at the start, used last told last.
    pub(super) async fn on_disk(&self) -> Vec<OnDisk> {
        let Some(store) = self.shared.means.store.clone() else { return Vec::new() };
        let scanned = blocking(move || Ok(store.scan()?)).await;
        scanned.unwrap_or_else(|error| {
            tracing::warn!("the adapters on the disk are not known: {error}");
            Vec::new()
        })
    }

    /// A session has begun.
    pub(super) fn attached(&mut self, number: u64) {
        self.detached();
        self.session = Session { number, ended: CancellationToken::new() };
    }

    /// The session has ended, and the calls to the ranks with it.
    pub(super) fn detached(&mut self) {
        self.session.ended.cancel();
    }

    /// Does what the exchange has decided.
    pub(super) fn begin(&mut self, output: Output<Payload>) {
        let (shared, session) = (self.shared.clone(), self.session.clone());
        match output {
            Output::Lookup { call, payload } => self.call(call, async move |abort| {
                let result = match &payload {
                    Payload::Adapter(wanted) => shared.look_up(wanted, &abort).await,
                    Payload::Merge(merge) => Ok(merge.found()),
                };
                Some(Answer::LookedUp { call, result })
            }),
            Output::Fetch { call, version, max_bytes, payload } => self.call(call, async move |abort| {
                let result = match &payload {
                    Payload::Adapter(wanted) => shared.fetch(version, max_bytes, wanted, &abort).await,
                    Payload::Merge(merge) => Ok(merge.fetched()),
                };
                Some(Answer::Fetched { call, result })
            }),
            Output::Stage { call, content, place, max_bytes, payload } => {
                let order = stage::Order { content, place, max_bytes, payload };
                self.call(call, async move |abort| {
                    let result = shared.stage(&order, &session, &abort).await?;
                    Some(Answer::Staged { call, content, result })
                });
            }
            Output::Abort(call) => {
                self.aborts.get(&call).into_iter().for_each(CancellationToken::cancel);
            }
            Output::Delete(content) => self.spawn(None, async move {
                shared.delete(content).await;
                Some(Answer::Deleted(content))
            }),
            Output::Unstage(content) => self.spawn(None, async move {
                shared.unstage(content, &session).await?;
                Some(Answer::Unstaged { content, session: session.number })
            }),
            Output::Ready { .. } | Output::Failed { .. } => {}
        }
    }

    /// Begins a call that can be aborted.
    fn call<F: Future<Output = Option<Answer>> + Send + 'static>(
        &mut self,
        call: CallId,
        work: impl FnOnce(CancellationToken) -> F,
    ) {
        let abort = CancellationToken::new();
        self.aborts.insert(call, abort.clone());
        self.spawn(Some(call), work(abort));
    }

    fn spawn(&mut self, call: Option<CallId>, work: impl Future<Output = Option<Answer>> + Send + 'static) {
        self.running.spawn(async move { (call, work.await) });
    }

    /// The next answer. Dropping the future loses none.
    pub(super) async fn next(&mut self) -> Answer {
        loop {
            let Some(ended) = self.running.join_next().await else { return pending().await };
            let (call, answer) = match ended.map_err(JoinError::try_into_panic) {
                Ok(ended) => ended,
                // The exchange would wait for its answer for ever.
                Err(Ok(panic)) => resume_unwind(panic),
                Err(Err(_)) => continue,
            };
            call.and_then(|call| self.aborts.remove(&call));
            if let Some(answer) = answer {
                return answer;
            }
        }
    }
}

/// The result of some work, also if it panics: one adapter that nobody has thought of must not end the server.
async fn caught<T>(work: impl Future<Output = Result<T, CallError>>) -> Result<T, CallError> {
    // Whatever it has left half done, nothing of it is used again.
    let result = AssertUnwindSafe(work).catch_unwind().await;
    result.unwrap_or(Err(CallError::Interrupted))
}

/// Runs work that blocks, and that goes on when the caller is dropped.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CallError> + Send + 'static,
) -> Result<T, CallError> {
    spawn_blocking(work).await.unwrap_or(Err(CallError::Interrupted))
}
