//! A router from its start to its end.

use std::{future::pending, io, time::Duration};

use config::Config;
use lifecycle::{Parent, Supervisor};
use tokio::runtime::Builder;

use crate::server::{self, App, StartError, longest_poll};

/// Time for work that nobody waits for any more, such as tokenizing, to end.
const LEFT_OVER: Duration = Duration::from_secs(1);

/// The reason that a router did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It could not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The system gave no thread, or would not tell it of signals.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl RunError {
    /// Returns whether the configuration is at fault.
    pub fn is_usage(&self) -> bool {
        matches!(self, RunError::Start(error) if error.is_usage())
    }
}

/// Runs a router on a runtime of its own until the process is told to stop. Its tasks are run by `supervisor`.
pub fn run(config: Config, supervisor: &Supervisor) -> Result<(), RunError> {
    let parent = Parent::link()?;
    let threads = config.router.router_threads;
    let runtime = Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    let served = runtime.block_on(serve(config, &parent, supervisor));
    runtime.shutdown_timeout(LEFT_OVER);
    served
}

async fn serve(config: Config, parent: &Parent, supervisor: &Supervisor) -> Result<(), RunError> {
    let told_to_stop = parent.told_to_stop()?;
    // Before anything slow: a port that is taken is found out at once.
    let (listener, address) = server::listen(&config).await?;
    let limit = longest_poll(&config.router);
    let app = App::start(config, supervisor)?;
    parent.serving();
    tracing::info!("waiting for the model; {address} answers 503 until it is ready");
    let starting = app.clone();
    supervisor.task("start-up message", limit, async move {
        starting.ready().await;
        tracing::info!("listening on {address}");
        // A supervised task does not return.
        pending().await
    });
    let stopping = {
        let supervisor = supervisor.clone();
        async move {
            told_to_stop.await;
            supervisor.stopping();
        }
    };
    server::serve(listener, app, supervisor, stopping).await;
    Ok(())
}
