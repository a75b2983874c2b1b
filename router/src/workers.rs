//! Threads for work that takes processor time: tokenizing, templates, and the JSON of large bodies.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lifecycle::{Failure, Supervisor};
use tokio::{
    task::spawn_blocking,
    time::{MissedTickBehavior, interval, timeout},
};
use tracing::Span;

use crate::{
    fair::{FairSemaphore, Grant, Share},
    metrics::WorkerMetrics,
    principal::{Principal, TenantId},
};

/// The name of the task that watches them, and of all of them in the log.
pub(crate) const NAME: &str = "validation workers";
/// Longest wait for a thread.
const TURN: Duration = Duration::from_secs(30);
/// Time between two looks at all jobs.
const TICK: Duration = Duration::from_millis(250);
/// The most that one look adds to the age of a job, so that none is overdue when a suspended process goes on.
const LONGEST_TICK: Duration = Duration::from_secs(1);

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
///
/// A job that takes longer than its limit hangs, for all that is known. Another thread takes the place of its own, for
/// as many such jobs as there are threads; they keep their own thread until they end. When as many more hang, the pool
/// does too, and the supervisor is told.
pub(crate) struct Workers {
    turns: FairSemaphore<TenantId>,
    threads: usize,
    limit: Duration,
    jobs: Arc<Mutex<Jobs>>,
    metrics: WorkerMetrics,
}

/// The jobs that run, in the order in which they began.
#[derive(Default)]
struct Jobs {
    begun: u64,
    running: BTreeMap<u64, Job>,
}

struct Job {
    name: &'static str,
    /// The request's.
    span: Span,
    age: Duration,
    overdue: bool,
    /// `None` once another thread has taken the place of this one.
    turn: Option<Grant<TenantId>>,
}

/// Forgets a job when it ends, even if by a panic.
struct Ending {
    id: u64,
    jobs: Arc<Mutex<Jobs>>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        let job = lock(&self.jobs).running.remove(&self.id);
        if let Some(Job { name, span, age, overdue: true, .. }) = job {
            span.in_scope(|| tracing::warn!("{name} has ended after {:.1} s", age.as_secs_f32()));
        }
    }
}

fn lock(jobs: &Mutex<Jobs>) -> MutexGuard<'_, Jobs> {
    // Jobs are added and removed as a whole.
    jobs.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Workers {
    /// So many threads, on which a job may take as long as `limit`.
    pub(crate) fn new(threads: usize, limit: Duration, metrics: WorkerMetrics) -> Workers {
        let threads = threads.max(1);
        Workers {
            turns: FairSemaphore::new(threads, Share::All),
            threads,
            limit,
            jobs: Arc::default(),
            metrics,
        }
    }

    /// Does work on one of the threads. A caller that gives up while it waits is forgotten; work that has begun goes on
    /// until it ends, whether or not anybody waits for it.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        name: &'static str,
        principal: &Principal,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, WorkError> {
        let turn = timeout(TURN, self.turns.acquire(principal.tenant.id, 1)).await;
        let ending = self.begin(name, turn.map_err(|_| WorkError::Busy)?);
        let span = Span::current();
        let done = spawn_blocking(move || {
            let _ending = ending;
            span.in_scope(work)
        });
        done.await.map_err(|error| {
            tracing::error!("{name} failed: {error}");
            WorkError::Panicked
        })
    }

    fn begin(&self, name: &'static str, turn: Grant<TenantId>) -> Ending {
        let job = Job { name, span: Span::current(), age: Duration::ZERO, overdue: false, turn: Some(turn) };
        let mut jobs = lock(&self.jobs);
        let id = jobs.begun;
        jobs.begun += 1;
        jobs.running.insert(id, job);
        Ending { id, jobs: self.jobs.clone() }
    }

    /// Replaces the threads of jobs that take too long, for ever.
    pub(crate) async fn watch(self: Arc<Workers>, supervisor: Supervisor) {
        let mut ticks = interval(TICK.min(self.limit / 4));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = Instant::now();
        loop {
            ticks.tick().await;
            let passed = last.elapsed();
            last += passed;
            if let Some(failure) = self.tick(passed.min(LONGEST_TICK)) {
                supervisor.report(failure);
            }
        }
    }

    /// Lets time pass for all jobs. Returns the failure of the pool if all of its threads hang.
    fn tick(&self, passed: Duration) -> Option<Failure> {
        let mut jobs = lock(&self.jobs);
        let mut replaced = jobs.running.values().filter(|job| job.turn.is_none()).count();
        let mut overdue = Vec::new();
        for job in jobs.running.values_mut() {
            job.age += passed;
            if job.age <= self.limit {
                continue;
            }
            overdue.push(job.age);
            if replaced < self.threads && job.turn.take().is_some() {
                replaced += 1;
            }
            if !job.overdue {
                job.overdue = true;
                self.metrics.overdue.increment(1);
                let next = if job.turn.is_none() { "takes its place" } else { "would be one too many" };
                let (name, age) = (job.name, job.age.as_secs_f32());
                job.span.in_scope(|| {
                    tracing::error!("{name} has not ended after {age:.1} s; another thread {next}")
                });
            }
        }
        self.metrics.hanging.set(overdue.len() as f64);
        let age = *overdue.first().filter(|_| overdue.len() >= replaced + self.threads)?;
        Some(Failure::Overdue { name: NAME.into(), age, limit: self.limit })
    }
}

#[cfg(test)]
mod tests;
