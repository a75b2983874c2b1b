//! Suspended processes of a server are noticed and replaced.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use integration_tests::server::{Server, fixtures};
use reqwest::StatusCode;
use serde_json::json;

/// The value of `--step-timeout`, and the time beyond it in which the server must report that it is not well.
const LIMIT: Duration = Duration::from_millis(3500);
const BEYOND: Duration = Duration::from_secs(2);

fn start() -> Server {
    let tiny = fixtures().join("tiny");
    let flags = ["--step-timeout", "3.5", "--max-batch-size", "8", "--kv-memory", "16MiB"];
    Server::start_with(&tiny.join("model"), &tiny.join("adapters"), &flags).unwrap()
}

#[tokio::test]
async fn a_shard_that_is_suspended_is_noticed_and_replaced() {
    let mut server = start();
    let first = server.children("lorax-shard").unwrap();
    let stopped = Instant::now();
    Server::signal(first[0], "-STOP").unwrap();
    // The request is in the shard's hands until the router or the launcher gives the shard up.
    let answer = server.post("/generate", &json!({"inputs": "a"})).await.unwrap();
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(stopped.elapsed() < LIMIT + BEYOND, "{:?}", stopped.elapsed());
    server.until("shard-0 hangs (no sign of life for").unwrap();
    server.until("connected to the model").unwrap();
    let second = server.children("lorax-shard").unwrap();
    assert_eq!(second.len(), 1);
    assert_ne!(first, second);
    assert_eq!(server.tokens(None, "a", 4).await.unwrap().len(), 4);
    assert_eq!(server.terminate().unwrap().code(), Some(0));
}

#[tokio::test]
async fn a_router_that_is_suspended_is_replaced() {
    let mut server = start();
    let first = server.children("lorax-router").unwrap();
    // It must have lived for longer than a router that cannot start: the launcher's limit is longer than that.
    Server::signal(first[0], "-STOP").unwrap();
    server.until("router hangs (no sign of life for").unwrap();
    server.until("listening on").unwrap();
    let second = server.children("lorax-router").unwrap();
    assert_eq!(second.len(), 1);
    assert_ne!(first, second);
    assert_eq!(server.terminate().unwrap().code(), Some(0));
}
