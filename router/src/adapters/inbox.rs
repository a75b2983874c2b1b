//! What the driver is told by those who must not wait for it: leases that end, and what the engine reports.

use std::sync::{Mutex, PoisonError};

use exchange::{AskId, Content, ReferenceId, Slot};
use tokio::sync::Notify;

use crate::wire::stage::Staged;

/// Something that has happened, and that nobody waits for an answer to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum News {
    /// An ask is not needed any more.
    Released(AskId),
    /// A plan moves an adapter in the device tier, or the ranks have moved it.
    Slot(Content, Slot),
    /// A session has begun.
    Attached {
        /// Its number.
        session: u64,
        /// The adapters that all ranks have in host memory.
        host: Vec<(Content, Staged)>,
    },
    /// The session has ended.
    Detached,
    /// What is remembered of a reference must be asked again.
    Reload(ReferenceId),
    /// The copies of an adapter are to go, unless they are needed.
    Evict(Content),
}

/// News that have not been read, in order. Unlike a channel the list takes all of them: a lease that ends on the
/// engine's thread cannot wait, and one whose end was lost would never end. There are never more entries than asks,
/// and slots that have changed since it was read last.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    news: Mutex<Vec<News>>,
    added: Notify,
}

impl Inbox {
    pub(crate) fn add(&self, news: News) {
        self.news.lock().unwrap_or_else(PoisonError::into_inner).push(news);
        self.added.notify_one();
    }

    /// Waits until there may be news.
    pub(super) async fn added(&self) {
        self.added.notified().await;
    }

    pub(super) fn take(&self) -> Vec<News> {
        std::mem::take(&mut *self.news.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
