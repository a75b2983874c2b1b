//! The cost of the router: the real one, over HTTP and gRPC, with a shard that computes nothing and takes no time for a
//! step, or as long as a GPU would.
//!
//! Router, masks, shard and clients have threads of their own, three, one, one and one, so that the CPU time of each is known. The
//! tokenizer is byte-level, as Llama 3's, with 256 special tokens.
//!
//! A turn-around is also the time that the threads wait for a core. What other processes used of the machine meanwhile is
//! therefore reported beside it: where that is more than a few hundredths of a core, the run says nothing of the router.

mod client;
#[path = "../support/model.rs"]
mod model;
#[path = "../support/shard.rs"]
mod shard;

use std::{
    env,
    error::Error,
    fs,
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use client::Client;
use futures::future::try_join_all;
use lifecycle::Supervisor;
use lorax_router::{App, server};
use model::{configuration, write_tokenizer};
use shard::Double;
use tokio::runtime::{Builder, Runtime};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const PROMPT: usize = 512;
const OUTPUT: usize = 128;
/// Threads of router, masks (as many as there are on two cores), shard and clients, by name.
const NAMES: [&[&str]; 4] = [&["router", "engine"], &["masks 0"], &["shard"], &["client"]];
/// Streams, requests of each, milliseconds that a step takes, and whether the streams are constrained JSON.
const SCENARIOS: [(usize, usize, u64, bool); 9] = [
    (1, 100, 0, false),
    (32, 20, 0, false),
    (256, 8, 0, false),
    (1, 4, 5, false),
    (32, 4, 8, false),
    (256, 4, 10, false),
    (1, 4, 5, true),
    (32, 4, 8, true),
    (256, 4, 10, true),
];
/// The variable that says how many ranks there are, each a shard of its own.
const RANKS: &str = "LORAX_BENCH_RANKS";

fn runtime(name: &str, threads: usize) -> Result<Runtime> {
    Ok(Builder::new_multi_thread().worker_threads(threads).thread_name(name).enable_all().build()?)
}

/// Starts the router as its program does; returns where it listens.
fn start_router(
    runtime: &Runtime,
    model: &Path,
    sockets: &[PathBuf],
    supervisor: &Supervisor,
) -> Result<SocketAddr> {
    let mut config = configuration(model, &sockets[0]);
    config.shards.uds = sockets.into();
    runtime.block_on(async {
        let (listener, address) = server::listen(&config).await?;
        let app = App::start(config, supervisor)?;
        app.ready().await;
        let supervisor = supervisor.clone();
        tokio::spawn(async move { server::serve(listener, app, &supervisor, std::future::pending()).await });
        Ok(address)
    })
}

/// CPU time in a line of `stat`, "id (name) state …", if the name is one of these.
fn cpu_of(stat: &str, names: &[&str]) -> Option<Duration> {
    let (head, fields) = stat.rsplit_once(") ")?;
    let (_, name) = head.split_once('(')?;
    // User and system time are fields 14 and 15.
    let ticks = fields.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok());
    names.contains(&name).then(|| Duration::from_millis(ticks.sum::<u64>() * 10))
}

/// CPU time of this process's threads of the given names.
fn cpu(names: &[&str]) -> Result<Duration> {
    let mut sum = Duration::ZERO;
    for task in fs::read_dir("/proc/self/task")? {
        let stat = fs::read_to_string(task?.path().join("stat"))?;
        sum += cpu_of(&stat, names).unwrap_or_default();
    }
    Ok(sum)
}

/// CPU time that the machine has spent on anything but this process.
fn others() -> Result<Duration> {
    // The first line: "cpu user nice system idle iowait irq softirq steal …".
    let stat = fs::read_to_string("/proc/stat")?;
    let fields: Vec<u64> =
        stat.split_ascii_whitespace().skip(1).map_while(|field| field.parse().ok()).collect();
    let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|&field| fields.get(field)).sum();
    let own: Duration = NAMES.into_iter().map(cpu).sum::<Result<_>>()?;
    Ok(Duration::from_millis(busy * 10).saturating_sub(own))
}

async fn load(address: SocketAddr, streams: usize, requests: usize, constrained: bool) -> Result<()> {
    let stream = || async {
        let mut client = Client::connect(address, PROMPT, OUTPUT, constrained).await?;
        for _ in 0..requests {
            client.ask().await?;
        }
        Ok::<_, io::Error>(())
    };
    let tasks = (0..streams).map(|_| stream());
    try_join_all(tasks).await?;
    Ok(())
}

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let vocab = write_tokenizer(folder.path())?;
    let world = env::var(RANKS).map_or(Ok(1), |ranks| ranks.parse())?;
    let doubles: Vec<_> = (0..world).map(|rank| Double::new(vocab, rank, world)).collect();
    let sockets: Vec<_> = (0..world).map(|rank| folder.path().join(format!("shard-{rank}.sock"))).collect();
    let (shards, routers, clients) = (runtime("shard", 1)?, runtime("router", 2)?, runtime("client", 1)?);
    for (serving, path) in doubles.iter().cloned().zip(sockets.clone()) {
        shards.spawn(async move { serving.serve(&path).await });
    }
    let double = &doubles[0];
    let supervisor = Supervisor::ending_the_process()?;
    let address = start_router(&routers, folder.path(), &sockets, &supervisor)?;
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "                                    turn-around, us     masks, us       CPU, us a token                  cores"
    )?;
    writeln!(
        out,
        "streams  step ms  tokens/s  steps/s    p50    p99    p50    p99  idle %   client  shard  masks router  router others"
    )?;
    for (streams, requests, pace, constrained) in SCENARIOS {
        doubles.iter().for_each(|double| double.set_pace(Duration::from_millis(pace)));
        clients.block_on(async { tokio::spawn(load(address, streams, 1, constrained)).await })??;
        double.take();
        let (before, others_before) = (NAMES.map(cpu), others()?);
        let begun = Instant::now();
        clients.block_on(async { tokio::spawn(load(address, streams, requests, constrained)).await })??;
        let seconds = begun.elapsed().as_secs_f64();
        let others = others()?.saturating_sub(others_before).as_secs_f64() / seconds;
        let mut seen = double.take();
        let percentiles = |times: &mut Vec<Duration>| {
            times.sort_unstable();
            [0.5, 0.99]
                .map(|share| times.get((share * times.len() as f64) as usize).map_or(0, Duration::as_micros))
        };
        let (turnarounds, masks) = (percentiles(&mut seen.turnarounds), percentiles(&mut seen.masks));
        let tokens = (streams * requests * OUTPUT) as f64;
        write!(out, "{streams:7} {pace:8} {:9.0} {:8.0}", tokens / seconds, seen.steps as f64 / seconds)?;
        for time in turnarounds.into_iter().chain(masks) {
            write!(out, " {time:6}")?;
        }
        write!(out, " {:7.1}  ", seen.idle.as_secs_f64() / seconds * 100.0)?;
        let mut cores = 0.0;
        for (names, before) in NAMES.into_iter().zip(before).rev() {
            let used = (cpu(names)? - before?).as_secs_f64();
            write!(out, " {:6.1}", used * 1e6 / tokens)?;
            cores = used / seconds;
        }
        writeln!(out, " {cores:7.2} {others:6.2}")?;
    }
    supervisor.stopping();
    Ok(())
}
