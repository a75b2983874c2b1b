//! Measures how many tokens a second the load generator can take: against a server that streams events as fast as it
//! is read, and against one that paces 256 streams as a GPU would.
//!
//! The generator must not be what is measured at 10,000 tokens a second. Generator and server have threads of their
//! own, one each, so that the generator's CPU time is known.

use std::{
    fs,
    io::{self, Write},
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use integration_tests::load::{
    arrivals::Popularity,
    client::Target,
    report::Report,
    run::{Loop, run},
    workload::Workload,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    time::sleep,
};

const OUTPUT: usize = 128;
const STREAMS: usize = 256;
/// Tokens a second that it must be able to take.
const NEEDED: f64 = 10_000.0;

/// Writes a chunk of a chunked response.
async fn chunk(connection: &mut TcpStream, event: &str) -> io::Result<()> {
    connection.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).await
}

/// Reads a request, body and all; false at the end of the connection.
async fn read_request(connection: &mut TcpStream) -> io::Result<bool> {
    let mut request = Vec::new();
    loop {
        if connection.read_buf(&mut request).await? == 0 {
            return Ok(false);
        }
        let text = String::from_utf8_lossy(&request);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length =
            head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
        if length.is_some_and(|length| body.len() >= length) {
            return Ok(true);
        }
    }
}

/// Answers completions with `OUTPUT` tokens, `pace` apart.
async fn answer(mut connection: TcpStream, pace: Duration) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let token = "data: {\"id\":\"cmpl-18f0c5f5b5c5d5e5000000ff\",\"object\":\"text_completion\",\"created\":1764000000,\
                 \"model\":\"base\",\"choices\":[{\"index\":0,\"text\":\" word\",\"logprobs\":null,\
                 \"finish_reason\":null}],\"usage\":null}\n\n";
    let usage =
        format!("data: {{\"choices\":[],\"usage\":{{\"completion_tokens\":{OUTPUT}}}}}\n\ndata: [DONE]\n\n");
    while read_request(&mut connection).await? {
        connection.write_all(head.as_bytes()).await?;
        for _ in 0..OUTPUT {
            if !pace.is_zero() {
                sleep(pace).await;
            }
            chunk(&mut connection, token).await?;
        }
        chunk(&mut connection, &usage).await?;
        connection.write_all(b"0\r\n\r\n").await?;
    }
    Ok(())
}

fn runtime(name: &str) -> Result<Runtime> {
    Ok(Builder::new_multi_thread().worker_threads(1).thread_name(name).enable_all().build()?)
}

/// Serves on a free port.
async fn serve(pace: Duration) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            tokio::spawn(answer(connection, pace));
        }
    });
    Ok(address)
}

/// CPU seconds of this process's threads of the given name.
fn cpu(name: &str) -> Result<f64> {
    let mut ticks = 0;
    for task in fs::read_dir("/proc/self/task")? {
        // "id (name) state …": user and system time are fields 14 and 15.
        let stat = fs::read_to_string(task?.path().join("stat"))?;
        let (head, fields) = stat.rsplit_once(") ").context("a thread's state")?;
        if head.ends_with(&format!("({name}")) {
            let times = fields.split(' ').skip(11).take(2);
            ticks += times.filter_map(|field| field.parse::<u64>().ok()).sum::<u64>();
        }
    }
    Ok(ticks as f64 / 100.0)
}

fn main() -> Result<()> {
    let (server, generator) = (runtime("server")?, runtime("generator")?);
    let mut out = io::stdout().lock();
    writeln!(out, "pace ms  tokens/s  generator: CPU us a token, cores")?;
    for (pace, requests) in [(0, 16 * STREAMS), (10, 2 * STREAMS)] {
        let address = server.block_on(async { tokio::spawn(serve(Duration::from_millis(pace))).await })??;
        let target = Target::new(&format!("http://{address}"), "", true, Duration::from_secs(60))?;
        let seed = 1;
        let length = |text: &str| text.parse();
        let workload = Workload {
            adapters: Vec::new(),
            popularity: Popularity::Identical,
            prompt_tokens: length("512")?,
            output_tokens: length(&OUTPUT.to_string())?,
            vocab: 128_000,
            seed,
        };
        let (before, begun) = (cpu("generator")?, Instant::now());
        let pace_of = Loop::Closed { streams: STREAMS, requests };
        let outcomes = generator
            .block_on(async { tokio::spawn(async move { run(&target, &workload, pace_of).await }).await })?;
        let (used, seconds) = (cpu("generator")? - before, begun.elapsed().as_secs_f64());
        let report = Report::new("generator", seed, &outcomes, None);
        ensure!(report.errors == 0 && report.output_tokens == requests * OUTPUT, "{report}");
        let (tokens, speed) = (report.output_tokens as f64, report.output_tokens_per_second);
        writeln!(out, "{pace:7} {speed:9.0} {:13.1} {:21.2}", used * 1e6 / tokens, used / seconds)?;
        ensure!(pace > 0 || speed > NEEDED, "the generator takes {speed:.0} tokens/s, {NEEDED} are needed");
    }
    Ok(())
}
