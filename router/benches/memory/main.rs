//! The memory of the router over a million requests: the real one, over HTTP and gRPC, with a shard that computes
//! nothing. Everything is in this process, so that what the clients and the shard keep would show as well.
//!
//! Requests are of many kinds, and what a server could remember of them is different in each: schemas, prompts, stop
//! strings, users, salts, names of adapters that nobody has, bodies that are refused, clients that leave.

#[path = "../support/model.rs"]
mod model;
#[expect(dead_code, reason = "no step takes time here, and none is timed")]
#[path = "../support/shard.rs"]
mod shard;

use std::{
    env,
    error::Error,
    fs,
    io::{self, Write},
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use futures::future::try_join_all;
use lifecycle::Supervisor;
use lorax_router::{App, server};
use model::{configuration, write_tokenizer};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use shard::Double;
use tokio::runtime::Runtime;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The variable that says how many requests there are.
const REQUESTS: &str = "LORAX_BENCH_REQUESTS";
const CLIENTS: usize = 256;
/// Lines of the table.
const PARTS: u64 = 20;
/// Parts that fill caches and pools; the memory behind them is what the end is compared with.
const WARM: u64 = 4;
/// The memory at the end over that behind the warm parts, at most.
const GROWTH: f64 = 1.05;
/// One request of so many has a schema that was not sent before, which is compiled.
const UNSEEN: u64 = 64;

/// A body, the status that answers it, and whether the client leaves after the first bytes of the answer.
struct Ask {
    body: Value,
    status: StatusCode,
    leaves: bool,
}

/// A list of records, one field of which has the given name.
fn schema(name: u64) -> Value {
    json!({"type": "array", "minItems": 1000, "items": {"type": "object",
        "properties": {format!("field-{name}"): {"type": "string"}, "age": {"type": "integer"}},
        "required": [format!("field-{name}"), "age"], "additionalProperties": false}})
}

/// The `i`-th request.
fn ask(i: u64) -> Ask {
    let stream = i.is_multiple_of(2);
    let mut body = json!({"prompt": format!("number {i} of many"), "max_tokens": 4, "ignore_eos": true,
        "stream": stream, "user": format!("user-{i}"), "cache_salt": format!("salt-{i}")});
    let (mut status, mut leaves) = (StatusCode::OK, false);
    match i % 8 {
        0 | 1 => body["stop"] = json!([format!("stop-{i}")]),
        2 | 3 => {
            body["guided_json"] = schema(if (i / 8).is_multiple_of(UNSEEN) { i } else { i / 8 % UNSEEN })
        }
        4 => (body["max_tokens"], leaves) = (json!(512), true),
        5 => (body["model"], status) = (json!(format!("nobody/has-{i}")), StatusCode::NOT_FOUND),
        6 => (body["temperature"], status) = (json!(format!("warm-{i}")), StatusCode::BAD_REQUEST),
        _ => {}
    }
    Ask { body, status, leaves }
}

/// Sends requests until all are taken.
async fn client(client: Client, url: Arc<str>, taken: Arc<AtomicU64>, end: u64) -> Result<()> {
    loop {
        let i = taken.fetch_add(1, Ordering::Relaxed);
        if i >= end {
            return Ok(());
        }
        let Ask { body, status, leaves } = ask(i);
        let mut response = client.post(&*url).json(&body).send().await?;
        if response.status() != status {
            let (seen, text) = (response.status(), response.text().await?);
            return Err(format!("{status} was expected and not {seen} for {body}: {text}").into());
        }
        if leaves {
            response.chunk().await?;
        } else {
            response.bytes().await?;
        }
    }
}

/// Resident memory of this process, in MiB.
fn resident() -> Result<f64> {
    let statm = fs::read_to_string("/proc/self/statm")?;
    let pages: f64 = statm.split(' ').nth(1).ok_or("statm has no second field")?.parse()?;
    Ok(pages * 4096.0 / 1_048_576.0)
}

async fn start_router(model: &Path, socket: &Path, supervisor: &Supervisor) -> Result<SocketAddr> {
    let mut config = configuration(model, socket);
    config.shard.adapter_dir = Some(model.into());
    let (listener, address) = server::listen(&config).await?;
    let app = App::start(config, supervisor)?;
    app.ready().await;
    let supervisor = supervisor.clone();
    tokio::spawn(async move { server::serve(listener, app, &supervisor, std::future::pending()).await });
    Ok(address)
}

fn main() -> Result<()> {
    let runtime = Runtime::new()?;
    let supervisor = Supervisor::ending_the_process()?;
    let result = runtime.block_on(run(&supervisor));
    // The router's tasks end with the runtime.
    supervisor.stopping();
    result
}

async fn run(supervisor: &Supervisor) -> Result<()> {
    let requests = env::var(REQUESTS).map_or(Ok(1_000_000), |number| number.parse::<u64>())?;
    let folder = tempfile::tempdir()?;
    let double = Double::new(write_tokenizer(folder.path())?, 0, 1);
    let socket = folder.path().join("shard.sock");
    let (serving, path) = (double.clone(), socket.clone());
    tokio::spawn(async move { serving.serve(&path).await });
    let address = start_router(folder.path(), &socket, supervisor).await?;
    let url: Arc<str> = format!("http://{address}/v1/completions").into();
    let (http, taken) = (Client::builder().no_proxy().build()?, Arc::new(AtomicU64::new(0)));
    let mut out = io::stdout().lock();
    writeln!(out, "requests  seconds  resident, MiB")?;
    let (begun, mut warm) = (Instant::now(), 0.0);
    for part in 1..=PARTS {
        let end = requests * part / PARTS;
        try_join_all((0..CLIENTS).map(|_| client(http.clone(), url.clone(), taken.clone(), end))).await?;
        taken.store(end, Ordering::Relaxed);
        double.take();
        let now = resident()?;
        writeln!(out, "{end:8} {:8.0} {now:14.1}", begun.elapsed().as_secs_f64())?;
        if part == WARM {
            warm = now;
        }
        if part == PARTS && now > warm * GROWTH {
            return Err(format!("memory grew from {warm:.1} to {now:.1} MiB").into());
        }
    }
    Ok(())
}
