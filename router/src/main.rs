//! `lorax-router`: the HTTP side of the server.

use std::{path::PathBuf, time::Duration};

use clap::Parser;
use config::Config;
use lifecycle::{EX_USAGE, Parent, Supervisor, fail};
use lorax_router::{App, StartError, server};
use tokio::runtime;

/// Time for work that nobody waits for any more, such as tokenizing, to end.
const LEFT_OVER: Duration = Duration::from_secs(1);

/// The HTTP side of the server. Started by lorax-launcher.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The run configuration.
    #[arg(long)]
    config: PathBuf,
}

fn main() {
    let args = Args::parse();
    let config = Config::read(&args.config).unwrap_or_else(|error| fail(EX_USAGE, &error));
    let log = telemetry::start(config.log.json_output).unwrap_or_else(|error| fail(1, &error));
    lifecycle::before_exit(telemetry::flush);
    if let Err(error) = run(config) {
        let usage = error.downcast_ref::<StartError>().is_some_and(StartError::is_usage);
        fail(if usage { EX_USAGE } else { 1 }, &*error);
    }
    drop(log);
}

fn run(config: Config) -> anyhow::Result<()> {
    let parent = Parent::link()?;
    let supervisor = Supervisor::ending_the_process()?;
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(config.router.router_threads)
        .enable_all()
        .build()?;
    let served = runtime.block_on(serve(config, &parent, &supervisor));
    runtime.shutdown_timeout(LEFT_OVER);
    served
}

async fn serve(config: Config, parent: &Parent, supervisor: &Supervisor) -> anyhow::Result<()> {
    let told_to_stop = parent.told_to_stop()?;
    // Before anything slow: a port that is taken is found out at once.
    let (listener, address) = server::listen(&config).await?;
    let app = App::start(config, supervisor)?;
    parent.serving();
    tracing::info!("waiting for the model; {address} answers 503 until it is ready");
    let starting = app.clone();
    supervisor.task("start-up message", async move {
        starting.ready().await;
        tracing::info!("listening on {address}");
        // A supervised task does not return.
        std::future::pending().await
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
