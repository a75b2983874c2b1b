//! Keeps shards and router running, and stops them in order.

use std::{
    io,
    path::PathBuf,
    process::ExitStatus,
    time::{Duration, Instant},
};

use futures::future::select_all;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::sleep,
};

use crate::child::Child;

/// Waits between restarts: doubled each time, from the first to the last.
const BACKOFF: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(10)];
/// After running this long, a process is taken to be well.
const STABLE: Duration = Duration::from_secs(60);
/// A router whose first life is shorter than this, or than the shards take to load, has a fault that restarts do not mend.
const FIRST_LIFE: Duration = Duration::from_secs(3);
/// What shards get to stop, and what the router gets beyond its own deadline.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why the launcher gave up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// A program cannot be started.
    #[error("{}: {source}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A process did not get as far as serving.
    #[error("{name} could not start ({status})")]
    NeverReady {
        /// The process.
        name: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// One was killed while stopping, or ended with an error.
    #[error("not every process stopped in order")]
    Disorder,
    /// The system would not tell us of signals or children.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Failure {
    /// Whether a process would not have this configuration.
    pub(crate) fn is_usage(&self) -> bool {
        matches!(self, Failure::NeverReady { status, .. } if status.code() == Some(lifecycle::EX_USAGE))
    }
}

/// What to run.
pub(crate) struct Plan {
    /// Folder of the programs.
    pub(crate) programs: PathBuf,
    /// The run configuration.
    pub(crate) config: PathBuf,
    /// Socket of each shard; it exists once the shard serves.
    pub(crate) sockets: Vec<PathBuf>,
    /// Whether children log JSON.
    pub(crate) plain: bool,
    /// What streams get to finish.
    pub(crate) deadline: Duration,
}

struct Backoff {
    next: Duration,
    started: Instant,
}

impl Backoff {
    fn new() -> Backoff {
        Backoff { next: BACKOFF[0], started: Instant::now() }
    }

    async fn wait(&mut self) {
        if self.started.elapsed() > STABLE {
            self.next = BACKOFF[0];
        }
        tracing::warn!("restarting in {:.1} s", self.next.as_secs_f32());
        sleep(self.next).await;
        self.next = (self.next * 2).min(BACKOFF[1]);
        self.started = Instant::now();
    }
}

impl Plan {
    fn start(&self, name: &str, program: &str, rank: Option<usize>) -> Result<Child, Failure> {
        let program = self.programs.join(program);
        let config = self.config.to_string_lossy();
        let rank = rank.map(|rank| rank.to_string());
        let mut args = vec!["--config", &*config];
        if let Some(rank) = &rank {
            args.extend(["--rank", rank]);
        }
        Child::start(name, &program, &args, self.plain).map_err(|source| Failure::Start { program, source })
    }

    fn start_shards(&self) -> Result<Vec<Child>, Failure> {
        for socket in &self.sockets {
            // Its being there is how we know that the new shard serves.
            match std::fs::remove_file(socket) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        (0..self.sockets.len())
            .map(|rank| self.start(&format!("shard-{rank}"), "lorax-shard", Some(rank)))
            .collect()
    }

    fn shards_serve(&self) -> bool {
        self.sockets.iter().all(|socket| socket.exists())
    }

    fn start_router(&self) -> Result<Child, Failure> {
        self.start("router", "lorax-router", None)
    }

    /// Runs until told to stop.
    pub(crate) async fn run(&self) -> Result<(), Failure> {
        let mut signals = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
        let mut shards = self.start_shards()?;
        let mut router = self.start_router()?;
        let (mut shard_backoff, mut router_backoff) = (Backoff::new(), Backoff::new());
        let (mut served, mut router_lives) = (false, 0);
        loop {
            tokio::select! {
                () = any(&mut signals) => break,
                (rank, status) = first(&mut shards) => {
                    let name = format!("shard-{rank}");
                    served |= self.shards_serve();
                    let status = status?;
                    tracing::error!("{name} ended ({status})");
                    if !served {
                        return Err(Failure::NeverReady { name, status });
                    }
                    // The ranks of a model live and die together: the others wait for this one in a collective.
                    shards.clear();
                    tokio::select! {
                        () = any(&mut signals) => break,
                        () = shard_backoff.wait() => shards = self.start_shards()?,
                    }
                }
                status = router.ended() => {
                    let status = status?;
                    tracing::error!("router ended ({status})");
                    served |= self.shards_serve();
                    let early = !served || router_backoff.started.elapsed() < FIRST_LIFE;
                    if router_lives == 0 && early {
                        return Err(Failure::NeverReady { name: "router".into(), status });
                    }
                    router_lives += 1;
                    tokio::select! {
                        () = any(&mut signals) => break,
                        () = router_backoff.wait() => router = self.start_router()?,
                    }
                }
            }
        }
        tracing::info!("stopping: streams have {} s to finish", self.deadline.as_secs());
        tokio::select! {
            () = any(&mut signals) => {
                tracing::warn!("told twice: stopping at once");
                Ok(())
            }
            in_order = self.stop(router, shards) => if in_order { Ok(()) } else { Err(Failure::Disorder) },
        }
    }

    /// The router first, so that streams can finish. True if all ended by themselves, in order.
    async fn stop(&self, router: Child, shards: Vec<Child>) -> bool {
        let router = router.stop(self.deadline + PATIENCE).await;
        let shards = futures::future::join_all(shards.into_iter().map(|shard| shard.stop(PATIENCE))).await;
        router && shards.into_iter().all(|in_order| in_order)
    }
}

/// The next of several signals.
async fn any(signals: &mut [Signal; 2]) {
    let [first, second] = signals;
    tokio::select! {
        _ = first.recv() => {}
        _ = second.recv() => {}
    }
}

/// The first shard to end.
async fn first(shards: &mut [Child]) -> (usize, io::Result<ExitStatus>) {
    let (status, rank, _) = select_all(shards.iter_mut().map(|shard| Box::pin(shard.ended()))).await;
    (rank, status)
}
