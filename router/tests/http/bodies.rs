//! Bodies that are large, slow, or never read.

use std::{
    fs,
    future::pending,
    io::ErrorKind,
    time::{Duration, Instant},
};

use futures::future::join_all;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    sync::Barrier,
    time::timeout,
};

use crate::{
    process::Program,
    router::{Router, tokens},
    shard::Script,
    sockets::{LONG, answer, connect_from, head, status},
};

/// A body for `/generate` of so many bytes, which is refused when it has been read.
fn body(length: usize) -> String {
    let empty = json!({"inputs": ""}).to_string().len();
    json!({"inputs": "x".repeat(length - empty)}).to_string()
}

/// Sends a request of `/generate` but the last byte of its body.
async fn all_but_a_byte(stream: &mut TcpStream, key: &str, length: usize) {
    let head = head("/generate", &format!("authorization: Bearer {key}\r\n"), length);
    let request = head + &body(length);
    stream.write_all(&request.as_bytes()[..request.len() - 1]).await.unwrap();
}

async fn last_byte(stream: &mut TcpStream) {
    stream.write_all(b"}").await.unwrap();
}

/// A client that sends the head and all of the body but a byte, as fast as it may. Returns its answer and when that
/// came.
async fn stalled(address: &str, head: &str, text: &[u8], begun: &Barrier) -> (String, Duration) {
    // Little of what is not read waits in this machine's memory.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_send_buffer_size(16 << 10).unwrap();
    let (mut reading, mut writing) = socket.connect(address.parse().unwrap()).await.unwrap().into_split();
    let sent = Instant::now();
    writing.write_all(head.as_bytes()).await.unwrap();
    let write = async {
        let mut rest = text;
        // No more than the system takes of what the router does not read.
        _ = timeout(Duration::from_secs(1), writing.write_all_buf(&mut rest)).await;
        begun.wait().await;
        _ = writing.write_all_buf(&mut rest).await;
        pending::<()>().await;
    };
    let mut answer = String::new();
    tokio::select! {
        () = write => {}
        read = reading.read_to_string(&mut answer) => assert!(read.is_ok(), "{read:?} after {answer:?}"),
    }
    (answer, sent.elapsed())
}

/// Waits of a client for its first token, many times.
async fn first_tokens(address: &str) -> Vec<Duration> {
    let client = reqwest::Client::new();
    let mut waits = Vec::new();
    for _ in 0..100 {
        let sent = Instant::now();
        let url = format!("http://{address}/generate_stream");
        let mut stream = client.post(url).json(&json!({"inputs": "x"})).send().await.unwrap();
        assert_eq!(stream.status(), 200);
        stream.chunk().await.unwrap().unwrap();
        waits.push(sent.elapsed());
    }
    waits.sort();
    waits
}

