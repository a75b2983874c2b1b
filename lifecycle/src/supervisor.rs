//! Tasks and threads without which a process is not worth running.

use std::{
    any::Any,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use futures::{FutureExt, future::BoxFuture};
use tokio::{runtime::Builder, task::JoinHandle};

use crate::{
    exit::{self, EX_SOFTWARE, EX_UNAVAILABLE},
    watchdog::{Pulse, Watchdog},
};

/// What happened to a supervised task or thread.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// It panicked.
    #[error("{name} panicked: {message}")]
    Panicked {
        /// The task.
        name: Arc<str>,
        /// The panic's message.
        message: String,
    },
    /// It returned before the process was told to stop.
    #[error("{name} has ended, which it must not while the process runs")]
    Returned {
        /// The task.
        name: Arc<str>,
    },
    /// It has lost another process without which it cannot work.
    #[error("{name} cannot go on: {cause}")]
    Lost {
        /// The task.
        name: Arc<str>,
        /// What was lost.
        cause: String,
    },
    /// It has been busy with one thing for too long.
    #[error("{name} has made no progress for {:.1} s, and may take {:.1} s", age.as_secs_f32(), limit.as_secs_f32())]
    Overdue {
        /// The task.
        name: Arc<str>,
        /// The time since its last sign of progress.
        age: Duration,
        /// The time that it may take.
        limit: Duration,
    },
    /// It was due to be polled, and was not.
    #[error("{name} has not been polled for {:.1} s: the threads that should run it are blocked", age.as_secs_f32())]
    HeldUp {
        /// The task.
        name: Arc<str>,
        /// The time since its last poll.
        age: Duration,
    },
}

impl Failure {
    /// The name of the task.
    pub fn name(&self) -> &str {
        match self {
            Failure::Panicked { name, .. }
            | Failure::Returned { name }
            | Failure::Lost { name, .. }
            | Failure::Overdue { name, .. }
            | Failure::HeldUp { name, .. } => name,
        }
    }
}

/// A task that is supervised.
type Task = BoxFuture<'static, ()>;
/// What is run in the place of a task, by its name.
type Layer = Arc<dyn Fn(&str, Task) -> Task + Send + Sync>;

/// Runs tasks and threads, and reports those that fail. Clones are the same supervisor.
#[derive(Clone)]
pub struct Supervisor {
    reports: Arc<Reports>,
    watchdog: Watchdog,
    layer: Option<Layer>,
}

struct Reports {
    stopping: AtomicBool,
    report: Box<dyn Fn(Failure) + Send + Sync>,
}

impl Supervisor {
    /// One that logs a failure and ends the process within a second: with [`EX_UNAVAILABLE`] for what another process
    /// has caused, else with [`EX_SOFTWARE`].
    pub fn ending_the_process() -> io::Result<Supervisor> {
        Supervisor::reporting_to(|failure| {
            tracing::error!("{failure}: ending the process");
            let lost = matches!(failure, Failure::Lost { .. });
            exit::end_now(if lost { EX_UNAVAILABLE } else { EX_SOFTWARE })
        })
    }

    /// One that passes failures on, for a process that outlives them, as a test does. `report` is called on whichever
    /// thread finds the failure and must not block.
    pub fn reporting_to(report: impl Fn(Failure) + Send + Sync + 'static) -> io::Result<Supervisor> {
        let reports = Arc::new(Reports { stopping: AtomicBool::new(false), report: Box::new(report) });
        let watching = reports.clone();
        let watchdog = Watchdog::start(move |failure| (watching.report)(failure))?;
        Ok(Supervisor { reports, watchdog, layer: None })
    }

    /// From now on this supervisor runs every task inside of what `layer` makes of it, so that a test can make a task
    /// fail where it runs in the program.
    pub fn layer(mut self, layer: impl Fn(&str, Task) -> Task + Send + Sync + 'static) -> Supervisor {
        self.layer = Some(Arc::new(layer));
        self
    }

    /// Spawns a task on the current tokio runtime that must neither panic nor return before [`stopping`] is called. It
    /// may wait for any time, but it is overdue when one of its polls takes longer than `limit`, or when its runtime
    /// does not get round to it. It may be aborted, and dropped with its runtime.
    ///
    /// [`stopping`]: Supervisor::stopping
    pub fn task(
        &self,
        name: impl Into<Arc<str>>,
        limit: Duration,
        future: impl Future<Output = ()> + Send + 'static,
    ) -> JoinHandle<()> {
        tokio::spawn(self.supervise(name.into(), limit, future))
    }

    /// Starts a thread with a runtime of its own for a task, which is supervised as by [`task`](Supervisor::task).
    pub fn runtime(
        &self,
        name: impl Into<Arc<str>>,
        limit: Duration,
        future: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<thread::JoinHandle<()>> {
        let name = name.into();
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let task = self.supervise(name.clone(), limit, future);
        thread::Builder::new().name(name.to_string()).spawn(move || runtime.block_on(task))
    }

    fn supervise(
        &self,
        name: Arc<str>,
        limit: Duration,
        future: impl Future<Output = ()> + Send + 'static,
    ) -> impl Future<Output = ()> + Send + 'static {
        let future = match &self.layer {
            Some(layer) => layer(&name, future.boxed()),
            None => future.boxed(),
        };
        let (pulse, reports) = (self.watch(name.clone(), limit), self.reports.clone());
        async move {
            // Whatever it has left half done, nothing of it is used again.
            let ended = AssertUnwindSafe(pulse.turns(future)).catch_unwind().await;
            reports.ended(name, ended);
        }
    }

    /// Starts a thread that must neither panic nor return before [`stopping`](Supervisor::stopping) is called.
    pub fn thread(
        &self,
        name: impl Into<Arc<str>>,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<thread::JoinHandle<()>> {
        let (name, reports) = (name.into(), self.reports.clone());
        thread::Builder::new().name(name.to_string()).spawn(move || {
            // As for a task.
            let ended = catch_unwind(AssertUnwindSafe(work));
            reports.ended(name, ended);
        })
    }

    /// Watches the progress of a task, which has failed when it was busy for longer than `limit` without a beat.
    pub fn watch(&self, name: impl Into<Arc<str>>, limit: Duration) -> Pulse {
        self.watchdog.watch(name.into(), limit)
    }

    /// Reports a failure that somebody else has found.
    pub fn report(&self, failure: Failure) {
        (self.reports.report)(failure);
    }

    /// From now on tasks and threads may return. A panic is a failure still, and so is a task that is overdue.
    pub fn stopping(&self) {
        self.reports.stopping.store(true, Relaxed);
    }
}

impl Reports {
    fn ended(&self, name: Arc<str>, ended: Result<(), Box<dyn Any + Send>>) {
        match ended {
            Ok(()) if self.stopping.load(Relaxed) => {}
            Ok(()) => (self.report)(Failure::Returned { name }),
            Err(panic) => {
                let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
                let message = text.or_else(|| panic.downcast_ref::<String>().cloned());
                let message = message.unwrap_or_else(|| "no message".into());
                (self.report)(Failure::Panicked { name, message });
            }
        }
    }
}
