//! Thousands of clients that stop within their bodies, and what another client sees of them.
//!
//! 5,000 clients connect at once and send a body of 2 MiB but for its last byte. Other clients ask for one token after
//! the other all the while: one on a connection that stays open, one on a new connection each time. Router, shard,
//! stalled clients and asking clients are processes of their own. As they share the machine's cores, the same client
//! also asks a server that does nothing but answer: what it waits there is not the router's doing.

#![expect(clippy::print_stdout, reason = "the processes tell each other what happens by their stdout")]
#![expect(clippy::disallowed_methods, reason = "clients ask at a pace")]

#[path = "../support/model.rs"]
mod model;
mod probe;
#[expect(dead_code, reason = "no step takes time here, and none is timed")]
#[path = "../support/shard.rs"]
mod shard;
mod stalled;

use std::{
    env,
    error::Error,
    fs,
    io::{self, BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use model::{configuration, write_tokenizer};
use probe::{Probe, Sample};
use shard::Double;
use tokio::runtime::{self, Runtime};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The variable that tells a process of this benchmark what to be.
const ROLE: &str = "STALLED_ROLE";
/// Time for which nobody but the asking clients is there.
const ALONE: Duration = Duration::from_secs(3);

/// The deadline of bodies: shorter than by default, and long enough for all clients to stall before it.
const DEADLINE: Duration = Duration::from_secs(10);

/// A process that ends with this one.
struct Part(Child);

impl Drop for Part {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts this program in a role, with less of the processor's time than the others if it is `nice`.
fn start(role: &str, argument: &str, nice: bool) -> Result<Part> {
    let program = env::current_exe()?;
    let mut command = if nice { Command::new("nice") } else { Command::new(&program) };
    if nice {
        command.args(["-n", "10"]).arg(&program);
    }
    let command = command.arg(argument).env(ROLE, role).stdin(Stdio::null()).stdout(Stdio::piped());
    Ok(Part(command.spawn()?))
}

/// Starts the router's own program; returns it with its address.
fn start_router(folder: &Path, socket: &Path) -> Result<(Part, String)> {
    let file = folder.join("config.json");
    let mut config = configuration(folder, socket);
    config.router.body_timeout = DEADLINE;
    config.write(&file)?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_lorax-router"));
    command.arg("--config").arg(file).env("LOG_LEVEL", "info");
    let mut router =
        Part(command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?);
    let mut log = BufReader::new(router.0.stderr.take().ok_or("no log")?).lines();
    let address = loop {
        let line = log.next().ok_or("the router ended")??;
        if let Some((_, address)) = line.split_once("listening on ") {
            break address.trim().to_owned();
        }
    };
    thread::spawn(move || log.map_while(io::Result::ok).for_each(|line| eprintln!("{line}")));
    Ok((router, address))
}

fn runtime() -> io::Result<Runtime> {
    runtime::Builder::new_current_thread().enable_all().build()
}

/// The largest memory that a process has had, in MiB.
fn peak(process: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(peak.trim().trim_end_matches(" kB").parse::<u64>()? >> 10)
}

fn main() -> Result<()> {
    let argument = env::args().nth(1).unwrap_or_default();
    match env::var(ROLE).as_deref() {
        Ok("shard") => {
            let folder = Path::new(&argument);
            let vocab = write_tokenizer(folder)?;
            runtime()?.block_on(Double::new(vocab, 0, 1).serve(&folder.join("shard.sock")))
        }
        Ok("stalled") => runtime()?.block_on(stalled::stall(&argument)),
        Ok("control") => probe::answer_all(),
        _ => measure(),
    }
}

fn measure() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("shard.sock");
    let _shard = start("shard", folder.path().to_str().ok_or("an odd folder")?, false)?;
    while !socket.exists() {
        thread::sleep(Duration::from_millis(10));
    }
    let (router, address) = start_router(folder.path(), &socket)?;
    let mut control = start("control", "", false)?;
    let mut line = String::new();
    BufReader::new(control.0.stdout.take().ok_or("no stdout")?).read_line(&mut line)?;
    let asked = [("router", &*address), ("control", line.trim())];
    let asked = asked.into_iter().flat_map(|(name, at)| [(name, "open", at, true), (name, "new", at, false)]);
    let probes = asked.map(|(name, kind, at, keep)| Ok((name, kind, Probe::start(at, keep)?)));
    let probes = probes.collect::<Result<Vec<_>>>()?;
    let begun = Instant::now();
    thread::sleep(ALONE);
    let mut phases = vec![("alone", begun)];
    let mut clients = start("stalled", &address, true)?;
    phases.push(("connect", Instant::now()));
    let mut out = io::stdout().lock();
    for line in BufReader::new(clients.0.stdout.take().ok_or("no stdout")?).lines() {
        match &*line? {
            "waiting" => phases.push(("wait", Instant::now())),
            "deadlines" => phases.push(("deadlines", Instant::now())),
            other => writeln!(out, "{other}")?,
        }
    }
    phases.push(("after", Instant::now()));
    thread::sleep(ALONE);
    writeln!(out, "memory of the router at its largest: {} MiB", peak(router.0.id())?)?;
    writeln!(out, "                                                first token, ms")?;
    writeln!(out, "server   connection  phase      seconds  number    p50    p99   longest  above 100 ms")?;
    for (name, kind, probe) in probes {
        let samples = probe.stop()?;
        for (i, (phase, from)) in phases.iter().enumerate() {
            let to = phases.get(i + 1).map_or_else(Instant::now, |(_, next)| *next);
            let seconds = (to - *from).as_secs_f64();
            write!(out, "{name:8} {kind:11} {phase:10} {seconds:7.2}")?;
            writeln!(out, "{}", summary(&samples, *from, to))?;
        }
    }
    Ok(())
}

/// Number, percentiles, and the number of those that were too late, of the requests sent in a time.
fn summary(samples: &[Sample], from: Instant, to: Instant) -> String {
    let within = samples.iter().filter(|sample| (from..to).contains(&sample.sent));
    let mut waits: Vec<f64> = within.map(|sample| sample.wait.as_secs_f64() * 1e3).collect();
    waits.sort_by(f64::total_cmp);
    let at = |share: f64| waits.get((share * waits.len() as f64) as usize).copied().unwrap_or_default();
    let late = waits.iter().filter(|wait| **wait > 100.0).count();
    let longest = waits.last().copied().unwrap_or_default();
    format!(" {:7} {:6.2} {:6.2} {longest:9.2} {late:13}", waits.len(), at(0.5), at(0.99))
}
