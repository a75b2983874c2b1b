//! Keeps shards and router running, and stops them in order.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    time::Duration,
};

use config::Config;
use lifecycle::EX_USAGE;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    child::{Child, End, Output},
    group::Group,
};

/// A router whose first life is shorter than this, or than the shards take to load, has a fault that restarts do not
/// mend.
const FIRST_LIFE: Duration = Duration::from_secs(3);
/// Time for shards to stop, and for the router beyond what it was promised.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest silence of a process unless `--step-timeout` says otherwise.
const SILENCE: Duration = Duration::from_secs(10);
/// The shortest silence that means anything on a machine that is busy.
const SHORTEST_SILENCE: Duration = Duration::from_secs(2);

/// The signals that tell the launcher to stop. One that comes while nobody waits is not lost.
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// From now on they do not end the process any more. Must be called on a runtime.
    pub(crate) fn listen() -> io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// The reason that the launcher gave up.
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
    #[error("{name} could not start ({end})")]
    NeverReady {
        /// The process.
        name: String,
        /// Its end.
        end: End,
    },
    /// A process was killed while stopping, or ended with an error.
    #[error("not every process stopped in order")]
    Disorder,
    /// The system would not tell us of signals or children.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Failure {
    /// Returns whether a process refused its configuration.
    pub(crate) fn is_usage(&self) -> bool {
        matches!(self, Failure::NeverReady { end: End::Exited(status), .. } if status.code() == Some(EX_USAGE))
    }
}

/// The processes to run.
pub(crate) struct Plan {
    /// Folder of the programs.
    pub(crate) programs: PathBuf,
    /// The run configuration.
    pub(crate) config: Config,
    /// The file from which children read it.
    pub(crate) config_file: PathBuf,
    /// The way in which the logs of children are passed on.
    pub(crate) output: Output,
}

impl Plan {
    fn start(&self, name: String, program: &str, args: &[String]) -> Result<Child, Failure> {
        let program = self.programs.join(program);
        let config = ["--config".to_owned(), self.config_file.to_string_lossy().into_owned()];
        let silence = self.config.router.step_timeout.unwrap_or(SILENCE).max(SHORTEST_SILENCE);
        Child::start(name, &program, &[&config, args].concat(), silence, &self.output)
            .map_err(|source| Failure::Start { program, source })
    }

    /// Starts all ranks, which find nothing of those before them.
    fn start_shards(&self) -> Result<Vec<Child>, Failure> {
        self.clear()?;
        (0..self.config.ranks())
            .map(|rank| {
                self.start(format!("shard-{rank}"), "lorax-shard", &["--rank".into(), rank.to_string()])
            })
            .collect()
    }

    /// Removes the sockets of earlier ranks, and gives the next ones an empty folder to meet in.
    fn clear(&self) -> io::Result<()> {
        let shards = &self.config.shards;
        let unless_missing = |removed: io::Result<()>| match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        for socket in &shards.uds {
            unless_missing(fs::remove_file(socket))?;
        }
        unless_missing(fs::remove_dir_all(&shards.rendezvous))?;
        DirBuilder::new().mode(0o700).create(&shards.rendezvous)
    }

    fn start_router(&self) -> Result<Vec<Child>, Failure> {
        Ok(vec![self.start("router".into(), "lorax-router", &[])?])
    }

    /// Runs until told to stop.
    pub(crate) async fn run(&self, signals: &mut Signals) -> Result<(), Failure> {
        let mut shards = Group::start(|| self.start_shards())?;
        let mut router = Group::start(|| self.start_router())?;
        let failure = tokio::select! {
            () = signals.next() => None,
            failure = watch(&mut shards, &mut router) => Some(failure),
        };
        if let Some(failure) = failure {
            // Nobody is served any more.
            tokio::select! {
                () = signals.next() => tracing::warn!("told to stop meanwhile: stopping at once"),
                _ = async { tokio::join!(router.stop(PATIENCE), shards.stop(PATIENCE)) } => {}
            }
            return Err(failure);
        }
        let router_config = &self.config.router;
        tracing::info!(
            "stopping: streams have {} s to finish",
            router_config.shutdown_deadline.as_secs_f32()
        );
        // The router first, so that streams can finish.
        let in_order = async {
            let promised = router_config.shutdown_delay + router_config.shutdown_deadline;
            let router = router.stop(promised + PATIENCE).await;
            shards.stop(PATIENCE).await && router
        };
        tokio::select! {
            () = signals.next() => {
                tracing::warn!("told twice: stopping at once");
                Ok(())
            }
            in_order = in_order => if in_order { Ok(()) } else { Err(Failure::Disorder) },
        }
    }
}

/// Keeps both groups running. Returns when that is of no use.
async fn watch(
    shards: &mut Group<impl Fn() -> Result<Vec<Child>, Failure>>,
    router: &mut Group<impl Fn() -> Result<Vec<Child>, Failure>>,
) -> Failure {
    loop {
        tokio::select! {
            ended = shards.next_end() => match ended {
                Ok((name, end)) if !shards.has_served() => return Failure::NeverReady { name, end },
                Ok(_) => {}
                Err(failure) => return failure,
            },
            ended = router.next_end() => {
                let (name, end) = match ended {
                    Ok(ended) => ended,
                    Err(failure) => return failure,
                };
                let (age, lives) = router.life();
                if lives == 1 && (age < FIRST_LIFE || !shards.has_served()) {
                    return Failure::NeverReady { name, end };
                }
            }
        }
    }
}
