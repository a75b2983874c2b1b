//! Runs a rank: its engine thread, its gRPC server, and the task between them, all under supervision.

use std::{io, sync::Arc, time::Duration};

use kernels::Backend;
use lifecycle::{Failure, Supervisor};
use tokio::{net::UnixStream, sync::mpsc};
use tokio_stream::Stream;

use crate::{
    adapters::Adapters,
    engine::Engine,
    pump,
    service::{self, EngineHandle},
    step::Info,
};

/// Capacity of the channel of commands to the engine.
const COMMANDS: usize = 16;
/// Capacity of the channel of newly opened streams. A router has one stream at a time.
const STREAMS: usize = 4;

/// The shortest step timeout that is chosen by default.
const LEAST_STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// The default step timeout as a multiple of the longest step of the warm-up. Later steps may have longer contexts.
const LONGEST_STEPS: u32 = 20;

/// A rank that is ready to serve.
pub struct Rank<B: Backend> {
    /// Its step loop.
    pub engine: Engine<B>,
    /// Its adapters.
    pub adapters: Arc<Adapters<B>>,
    /// Its answer to the Info call.
    pub info: Info,
}

/// The step timeout: how long the engine may be busy without finishing a step. It is configured, or follows from the
/// longest step of the warm-up.
pub fn step_timeout(configured: Option<Duration>, longest_step: Duration) -> Duration {
    configured.unwrap_or_else(|| LEAST_STEP_TIMEOUT.max(longest_step * LONGEST_STEPS))
}

/// Serves a router until `stopped` ends. The engine, the task that forwards steps to it, and the gRPC server run under
/// `supervisor`, because the process cannot serve without any of them.
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
    let reports = supervisor.clone();
    supervisor.thread("engine", move || match engine.run(received, &pulse) {
        Ok(()) => {}
        Err(error) if error.is_loss_of_a_peer() => {
            reports.report(Failure::Lost { name: "engine".into(), cause: error.to_string() });
        }
        Err(error) => tracing::error!("the device failed: {error}"),
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
