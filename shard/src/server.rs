//! A rank at work: its threads and tasks, each of which the process cannot do without.

use std::{io, sync::Arc, time::Duration};

use kernels::Backend;
use lifecycle::Supervisor;
use tokio::{net::UnixStream, sync::mpsc};
use tokio_stream::Stream;

use crate::{
    adapters::Adapters,
    engine::Engine,
    pump,
    service::{self, EngineHandle},
    step::Info,
};

/// Commands on their way to the engine.
const COMMANDS: usize = 16;
/// Streams of steps that wait to be passed on. A router has one at a time.
const STREAMS: usize = 4;

/// The least that a step may take before the engine counts as hanging.
const LEAST_STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// How many times the longest step of the warm-up a step may take: its contexts may be longer.
const LONGEST_STEPS: u32 = 20;

/// A rank that is ready to serve.
pub struct Rank<B: Backend> {
    /// Its step loop.
    pub engine: Engine<B>,
    /// Its adapters.
    pub adapters: Arc<Adapters<B>>,
    /// What it tells of itself.
    pub info: Info,
}

/// How long the engine may be busy without finishing a step: as configured, or by the longest step of the warm-up.
pub fn step_timeout(configured: Option<Duration>, longest_step: Duration) -> Duration {
    configured.unwrap_or_else(|| LEAST_STEP_TIMEOUT.max(longest_step * LONGEST_STEPS))
}

/// Answers a router until told to stop. What cannot be done without is started under `supervisor`: the engine, the task
/// that passes steps on to it, and the gRPC server.
pub async fn serve<B: Backend>(
    rank: Rank<B>,
    connections: impl Stream<Item = io::Result<UnixStream>> + Send + 'static,
    step_timeout: Duration,
    stopped: impl Future<Output = ()>,
    supervisor: &Supervisor,
) -> io::Result<()> {
    let Rank { engine, adapters, info } = rank;
    let (commands, received) = mpsc::channel(COMMANDS);
    let (open, opened) = mpsc::channel(STREAMS);
    let heartbeat = engine.heartbeat();
    let pulse = supervisor.watch("engine", step_timeout);
    supervisor.thread("engine", move || {
        if let Err(error) = engine.run(received, &pulse) {
            tracing::error!("the device failed: {error}");
        }
    })?;
    supervisor.task("step streams", step_timeout, pump::run(opened, commands.clone()));
    let service = service::new(info, adapters, EngineHandle { commands, streams: open, heartbeat });
    let server = tonic::transport::Server::builder().add_service(service).serve_with_incoming(connections);
    let server = supervisor.task("gRPC server", step_timeout, async {
        if let Err(error) = server.await {
            tracing::error!("the gRPC server failed: {error}");
        }
    });
    stopped.await;
    supervisor.stopping();
    server.abort();
    Ok(())
}
