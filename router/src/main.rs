//! `lorax-router`: the HTTP side of the server.

use std::{
    io::{self, IsTerminal},
    path::PathBuf,
    thread,
};

use clap::Parser;
use config::Config;
use lorax_router::{App, StartError, server};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};
use tracing_subscriber::EnvFilter;

/// Bad configuration (sysexits' EX_USAGE).
const EX_USAGE: i32 = 64;

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
    let config = match Config::read(&args.config) {
        Ok(config) => config,
        Err(error) => exit(EX_USAGE, &error.into()),
    };
    let filter = EnvFilter::try_from_env("LOG_LEVEL").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    if config.log.json_output {
        log.json().init()
    } else {
        log.with_target(false).init()
    }
    if let Err(error) = run(config) {
        let usage = error.downcast_ref::<StartError>().is_some_and(StartError::is_usage);
        exit(if usage { EX_USAGE } else { 1 }, &error);
    }
}

fn exit(code: i32, error: &anyhow::Error) -> ! {
    // These errors have their causes in their own words.
    eprintln!("error: {error}");
    std::process::exit(code)
}

#[tokio::main(worker_threads = 2)]
async fn run(config: Config) -> anyhow::Result<()> {
    let stop = told_to_stop()?;
    // Before anything slow: a port that is taken is found out at once.
    let (listener, address) = server::listen(&config).await?;
    let app = App::start(config)?;
    tracing::info!("waiting for the model; {address} answers 503 until it is ready");
    let starting = app.clone();
    tokio::spawn(async move {
        starting.ready().await;
        tracing::info!("listening on {address}");
    });
    server::serve(listener, app, stop).await;
    Ok(())
}

/// Ends with SIGTERM, SIGINT, or the launcher's end of stdin; signals are caught from the call on.
fn told_to_stop() -> io::Result<impl Future<Output = ()> + Send> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (closing, closed) = oneshot::channel();
    // Not one of the runtime's threads: it would wait for the read to end before it ends itself.
    thread::spawn(move || {
        // An error is an end, and by then nobody may listen.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        let _ = closing.send(());
    });
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = closed => {}
        }
    })
}
