//! The clients that stall.

use std::{
    cell::Cell,
    future::pending,
    io,
    time::{Duration, Instant},
};

use futures::future::join_all;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
    sync::Barrier,
    time::timeout,
};

use crate::Result;

const CLIENTS: usize = 5000;
const LENGTH: usize = 2 << 20;
/// Time in which a client sends what the router, or the system in its place, takes.
const SENDING: Duration = Duration::from_secs(2);

/// An answer, and the time from the request's head to its end.
struct Answer {
    text: io::Result<String>,
    after: Duration,
}

/// Lets all clients connect at once and waits for their answers. Prints each phase as it begins, then a summary.
pub(crate) async fn stall(address: &str) -> Result<()> {
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    setrlimit(Resource::Nofile, files)?;
    let body = vec![b' '; LENGTH - 1];
    let (begun, ended) = (Barrier::new(CLIENTS), Cell::new(false));
    let client = || async {
        let text = ask(address, &body, &begun).await;
        if !ended.replace(true) {
            println!("deadlines");
        }
        text
    };
    let answers = join_all((0..CLIENTS).map(|_| client())).await;
    let late = |answer: &&Answer| matches!(&answer.text, Ok(text) if text.starts_with("HTTP/1.1 408 "));
    let after = answers.iter().filter(late).map(|answer| answer.after.as_secs_f64());
    let (first, last) =
        after.fold((f64::MAX, 0.0), |(first, last): (f64, f64), after| (first.min(after), last.max(after)));
    let good = answers.iter().filter(late).count();
    println!("{good} of {CLIENTS} stalled clients were answered 408, after {first:.2} to {last:.2} s");
    let others = answers.iter().filter(|answer| !late(answer));
    others.take(5).for_each(|answer| println!("another answer after {:?}: {:?}", answer.after, answer.text));
    Ok(())
}

async fn ask(address: &str, body: &[u8], begun: &Barrier) -> Answer {
    let sent = Instant::now();
    let text = exchange(address, body, begun).await;
    Answer { text, after: sent.elapsed() }
}

async fn exchange(address: &str, mut body: &[u8], begun: &Barrier) -> io::Result<String> {
    let socket = TcpSocket::new_v4()?;
    // Little of what the router does not read waits in this machine's memory.
    socket.set_send_buffer_size(16 << 10)?;
    let address = address.parse().map_err(io::Error::other)?;
    let (mut reading, mut writing) = socket.connect(address).await?.into_split();
    let head = format!("POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {LENGTH}\r\n\r\n");
    let write = async {
        // What comes of a connection that takes nothing any more, the answer shows.
        let _ = writing.write_all(head.as_bytes()).await;
        // No more than is taken of what the router does not read.
        let _ = timeout(SENDING, writing.write_all_buf(&mut body)).await;
        if begun.wait().await.is_leader() {
            println!("waiting");
        }
        let _ = writing.write_all_buf(&mut body).await;
        pending::<()>().await;
    };
    let mut answer = String::new();
    tokio::select! {
        () = write => {}
        read = reading.read_to_string(&mut answer) => drop(read?),
    }
    Ok(answer)
}
