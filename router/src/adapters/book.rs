//! What is known of adapters beside where they are: how they were used, how long their calls took, and what went wrong.

use std::{
    num::NonZeroUsize,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use exchange::{Content, Fault};
use lru::LruCache;
use sources::Reference;
use tokio::sync::watch;

use crate::{metrics::Usage, wire::stage::Staged};

/// References and contents that are remembered, each; the ones used last.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1 << 14).expect("not zero");

/// A failure, and when it was.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) at: SystemTime,
    pub(crate) message: String,
}

/// How a reference was used.
#[derive(Debug, Clone)]
pub(crate) struct Use {
    /// The content that it led to last.
    pub(crate) content: Option<Content>,
    pub(crate) last: SystemTime,
    /// From the last ask to its lease.
    pub(crate) waited: Option<Duration>,
    pub(crate) failure: Option<Failure>,
    pub(crate) counts: Arc<Counts>,
}

/// Requests of a reference, and those of them that run.
#[derive(Debug)]
pub(crate) struct Counts {
    pub(crate) usage: Arc<Usage>,
    running: watch::Sender<usize>,
}

impl Counts {
    /// Requests that run now.
    pub(crate) fn running(&self) -> usize {
        *self.running.borrow()
    }

    /// Waits until none runs.
    pub(crate) async fn drained(&self) {
        // Fails only when these counts are gone.
        let _ = self.running.subscribe().wait_for(|running| *running == 0).await;
    }
}

/// A request that runs, until it is dropped.
#[derive(Debug)]
pub(crate) struct InUse {
    adapters: Vec<Arc<Counts>>,
    /// Everything that it counts for: its adapters, and its tenant.
    usages: Vec<Arc<Usage>>,
}

impl InUse {
    /// A token has been generated.
    pub(crate) fn token(&self) {
        self.usages.iter().for_each(|usage| usage.token());
    }

    /// A sequence has begun to run, after a time in the queue.
    pub(crate) fn started(&self, prompt: usize, queued: Duration) {
        self.usages.iter().for_each(|usage| usage.started(prompt, queued));
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.adapters.iter().for_each(|counts| counts.running.send_modify(|running| *running -= 1));
    }
}

/// What is known of a content.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    /// Bytes of its files.
    pub(crate) bytes: u64,
    /// How long the last download took, or the hashing of a folder.
    pub(crate) fetched_in: Option<Duration>,
    /// How long the last copy into host memory took.
    pub(crate) staged_in: Option<Duration>,
    pub(crate) staged: Option<Staged>,
}

/// All of it.
#[derive(Debug)]
pub(crate) struct Book {
    /// The usage of all adapters together.
    all: Arc<Usage>,
    pages: Mutex<Pages>,
}

#[derive(Debug)]
struct Pages {
    uses: LruCache<Reference, Use>,
    facts: LruCache<Content, Facts>,
}

impl Pages {
    fn page(&mut self, reference: &Reference) -> &mut Use {
        let new = || Use {
            content: None,
            last: SystemTime::now(),
            waited: None,
            failure: None,
            counts: Arc::new(Counts { usage: Arc::default(), running: watch::Sender::new(0) }),
        };
        self.uses.get_or_insert_mut_ref(reference, new)
    }
}

impl Book {
    pub(super) fn new() -> Book {
        Book {
            all: Arc::default(),
            pages: Mutex::new(Pages { uses: LruCache::new(REMEMBERED), facts: LruCache::new(REMEMBERED) }),
        }
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request of a tenant begins, for no adapter, for one, or for several.
    pub(crate) fn begin<'a>(
        &self,
        references: impl Iterator<Item = &'a Reference>,
        tenant: [Arc<Usage>; 2],
    ) -> Arc<InUse> {
        let mut pages = self.pages();
        let adapters: Vec<_> = references.map(|reference| pages.page(reference).counts.clone()).collect();
        drop(pages);
        let of_adapters = adapters.iter().flat_map(|counts| [counts.usage.clone(), self.all.clone()]);
        let usages: Vec<_> = of_adapters.chain(tenant).collect();
        usages.iter().for_each(|usage| usage.begin());
        adapters.iter().for_each(|counts| counts.running.send_modify(|running| *running += 1));
        Arc::new(InUse { adapters, usages })
    }

    /// The usage of all adapters together; one of a merge counts for each of its parts.
    pub(crate) fn all(&self) -> &Usage {
        &self.all
    }

    /// The references that are remembered and have led to an adapter.
    pub(crate) fn found(&self) -> Vec<(Reference, Arc<Counts>)> {
        let pages = self.pages();
        let found = pages.uses.iter().filter(|(_, page)| page.content.is_some());
        found.map(|(reference, page)| (reference.clone(), page.counts.clone())).collect()
    }

    /// An ask has ended.
    pub(super) fn asked(&self, reference: &Reference, waited: Duration, result: Result<Content, &Fault>) {
        let mut pages = self.pages();
        let page = pages.page(reference);
        page.last = SystemTime::now();
        match result {
            Ok(content) => (page.content, page.waited) = (Some(content), Some(waited)),
            Err(fault) => page.failure = Some(Failure { at: page.last, message: fault.to_string() }),
        }
    }

    pub(super) fn fetched(&self, content: Content, bytes: u64, took: Duration) {
        let mut pages = self.pages();
        let facts = pages.facts.get_or_insert_mut(content, Facts::default);
        (facts.bytes, facts.fetched_in) = (bytes, Some(took));
    }

    pub(super) fn staged(&self, content: Content, staged: Staged, took: Duration) {
        let mut pages = self.pages();
        let facts = pages.facts.get_or_insert_mut(content, Facts::default);
        (facts.staged, facts.staged_in) = (Some(staged), Some(took));
    }

    /// How a reference was used, if that is remembered.
    pub(crate) fn of(&self, reference: &Reference) -> Option<Use> {
        self.pages().uses.peek(reference).cloned()
    }

    /// The facts of a content, as far as they are remembered.
    pub(crate) fn facts(&self, content: Content) -> Facts {
        self.pages().facts.peek(&content).cloned().unwrap_or_default()
    }

    /// All references that are remembered, those used last first.
    pub(crate) fn references(&self) -> Vec<Reference> {
        self.pages().uses.iter().map(|(reference, _)| reference.clone()).collect()
    }
}
