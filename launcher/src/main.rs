//! `lorax-launcher`: finds the model, starts one shard per device and the router, and keeps them running.

mod args;
mod child;
mod foreign;
mod group;
mod merged;
mod ranks;
mod supervisor;

use std::{
    env,
    env::consts::{ARCH, OS},
    fs::Permissions,
    io,
    os::unix::{fs::PermissionsExt, net::SocketAddr, process::CommandExt},
    path::PathBuf,
    process::Command,
};

use anyhow::{Context, ensure};
use args::Args;
use child::Output;
use clap::{Parser, error::ErrorKind};
use config::{Config, ModelConfig, ShardConfig, ShardsConfig};
use lifecycle::{EX_USAGE, fail};
use ranks::RanksError;
use sources::{BucketPrefix, ModelError, ModelFiles};
use supervisor::{Plan, Signals};
use telemetry::Log;

fn main() {
    let args = Args::try_parse().unwrap_or_else(|error| {
        // Nothing is left to do when even this cannot be printed.
        let _ = error.print();
        let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
        std::process::exit(if asked { 0 } else { EX_USAGE })
    });
    if let Err(error) = pass_to_clients(&args) {
        fail(1, &error);
    }
    let log = telemetry::start(args.log.json_output)
        .unwrap_or_else(|error| fail(if error.is_usage() { EX_USAGE } else { 1 }, &error));
    lifecycle::before_exit(telemetry::flush);
    if args.env {
        let (version, commit) =
            (env!("CARGO_PKG_VERSION"), option_env!("VERGEN_GIT_SHA").unwrap_or("unknown"));
        tracing::info!("lorax-launcher {version}, commit {commit}, for {} on {}", OS, ARCH);
    }
    if let Err(error) = check(&args) {
        fail(EX_USAGE, &*error);
    }
    if let Err(error) = run(&args, &log) {
        let usage = error.downcast_ref::<ModelError>().is_some_and(ModelError::is_usage)
            || error.downcast_ref::<RanksError>().is_some_and(RanksError::is_usage)
            || error.downcast_ref::<supervisor::Failure>().is_some_and(supervisor::Failure::is_usage);
        fail(if usage { EX_USAGE } else { 1 }, &*error);
    }
    drop(log);
}

/// Starts this program again, in the same process, with the variables that the clients of hubs read, if flags stand for
/// them.
fn pass_to_clients(args: &Args) -> io::Result<()> {
    let mut missing = Vec::new();
    for (name, value) in
        [("HF_HUB_CACHE", &args.huggingface_hub_cache), ("PREDIBASE_API_TOKEN", &args.predibase_api_token)]
    {
        let value = value.as_deref().filter(|value| env::var(name).as_deref() != Ok(value));
        missing.extend(value.map(|value| (name, value)));
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Command::new(env::current_exe()?).args(env::args_os().skip(1)).envs(missing).exec())
}

/// Refuses what cannot work before anything is fetched or started.
fn check(args: &Args) -> anyhow::Result<()> {
    args.foreign.check()?;
    ranks::check(args)?;
    args.router.check()?;
    merged::reference(args).context("--adapter-id")?;
    args.shard.check()?;
    for folder in args.shard.adapter_dir.iter().chain(&args.shard.adapter_roots) {
        ensure!(folder.is_dir(), "{} is not a folder that can be read", folder.display());
    }
    for bucket in &args.router.adapter_buckets {
        bucket.parse::<BucketPrefix>().with_context(|| format!("--adapter-buckets {bucket}"))?;
    }
    if let Some(file) = &args.router.api_key_file {
        ensure!(file.is_file(), "{} is not a file that can be read", file.display());
    }
    Ok(())
}

fn run(args: &Args, log: &Log) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // From here on, as the first process of a container does not end by a signal that it does not handle.
    let mut signals = runtime.block_on(async { Signals::listen() })?;
    let program = env::current_exe().context("finding the folder of this program")?;
    let programs = program.parent().context("finding the folder of this program")?;
    // Sockets and configuration are this user's alone.
    let folder =
        tempfile::Builder::new().prefix("lorax-").permissions(Permissions::from_mode(0o700)).tempdir();
    let folder = folder.context("making the folder of sockets and configuration")?;
    let found = async {
        let ranks = ranks::find(args, programs).await?;
        let model = sources::find_model(args.source, &args.model_id, args.revision.as_deref()).await?;
        let merged = match merged::reference(args)? {
            Some(reference) => {
                Some(merged::fetch(args, &reference, &folder.path().join("merged-adapter")).await?)
            }
            None => None,
        };
        let ranks = ranks::divide(args, programs, &model.path, ranks).await?;
        anyhow::Ok((ranks, model, merged))
    };
    let found = runtime.block_on(async {
        tokio::select! {
            () = signals.next() => None,
            found = found => Some(found),
        }
    });
    let Some(found) = found else {
        tracing::info!("stopping: the model was not there yet");
        // A look-up of the hub's address cannot be interrupted.
        runtime.shutdown_background();
        return Ok(());
    };
    let (ranks, ModelFiles { id, path, revision, sha }, merged_adapter) = found?;
    if args.download_only {
        tracing::info!("the model is at {}", path.display());
        return Ok(());
    }
    let sockets: Vec<PathBuf> =
        (0..ranks.number).map(|rank| folder.path().join(format!("shard-{rank}.sock"))).collect();
    let rendezvous = folder.path().join("ranks");
    // The ranks have sockets there, with names no longer than those of two ranks.
    let longest = rendezvous.join("shard-0-shard-1");
    for socket in sockets.iter().chain([&longest]) {
        // The system's bound, found out before a model is loaded.
        SocketAddr::from_pathname(socket).with_context(|| format!("{} as a socket", socket.display()))?;
    }
    let config_file = folder.path().join("config.json");
    let config = Config {
        model: ModelConfig { id, path, merged_adapter, revision, sha },
        shards: ShardsConfig { uds: sockets, rendezvous },
        router: args.router.clone(),
        shard: ShardConfig { device: ranks.device, ..args.shard.clone() },
        log: args.log.clone(),
    };
    config.write(&config_file)?;
    let plan = Plan {
        programs: programs.into(),
        output: Output { lines: log.lines(), plain: config.log.json_output },
        config,
        config_file,
    };
    Ok(runtime.block_on(plan.run(&mut signals))?)
}
