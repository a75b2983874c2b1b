//! Clients that leave, and clients that do not read.

use std::fs;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpSocket,
};

use crate::{
    router::{Router, tokens},
    shard::{Gate, Script},
};

/// Blocks for one sequence of 96 positions.
fn one_at_a_time() -> Script {
    let mut script = Script::saying(tokens("a").repeat(1000));
    script.info.num_blocks = 6;
    script
}

fn long(prompt: &str) -> Value {
    json!({"inputs": prompt, "parameters": {"max_new_tokens": 90}})
}

/// A connection that has sent a request and reads nothing by itself.
async fn connect(router: &Router, path: &str, body: &Value) -> tokio::net::TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(router.address.parse().unwrap()).await.unwrap();
    let body = body.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn one_that_leaves_makes_room_with_the_next_step() {
    for path in ["/generate", "/generate_stream", "/v1/completions"] {
        let router =
            Router::start_with(one_at_a_time(), |config| config.router.max_concurrent_requests = 3).await;
        let body = match path {
            "/v1/completions" => json!({"prompt": "A", "max_tokens": 90}),
            _ => long("A"),
        };
        router.shard.hold(Gate::Steps);
        let leaving = connect(&router, path, &body).await;
        let left = router.shard.sequence_of(&tokens("A")).await;
        // Has room only when the first has given its blocks back.
        let next = long("next");
        let mut waiting = connect(&router, "/generate_stream", &next).await;
        router.holds(2).await;
        // It is refused when it has been tokenized. The one before it has been handed over by then: one thread
        // tokenizes.
        let too_long = json!({"inputs": "x", "parameters": {"max_new_tokens": 100_000}});
        assert_eq!(router.post("/generate", &too_long).await.0, 422);
        let in_flight = router.shard.saw(|seen| seen.steps.last().map(|step| step.id)).await + 1;
        drop(leaving);
        router.holds(1).await;
        router.shard.release(&Gate::Steps);
        let step = router.shard.saw(|seen| seen.drop_of(left).cloned()).await;
        assert_eq!(step.id, in_flight + 1, "{path}");
        assert!(step.rows.iter().all(|rows| rows.sequence != left), "{path}");
        assert_eq!(step.added.len(), 1, "{path}: the next takes its place");
        let mut answer = String::new();
        waiting.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains("\"generated_text\":\"aaa"), "{path}");
    }
}

#[tokio::test]
async fn one_that_leaves_while_it_waits_is_never_run() {
    let router =
        Router::start_with(one_at_a_time(), |config| config.router.max_concurrent_requests = 2).await;
    router.shard.hold(Gate::Steps);
    let mut running = connect(&router, "/generate_stream", &long("A")).await;
    router.shard.sequence_of(&tokens("A")).await;
    let waiting = connect(&router, "/generate", &long("B")).await;
    router.holds(2).await;
    drop(waiting);
    router.holds(1).await;
    router.shard.release(&Gate::Steps);
    let mut answer = String::new();
    running.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains("generated_text"));
    router.ok("/generate", &long("C")).await;
    let prompts: Vec<_> =
        router.shard.saw(|seen| Some(seen.added().map(|new| new.tokens.clone()).collect())).await;
    assert_eq!(prompts, [tokens("A"), tokens("C")]);
}

/// Says more than buffers hold.
fn endless() -> Script {
    let mut script = Script::saying(tokens("a").repeat(200_000));
    script.info.max_positions = 1 << 20;
    script.info.num_blocks = 1 << 16;
    script
}

/// A request for more than buffers hold.
fn flood() -> Value {
    let parameters = json!({"max_new_tokens": 150_000, "return_k_alternatives": 20});
    json!({"inputs": "slow", "parameters": parameters})
}

#[tokio::test]
async fn one_that_does_not_read_is_cancelled_and_slows_nobody() {
    let router = Router::start(endless()).await;
    router.shard.hold(Gate::Steps);
    let mut slow = connect(&router, "/generate_stream", &flood()).await;
    let id = router.shard.sequence_of(&tokens("slow")).await;
    let quick = json!({"inputs": "quick", "parameters": {"max_new_tokens": 300}});
    let mut answering = connect(&router, "/generate_stream", &quick).await;
    router.holds(2).await;
    router.shard.release(&Gate::Steps);
    let step = router.shard.saw(|seen| seen.drop_of(id).map(|step| step.id)).await;
    assert!(step < 100_000, "it filled its own buffers, no more: {step}");
    let mut answer = String::new();
    answering.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains(&format!("\"generated_text\":\"{}\"", "a".repeat(300))));
    let other = router.shard.sequence_of(&tokens("quick")).await;
    let ended = router.shard.saw(|seen| seen.drop_of(other).map(|step| step.id)).await;
    assert!(ended < step, "the other was served meanwhile");
    let mut rest = String::new();
    slow.read_to_string(&mut rest).await.unwrap();
    assert!(rest.contains("the client did not keep up"), "{}", &rest[rest.len().saturating_sub(500)..]);
    router.ok("/generate", &quick).await;
}

#[tokio::test]
async fn one_that_does_not_read_keeps_nobody_out() {
    let router = Router::start_with(endless(), |config| config.router.max_concurrent_requests = 1).await;
    let slow = connect(&router, "/generate_stream", &flood()).await;
    let id = router.shard.sequence_of(&tokens("slow")).await;
    router.shard.saw(|seen| seen.drop_of(id).map(|_| ())).await;
    router.ok("/generate", &json!({"inputs": "quick", "parameters": {"max_new_tokens": 3}})).await;
    drop(slow);
}

