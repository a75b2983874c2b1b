//! The engine: owns the scheduler, plans steps, keeps two in flight, and hands out what comes back.
//!
//! It runs on a thread of its own, so that JSON, templates and detokenizing cannot delay a step, and it waits for
//! nobody but the ranks: a client that does not keep up fills its own channel and is cancelled.

mod batcher;
mod device;
mod in_flight;
mod masks;
mod serve;

pub(crate) use masks::Mask;

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use config::RouterConfig;
use lifecycle::Supervisor;
use scheduler::{GroupId, RequestId};
use tokio::sync::{Notify, mpsc, watch};

use crate::{
    adapters::{Inbox, Leases},
    generation::{Failure, Job, Update},
    grammar::mask_workers::MaskWorkers,
    metrics::{End, Metrics, Outcome},
    permits::Permit,
    wire::Info,
};

/// Updates that a client may be behind, and one more place for why there are no more.
const UPDATES: usize = 1024 + 1;
/// Jobs on their way to the engine.
const COMMANDS: usize = 1024;

/// One of the two holds on the permit of a job. The engine drops its hold when the job ends or is cancelled, which a
/// client that does not read never learns; the client drops its hold when it has all it wants, which the engine learns
/// later. The first drop releases the permit.
struct PermitHold(Arc<Mutex<Option<Permit>>>);

impl PermitHold {
    fn pair(permit: Option<Permit>) -> (PermitHold, PermitHold) {
        let shared = Arc::new(Mutex::new(permit));
        (PermitHold(shared.clone()), PermitHold(shared))
    }
}

impl Drop for PermitHold {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// A job on its way to the engine.
struct Submit {
    id: RequestId,
    job: Arc<Job>,
    updates: mpsc::Sender<Update>,
    outcome: Outcome,
    hold: PermitHold,
    /// The leases on its adapters.
    leases: Option<Arc<Leases>>,
}

/// A job that nobody waits for any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cancel {
    id: RequestId,
    /// Whether it has an answer, which a stop string has ended.
    stopped: bool,
}

/// Jobs whose clients have gone. Unlike a channel the list takes every one of them, however many leave at once; it
/// never has more entries than there are jobs.
#[derive(Default)]
struct Cancels {
    ids: Mutex<Vec<Cancel>>,
    added: Notify,
}

impl Cancels {
    fn add(&self, cancel: Cancel) {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).push(cancel);
        self.added.notify_one();
    }

    fn take(&self) -> Vec<Cancel> {
        std::mem::take(&mut *self.ids.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The readiness of the model.
#[derive(Debug, Clone)]
enum Readiness {
    /// The ranks run a session and serve this.
    Ready(Arc<Info>),
    /// They do not, and why.
    NotReady(String),
}

/// Gives jobs to the engine.
#[derive(Clone)]
pub(crate) struct Engine {
    submits: mpsc::Sender<Submit>,
    cancels: Arc<Cancels>,
    ids: Arc<AtomicU64>,
    readiness: watch::Receiver<Readiness>,
    metrics: Arc<Metrics>,
    _mask_workers: Arc<MaskWorkers>,
}

/// A job that runs. Dropping it cancels it.
pub(crate) struct Running {
    id: RequestId,
    updates: mpsc::Receiver<Update>,
    cancels: Arc<Cancels>,
    outcome: Outcome,
    stopped: bool,
    _hold: PermitHold,
}

impl Running {
    /// The next update; `None` when nothing follows.
    pub(crate) async fn next(&mut self) -> Option<Update> {
        self.updates.recv().await
    }

    /// Ends the job because its text has met a stop string.
    pub(crate) fn stop(mut self) {
        self.stopped = true;
        self.outcome.end(End::StopSequence);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Closed first: the job may still be on its way to the engine, which does not begin one that nobody waits for.
        self.updates.close();
        self.cancels.add(Cancel { id: self.id, stopped: self.stopped });
    }
}

impl Engine {
    /// Starts the engine for the shards at these sockets, in the order of their ranks. It reports what happens to
    /// adapters there.
    pub(crate) fn start(
        sockets: Vec<PathBuf>,
        config: &RouterConfig,
        metrics: Arc<Metrics>,
        adapters: Arc<Inbox>,
        supervisor: &Supervisor,
    ) -> io::Result<Engine> {
        let (submits, received) = mpsc::channel(COMMANDS);
        let (readiness, watched) =
            watch::channel(Readiness::NotReady("the ranks have not been asked".into()));
        let cancels = Arc::new(Cancels::default());
        let inbox = serve::Inbox { submits: received, cancels: cancels.clone(), adapters };
        let engine_metrics = Arc::new(metrics.engine());
        let _mask_workers =
            serve::start(sockets, config.clone(), inbox, (readiness, engine_metrics), supervisor)?;
        Ok(Engine { submits, cancels, ids: Arc::default(), readiness: watched, metrics, _mask_workers })
    }

    /// The model that the ranks serve; `None` while there is no session.
    pub(crate) fn info(&self) -> Option<Arc<Info>> {
        match &*self.readiness.borrow() {
            Readiness::Ready(info) => Some(info.clone()),
            Readiness::NotReady(_) => None,
        }
    }

    /// Returns the reason if the model cannot answer.
    pub(crate) fn health(&self) -> Result<(), String> {
        // The sender lives as long as the engine, so an engine that has ended is seen here.
        if self.readiness.has_changed().is_err() {
            return Err("the engine has ended".into());
        }
        match &*self.readiness.borrow() {
            Readiness::Ready(_) => Ok(()),
            Readiness::NotReady(reason) => Err(reason.clone()),
        }
    }

    /// Waits until the model can answer, or never will. The future does not keep the engine.
    pub(crate) fn ready(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut readiness = self.readiness.clone();
        async move {
            // Fails only when the engine has ended, and then nothing will be served.
            let ready = |readiness: &Readiness| matches!(readiness, Readiness::Ready(_));
            let _ = readiness.wait_for(ready).await;
        }
    }

    /// A name for jobs with the same prompt.
    pub(crate) fn new_group(&self) -> GroupId {
        GroupId(self.ids.fetch_add(1, Ordering::Relaxed))
    }

    /// Hands over a job, which holds the permit until it ends, and the leases until it is admitted. The caller of one without
    /// a permit holds one for it.
    pub(crate) async fn submit(
        &self,
        job: Job,
        permit: Option<Permit>,
        leases: Option<Arc<Leases>>,
    ) -> Result<Running, Failure> {
        let id = RequestId(self.ids.fetch_add(1, Ordering::Relaxed));
        let (updates, received) = mpsc::channel(UPDATES);
        let (hold, other) = PermitHold::pair(permit);
        // A request is counted once, however many sequences it has.
        let outcome = Outcome::current().unwrap_or_else(|| self.metrics.outcome());
        let submit = Submit { id, job: Arc::new(job), updates, outcome: outcome.clone(), hold, leases };
        self.submits.send(submit).await.map_err(|_| Failure::Unavailable)?;
        let (cancels, stopped) = (self.cancels.clone(), false);
        Ok(Running { id, updates: received, cancels, outcome, stopped, _hold: other })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_cancellation_is_lost_however_many_come_while_the_engine_is_busy() {
        let cancels = Cancels::default();
        let all: Vec<_> = (0..100_000).map(|id| Cancel { id: RequestId(id), stopped: false }).collect();
        all.iter().for_each(|cancel| cancels.add(*cancel));
        assert_eq!(cancels.take(), all);
        assert_eq!(cancels.take(), []);
    }
}
