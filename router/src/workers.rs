//! Threads for work that takes processor time: tokenizing, templates, and the JSON of large bodies.

use std::time::Duration;

use tokio::{task::spawn_blocking, time::timeout};

use crate::{
    fair::{FairSemaphore, Share},
    principal::{Principal, TenantId},
};

/// Longest wait for a thread.
const TURN: Duration = Duration::from_secs(30);

/// The reason that work was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WorkError {
    /// All threads were busy for too long.
    #[error("no thread was free within {} s", TURN.as_secs())]
    Busy,
    /// The work panicked.
    #[error("an internal error")]
    Panicked,
}

/// A bounded number of threads, which tenants get in turn. Only requests wait for one, so that the queues are as
/// bounded as requests and connections are.
pub(crate) struct Workers {
    threads: FairSemaphore<TenantId>,
}

impl Workers {
    pub(crate) fn new(threads: usize) -> Workers {
        Workers { threads: FairSemaphore::new(threads.max(1), Share::All) }
    }

    /// Does work on one of the threads. A caller that gives up while it waits is forgotten; work that has begun keeps
    /// its thread until it ends, whether or not anybody waits for it.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        principal: &Principal,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, WorkError> {
        let turn = timeout(TURN, self.threads.acquire(principal.tenant.id, 1)).await;
        let turn = turn.map_err(|_| WorkError::Busy)?;
        let done = spawn_blocking(move || {
            let _turn = turn;
            work()
        });
        done.await.map_err(|error| {
            tracing::error!("a worker's task failed: {error}");
            WorkError::Panicked
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_panics_fails_alone_and_gives_its_thread_back() {
        let (workers, caller) = (Workers::new(1), Principal::anonymous());
        for _ in 0..3 {
            let failed = workers.run(&caller, || assert_eq!(1, 2, "a bug")).await;
            assert_eq!(failed, Err(WorkError::Panicked));
            assert_eq!(workers.run(&caller, || 7).await, Ok(7));
        }
    }
}