#[tokio::test]
async fn five_thousand_stalled_bodies_take_no_memory_and_delay_nobody() {
    const CLIENTS: usize = 5000;
    const LENGTH: usize = 2 << 20;
    let deadline = Duration::from_secs(20);
    let mut program = Program::start(Script::saying(tokens("a")), |router| {
        router.max_body_size = LENGTH as u64;
        router.body_timeout = deadline;
    });
    let address = program.says("listening on ").await;
    let (head, text) = (head("/generate", "", LENGTH), body(LENGTH));
    let begun = Barrier::new(CLIENTS + 1);
    let text = &text.as_bytes()[..LENGTH - 1];
    let clients = join_all((0..CLIENTS).map(|_| stalled(&address, &head, text, &begun)));
    let other = async {
        begun.wait().await;
        first_tokens(&address).await
    };
    let (answers, waits) = timeout(3 * LONG, async { tokio::join!(clients, other) }).await.unwrap();
    for (answer, after) in answers {
        assert_eq!(status(&answer), 408, "{answer}");
        assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
        assert!(after >= deadline, "{after:?}");
    }
    let status = fs::read_to_string(format!("/proc/{}/status", program.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    eprintln!("memory: {} MiB; first token: median {:?}, longest {:?}", peak >> 10, waits[50], waits[99]);
    assert!(peak < 400 << 10, "{peak} kB");
    assert!(waits[50] < Duration::from_millis(100), "{waits:?}");
}

#[tokio::test]
async fn a_body_waits_for_memory_and_only_behind_its_own() {
    const LENGTH: usize = 60 << 10;
    let router = Router::start_with(Script::saying(tokens("a")), |config| {
        config.router.api_keys = vec!["sk-many".into(), "sk-few".into()];
        config.router.max_body_memory = 128 << 10;
    })
    .await;
    let mut first = TcpStream::connect(&router.address).await.unwrap();
    all_but_a_byte(&mut first, "sk-many", LENGTH).await;
    // Whoever expects this is told to go on when the body is read.
    let mut second = TcpStream::connect(&router.address).await.unwrap();
    let headers = "authorization: Bearer sk-many\r\nexpect: 100-continue\r\n";
    second.write_all(head("/generate", headers, LENGTH).as_bytes()).await.unwrap();
    // Of another tenant, of another address, and a small one of the same.
    let mut tenant = TcpStream::connect(&router.address).await.unwrap();
    all_but_a_byte(&mut tenant, "sk-few", LENGTH).await;
    last_byte(&mut tenant).await;
    let mut address = connect_from(&router.address, 2).await;
    all_but_a_byte(&mut address, "sk-many", LENGTH).await;
    last_byte(&mut address).await;
    let mut small = TcpStream::connect(&router.address).await.unwrap();
    all_but_a_byte(&mut small, "sk-many", 9000).await;
    last_byte(&mut small).await;
    for stream in [tenant, address, small] {
        assert_eq!(status(&answer(stream).await), 422);
    }
    let read = second.try_read(&mut [0; 1]).map_err(|error| error.kind());
    assert_eq!(read, Err(ErrorKind::WouldBlock), "its body is not read while the first has the memory");
    last_byte(&mut first).await;
    assert_eq!(status(&answer(first).await), 422, "the prompt is too long");
    let mut told = [0; 25];
    timeout(LONG, second.read_exact(&mut told)).await.unwrap().unwrap();
    assert_eq!(&told, b"HTTP/1.1 100 Continue\r\n\r\n");
    second.write_all(body(LENGTH).as_bytes()).await.unwrap();
    assert_eq!(status(&answer(second).await), 422);
}

/// A body in chunks, as a whole or without its end.
fn chunked(parts: &[usize], ends: bool) -> String {
    let chunk = |length: &usize| format!("{length:x}\r\n{}\r\n", " ".repeat(*length));
    let chunks: String = parts.iter().map(chunk).collect();
    let json = json!({"inputs": "x", "parameters": {"max_new_tokens": 1}}).to_string();
    format!("{:x}\r\n{json}\r\n{chunks}{}", json.len(), if ends { "0\r\n\r\n" } else { "" })
}

#[tokio::test]
async fn bodies_may_come_in_chunks() {
    let router = Router::start_with(Script::saying(tokens("a")), |config| {
        config.router.body_timeout = Duration::from_millis(500);
    })
    .await;
    let head =
        "POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    for (parts, ends, expected) in [
        (&[][..], true, 200),
        (&[1, 1, 1], true, 200),
        (&[16 << 10], true, 200),
        (&[20 << 10, 20 << 10], true, 200),
        (&[30 << 10, 30 << 10], true, 200),
        (&[40 << 10, 40 << 10], true, 413),
        (&[1 << 20], true, 413),
        (&[], false, 408),
        (&[20 << 10], false, 408),
        (&[60 << 10], false, 408),
    ] {
        let mut stream = TcpStream::connect(&router.address).await.unwrap();
        stream.write_all((head.to_owned() + &chunked(parts, ends)).as_bytes()).await.unwrap();
        let answer = answer(stream).await;
        assert_eq!(status(&answer), expected, "{parts:?}: {answer}");
    }
}

#[tokio::test]
async fn an_answer_to_a_body_that_is_not_read_is_not_lost() {
    let router = Router::start_with(Script::saying(tokens("a")), |config| {
        config.router.api_keys = vec!["sk".into()];
    })
    .await;
    let length = 4 << 20;
    for (request, expected) in [
        ("POST /generate", 401),
        ("POST /v1/completions", 401),
        ("POST /no/such/route", 401),
        ("POST /no/such/route|authorization: Bearer sk\r\n", 404),
        ("POST /v1/no/such/route|authorization: Bearer sk\r\n", 404),
        ("PUT /generate|authorization: Bearer sk\r\n", 405),
        ("PATCH /v1/completions|authorization: Bearer sk\r\n", 405),
        ("POST /info|authorization: Bearer sk\r\n", 405),
        ("POST /health|authorization: Bearer sk\r\n", 405),
        ("POST /generate|authorization: Bearer sk\r\n", 413),
        ("POST /v1/chat/completions|authorization: Bearer sk\r\n", 413),
        ("GET /info|authorization: Bearer sk\r\n", 200),
    ] {
        let (line, headers) = request.split_once('|').unwrap_or((request, ""));
        let mut stream = TcpStream::connect(&router.address).await.unwrap();
        let head = format!("{line} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        // Reads nothing before all is sent.
        stream.write_all(&vec![b' '; length]).await.unwrap();
        let answer = answer(stream).await;
        assert_eq!(status(&answer), expected, "{request}: {answer}");
        assert!(answer.contains("\r\nconnection: close\r\n"), "{request}: {answer}");
    }
}

#[tokio::test]
async fn the_total_time_begins_with_the_head() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let text = json!({"inputs": "x"}).to_string();
    let mut stream = TcpStream::connect(&router.address).await.unwrap();
    let head = head("/generate", "expect: 100-continue\r\n", text.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut told = [0; 25];
    timeout(LONG, stream.read_exact(&mut told)).await.unwrap().unwrap();
    assert_eq!(&told, b"HTTP/1.1 100 Continue\r\n\r\n");
    // From here on the body is waited for.
    let told = Instant::now();
    while told.elapsed() < Duration::from_millis(30) {
        router.ok("/generate", &json!({"inputs": "x"})).await;
    }
    stream.write_all(text.as_bytes()).await.unwrap();
    let answer = answer(stream).await;
    let total = answer.lines().find_map(|line| line.strip_prefix("x-total-time: ")).unwrap();
    assert!(total.parse::<u64>().unwrap() >= 30, "{answer}");
}

#[tokio::test]
async fn a_connection_without_a_body_stays_open() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let mut stream = TcpStream::connect(&router.address).await.unwrap();
    let text = json!({"inputs": "x"}).to_string();
    let post = format!("POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{text}", text.len());
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
    for (request, expected) in [
        (get("/no/such/route"), 404),
        (get("/generate"), 405),
        (post.clone(), 200),
        (get("/info"), 200),
        (post, 200),
    ] {
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let mut buffer = [0; 1 << 12];
        while !answer.contains("\r\n\r\n") || !answer.ends_with('}') {
            let read = timeout(LONG, stream.read(&mut buffer)).await.unwrap().unwrap();
            assert!(read > 0, "{request:?}: it was closed after {answer:?}");
            answer += std::str::from_utf8(&buffer[..read]).unwrap();
        }
        assert_eq!(status(&answer), expected);
    }
}

#[tokio::test]
async fn clients_that_leave_while_they_are_tokenized_hold_no_thread() {
    const LENGTH: usize = 2 << 20;
    let mut program = Program::start(Script::saying(tokens("a")), |router| {
        router.max_body_size = LENGTH as u64;
        router.validation_workers = 2;
    });
    let address = program.says("listening on ").await;
    let threads = || fs::read_dir(format!("/proc/{}/task", program.id())).unwrap().count();
    let before = threads();
    let request = head("/generate", "", LENGTH) + &body(LENGTH);
    for _ in 0..500 {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
    }
    let client = reqwest::Client::new();
    let asked = client.post(format!("http://{address}/generate")).json(&json!({"inputs": "x"})).send();
    assert_eq!(timeout(LONG, asked).await.unwrap().unwrap().status(), 200);
    let more = threads() - before;
    // A thread that has given up its turn may not wait for work yet when the next one begins.
    assert!(more <= 4, "{more} threads more than before");
}

#[tokio::test]
async fn an_answer_is_not_lost_to_what_follows_the_request() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let text = json!({"inputs": "x"}).to_string();
    for length in [1, 2, 100, 4 << 10, 100 << 10, 1 << 20, 4 << 20] {
        let mut stream = TcpStream::connect(&router.address).await.unwrap();
        let request = head("/generate", "", text.len()) + &text;
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.write_all(&vec![b'\n'; length]).await.unwrap();
        let answer = answer(stream).await;
        assert_eq!(status(&answer), 200, "{length}: {answer}");
    }
}