#[tokio::test]
async fn one_that_does_not_send_keeps_nobody_out_and_is_told_in_the_end() {
    let script = Script::saying(tokens("a"));
    let router = Router::start_with(script, |config| config.router.max_concurrent_requests = 1).await;
    for (path, answer) in [
        ("/generate", json!({"error": "the body did not come in time", "error_type": "timeout"})),
        (
            "/v1/completions",
            json!({"error": {"message": "the body did not come in time", "type": "invalid_request_error",
                "param": null, "code": "timeout"}}),
        ),
    ] {
        let mut stalled = tokio::net::TcpStream::connect(&router.address).await.unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 9\r\n");
        stalled.write_all(format!("{head}expect: 100-continue\r\n\r\n").as_bytes()).await.unwrap();
        // Comes when the router begins to read the body.
        let mut told = [0; 25];
        stalled.read_exact(&mut told).await.unwrap();
        assert_eq!(&told, b"HTTP/1.1 100 Continue\r\n\r\n");
        stalled.write_all(b"{").await.unwrap();
        router.ok("/generate", &json!({"inputs": "x"})).await;
        // From here on time passes as soon as everybody waits for it.
        tokio::time::pause();
        let mut response = String::new();
        stalled.read_to_string(&mut response).await.unwrap();
        tokio::time::resume();
        assert!(response.starts_with("HTTP/1.1 408 "), "{response}");
        let body: Value = serde_json::from_str(response.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        assert_eq!(body, answer);
    }
}

#[tokio::test]
async fn one_that_never_ends_its_head_is_cut_off() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let mut stalled = Vec::new();
    for head in ["", "GET /health HT", "POST /generate HTTP/1.1\r\nhost: x\r\n"] {
        let mut socket = tokio::net::TcpStream::connect(&router.address).await.unwrap();
        socket.write_all(head.as_bytes()).await.unwrap();
        stalled.push(socket);
    }
    // The others are there by then.
    router.ok("/generate", &json!({"inputs": "x"})).await;
    tokio::time::pause();
    for mut socket in stalled {
        let mut response = String::new();
        socket.read_to_string(&mut response).await.unwrap();
        assert!(response.is_empty() || response.starts_with("HTTP/1.1 408 "), "{response}");
    }
}

#[tokio::test]
async fn each_prompt_of_a_list_takes_a_place() {
    let script = Script::saying(tokens("a"));
    let router = Router::start_with(script, |config| config.router.max_concurrent_requests = 2).await;
    let body = |prompts: &[&str]| json!({"prompt": prompts, "max_tokens": 1, "model": null, "stream": null});
    router.shard.hold(Gate::Steps);
    let one = router.begin("/v1/completions", &body(&["x"]));
    router.holds(1).await;
    let (status, answer) = router.post("/v1/completions", &body(&["x", "y"])).await;
    assert_eq!((status.as_u16(), &answer["error"]["code"]), (429, &json!("overloaded")));
    router.shard.release(&Gate::Steps);
    assert_eq!(one.await.unwrap().status(), 200);
    router.holds(0).await;
    router.ok("/v1/completions", &body(&["x", "y"])).await;
}

#[tokio::test]
async fn a_list_that_could_never_run_is_no_overload() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.json");
    let limited = [1, 2, 3, 5].map(|limit| {
        let limits = json!({"max_concurrent_requests": limit});
        json!({"key": format!("sk-{limit}"), "tenant": format!("{limit}"), "limits": limits})
    });
    let keys = [&limited[..], &[json!({"key": "sk-all", "tenant": "all"})]].concat();
    fs::write(&file, json!({"keys": keys}).to_string()).unwrap();
    let router = Router::start_with(Script::saying(tokens("a")), |config| {
        config.router.max_concurrent_requests = 4;
        config.router.api_key_file = Some(file);
    })
    .await;
    for (key, most) in [("sk-1", 1), ("sk-2", 2), ("sk-3", 3), ("sk-5", 4), ("sk-all", 4)] {
        let headers = [("authorization", &*format!("Bearer {key}"))];
        for (more, stream, ids) in [
            (0, false, false),
            (0, true, true),
            (1, false, false),
            (1, true, false),
            (1, false, true),
            (60, true, true),
        ] {
            let prompt = if ids { json!([5]) } else { json!("x") };
            let body = json!({"prompt": vec![prompt; most + more], "max_tokens": 1, "stream": stream});
            let response = router.send_with(Method::POST, "/v1/completions", &headers, &body).await;
            let (status, retry) =
                (response.status().as_u16(), response.headers().contains_key("retry-after"));
            let text = response.text().await.unwrap();
            if more == 0 {
                assert_eq!(status, 200, "{key}: {text}");
            } else {
                let error = &serde_json::from_str::<Value>(&text).unwrap()["error"];
                assert_eq!((status, retry), (400, false), "{key}: {text}");
                assert_eq!((&error["param"], &error["code"]), (&json!("prompt"), &json!("invalid_value")));
                let message = error["message"].as_str().unwrap();
                let words = [format!("at most {most} elements"), format!("Given: {}", most + more)];
                assert!(words.iter().all(|words| message.contains(words)), "{message}");
            }
            router.holds(0).await;
        }
    }
}
