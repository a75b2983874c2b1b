//! `lorax-router`: the HTTP side of the server.

use std::{io::IsTerminal, path::PathBuf};

use clap::Parser;
use lorax_router::{App, StartError, config::Config, server};
use tokio::{
    io::AsyncReadExt,
    signal::unix::{SignalKind, signal},
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
    if config.router.json_output {
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
    // Before anything else: a port that is taken is found out at once.
    let (listener, address) = server::listen(&config).await?;
    let app = App::start(config)?;
    tokio::select! {
        () = app.ready() => {}
        () = told_to_stop() => return Ok(()),
    }
    tracing::info!("listening on {address}");
    Ok(server::serve(listener, app, told_to_stop()).await?)
}

/// Ends with SIGTERM, SIGINT, or the launcher's end of stdin.
async fn told_to_stop() {
    let wait = async |kind| match signal(kind) {
        Ok(mut signal) => {
            signal.recv().await;
        }
        Err(_) => std::future::pending().await,
    };
    let stdin_closed = async {
        let mut buffer = [0; 64];
        let mut stdin = tokio::io::stdin();
        while matches!(stdin.read(&mut buffer).await, Ok(1..)) {}
    };
    tokio::select! {
        () = wait(SignalKind::terminate()) => {}
        () = wait(SignalKind::interrupt()) => {}
        () = stdin_closed => {}
    }
}