#[tokio::test]
async fn an_ordinary_client_hears_that_its_body_is_too_large() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    for length in [(64 << 10) + 1, 1 << 20, 16 << 20, 64 << 20] {
        for path in ["/generate", "/v1/completions"] {
            let asked = router.post_bytes(path, vec![b' '; length]);
            let (status, body) = timeout(LONG, asked).await.unwrap();
            assert_eq!(status, 413, "{path}, {length} bytes: {body}");
        }
    }
}

#[tokio::test]
async fn compressed_bodies_are_refused_by_name() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let text = json!({"inputs": "x", "prompt": "x"}).to_string();
    let ask = async |path: &str, headers: &str| {
        let mut stream = TcpStream::connect(&router.address).await.unwrap();
        stream.write_all((head(path, headers, text.len()) + &text).as_bytes()).await.unwrap();
        answer(stream).await
    };
    for encoding in
        ["gzip", "GZIP", "br", "deflate", "zstd", "compress", "gzip, identity", "identity,br", "x"]
    {
        for path in ["/generate", "/generate_stream", "/", "/v1/completions", "/v1/chat/completions"] {
            let answer = ask(path, &format!("content-encoding: {encoding}\r\n")).await;
            assert_eq!(status(&answer), 415, "{answer}");
            assert!(answer.contains("\r\naccept-encoding: identity\r\n"), "{answer}");
            assert!(answer.contains(&format!(r#"content-encoding \"{encoding}\""#)), "{answer}");
            assert!(answer.contains("unsupported_encoding"), "{answer}");
        }
    }
    let two = ask("/generate", "content-encoding: identity\r\ncontent-encoding: gzip\r\n").await;
    assert_eq!(status(&two), 415, "{two}");
    for encoding in ["identity", "Identity", "identity, identity", ""] {
        // The body has a field that is not the route's: it was read.
        let answer = ask("/generate", &format!("content-encoding: {encoding}\r\n")).await;
        assert!(answer.contains("`prompt` is not supported"), "{answer}");
    }
}

#[tokio::test]
async fn bodies_that_do_not_come_to_their_end_are_not_called_bad_json() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let chunked = |chunks: &str| {
        format!("POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n{chunks}")
    };
    for request in [
        head("/generate", "", 20) + "{\"inputs\": \"x\"}",
        head("/generate", "", 1),
        head("/v1/completions", "", 20) + "{",
        head("/v1/chat/completions", "", 20) + "{}",
        chunked("zz\r\n{}\r\n"),
        chunked("-1\r\n{}\r\n"),
        chunked("2\r\n{}xx"),
        chunked("2\r\n{}\r\n"),
        chunked("2\r\n{"),
        chunked("ffffffffffffffffff\r\n{}"),
    ] {
        let mut stream = TcpStream::connect(&router.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let answer = answer(stream).await;
        assert_eq!(status(&answer), 400, "{request:?}: {answer}");
        assert!(answer.contains("the body could not be read: "), "{answer}");
        assert!(answer.contains("malformed") && !answer.contains("JSON"), "{answer}");
    }
}
