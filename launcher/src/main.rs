//! `lorax-launcher`: finds the model, starts one shard per device and the router, and keeps them running.

mod args;
mod child;
mod config;
mod source;
mod supervisor;

use std::{
    fs::{self, Permissions},
    io::IsTerminal,
    os::unix::{fs::PermissionsExt, net::SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, ensure};
use args::{Args, Device};
use clap::{Parser, error::ErrorKind};
use supervisor::Plan;
use tracing_subscriber::EnvFilter;

/// Bad configuration (sysexits' EX_USAGE).
const EX_USAGE: i32 = 64;

fn main() {
    let args = Args::try_parse().unwrap_or_else(|error| {
        // Nothing is left to do when even this cannot be printed.
        let _ = error.print();
        let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
        std::process::exit(if asked { 0 } else { EX_USAGE })
    });
    let filter = EnvFilter::try_from_env("LOG_LEVEL").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    if args.json_output {
        log.json().init()
    } else {
        log.with_target(false).init()
    }
    if let Err(error) = check(&args) {
        exit(EX_USAGE, &error);
    }
    if let Err(error) = run(&args) {
        let usage = error.downcast_ref::<source::SourceError>().is_some_and(source::SourceError::is_usage)
            || error.downcast_ref::<supervisor::Failure>().is_some_and(supervisor::Failure::is_usage);
        exit(if usage { EX_USAGE } else { 1 }, &error);
    }
}

fn exit(code: i32, error: &anyhow::Error) -> ! {
    eprintln!("error: {error:#}");
    std::process::exit(code)
}

/// Refuses what cannot work before anything is fetched or started.
fn check(args: &Args) -> anyhow::Result<()> {
    ensure!(args.num_shard > 0, "--num-shard must be at least 1");
    ensure!(args.num_shard == 1 || args.device != Device::Cpu, "--num-shard: one machine's CPU is one shard");
    ensure!(args.num_shard == 1, "--num-shard {}: this version runs one shard", args.num_shard);
    ensure!(
        args.adapter_source == "local",
        "--adapter-source {:?}: only \"local\" is supported",
        args.adapter_source
    );
    for (flag, value, least, most) in [
        ("--max-concurrent-requests", args.max_concurrent_requests, 1, 1 << 20),
        ("--max-batch-size", args.max_batch_size, 1, 1 << 16),
        ("--max-active-adapters", args.max_active_adapters, 0, 1 << 16),
        ("--validation-workers", args.validation_workers, 1, 1 << 10),
        ("--threads", args.threads.unwrap_or(1), 1, 1 << 10),
        ("--max-input-length", args.max_input_length.unwrap_or(1), 1, usize::MAX),
        ("--max-batch-prefill-tokens", args.max_batch_prefill_tokens.unwrap_or(1), 1, 1 << 20),
    ] {
        ensure!(value >= least, "{flag} must be at least {least}");
        ensure!(value <= most, "{flag} must be at most {most}");
    }
    ensure!(args.shutdown_deadline <= 1 << 32, "--shutdown-deadline must be at most {} s", 1_u64 << 32);
    ensure!(args.max_total_tokens.is_none_or(|total| total > 1), "--max-total-tokens must be at least 2");
    if let (Some(input), Some(total)) = (args.max_input_length, args.max_total_tokens) {
        ensure!(input < total, "--max-input-length {input} must be less than --max-total-tokens {total}");
    }
    for (flag, value) in [
        ("--cuda-memory-fraction", args.cuda_memory_fraction),
        ("--adapter-memory-fraction", args.adapter_memory_fraction),
    ] {
        ensure!((0.0..=1.0).contains(&value), "{flag} must be between 0 and 1");
    }
    for folder in args.adapter_dir.iter().chain(&args.adapter_roots) {
        ensure!(folder.is_dir(), "{} is not a folder that can be read", folder.display());
    }
    Ok(())
}

fn run(args: &Args) -> anyhow::Result<()> {
    let model = source::find(&args.model_id, args.revision.as_deref())?;
    // Sockets and configuration are this user's alone.
    let folder =
        tempfile::Builder::new().prefix("lorax-").permissions(Permissions::from_mode(0o700)).tempdir();
    let folder = folder.context("making the folder of sockets and configuration")?;
    let sockets: Vec<PathBuf> =
        (0..args.num_shard).map(|rank| folder.path().join(format!("shard-{rank}.sock"))).collect();
    for socket in &sockets {
        // The system's bound, found out before a model is loaded.
        SocketAddr::from_pathname(socket).with_context(|| format!("{} as a socket", socket.display()))?;
    }
    let config = folder.path().join("config.json");
    fs::write(&config, serde_json::to_vec_pretty(&config::build(args, &model, &sockets))?)
        .with_context(|| format!("writing {}", config.display()))?;
    let program = std::env::current_exe().context("finding the folder of this program")?;
    let plan = Plan {
        programs: program.parent().map(PathBuf::from).context("finding the folder of this program")?,
        config,
        sockets,
        plain: args.json_output,
        deadline: Duration::from_secs(args.shutdown_deadline),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(plan.run())?)
}
