//! Clients that ask for one token again and again, and the server that they are checked with.

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::Result;

/// Pause between an answer and the next request.
const PAUSE: Duration = Duration::from_millis(5);
/// The longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// The end of a chunked response.
const END: &[u8] = b"\r\n0\r\n\r\n";

/// One request, and the time until its first token.
pub(crate) struct Sample {
    pub(crate) sent: Instant,
    pub(crate) wait: Duration,
}

/// A client that asks until it is stopped.
pub(crate) struct Probe {
    stop: Arc<AtomicBool>,
    asking: JoinHandle<io::Result<Vec<Sample>>>,
}

impl Probe {
    /// Starts a client of a server. It keeps its connection, or makes a new one for every request; the time until
    /// that is there counts, too.
    pub(crate) fn start(address: &str, keep: bool) -> Result<Probe> {
        let (stop, address) = (Arc::new(AtomicBool::new(false)), address.to_owned());
        let stopped = stop.clone();
        let asking = thread::Builder::new().name("probe".into()).spawn(move || {
            let (mut samples, mut kept) = (Vec::new(), None);
            while !stopped.load(Relaxed) {
                let sent = Instant::now();
                let mut stream = kept.take().map_or_else(|| connect(&address), Ok)?;
                let wait = ask(&mut stream, sent)?;
                samples.push(Sample { sent, wait });
                kept = keep.then_some(stream);
                thread::sleep(PAUSE);
            }
            Ok(samples)
        })?;
        Ok(Probe { stop, asking })
    }

    pub(crate) fn stop(self) -> Result<Vec<Sample>> {
        self.stop.store(true, Relaxed);
        Ok(self.asking.join().map_err(|_| "a client panicked")??)
    }
}

fn connect(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Sends a request, and reads all of its answer. Returns the time until the first event.
fn ask(stream: &mut TcpStream, sent: Instant) -> io::Result<Duration> {
    let body = r#"{"inputs":"abc def","parameters":{"max_new_tokens":1}}"#;
    let head =
        "POST /generate_stream HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ";
    stream.write_all(format!("{head}{}\r\n\r\n{body}", body.len()).as_bytes())?;
    let (mut answer, mut first) = (Vec::new(), None);
    let mut buffer = [0; 4096];
    while !answer.ends_with(END) {
        let read = stream.read(&mut buffer)?;
        answer.extend_from_slice(&buffer[..read]);
        let text = String::from_utf8_lossy(&answer);
        if read == 0 || !text.starts_with("HTTP/1.1 200 ") {
            return Err(io::Error::other(format!("not answered: {text:?}")));
        }
        if first.is_none() && text.contains("data:") {
            first = Some(sent.elapsed());
        }
    }
    first.ok_or_else(|| io::Error::other("no token"))
}

/// A server that gives everybody the same answer at once. Prints its address.
pub(crate) fn answer_all() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    for stream in listener.incoming() {
        let mut stream = stream?;
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while matches!(stream.read(&mut buffer), Ok(1..)) {
                let answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\ndata:x\r\n0\r\n\r\n";
                if stream.write_all(answer).is_err() {
                    return;
                }
            }
        });
    }
    Ok(())
}
