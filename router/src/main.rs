//! `lorax-router`: the HTTP side of the server.

use std::path::PathBuf;

use clap::Parser;
use config::Config;
use lifecycle::{EX_USAGE, Supervisor, fail};
use lorax_router::{RunError, run};

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
    let log = telemetry::start(config.log.json_output)
        .unwrap_or_else(|error| fail(if error.is_usage() { EX_USAGE } else { 1 }, &error));
    lifecycle::before_exit(telemetry::flush);
    let ended = Supervisor::ending_the_process()
        .map_err(RunError::from)
        .and_then(|supervisor| run(config, &supervisor));
    if let Err(error) = ended {
        fail(if error.is_usage() { EX_USAGE } else { 1 }, &error);
    }
    drop(log);
}
