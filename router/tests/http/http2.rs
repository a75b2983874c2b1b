//! HTTP/2 for clients that begin with it: many requests on one connection.

use axum::{
    body::Bytes,
    http::{Method, Request},
};
use h2::client::{ResponseFuture, SendRequest};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{
    router::{PATIENCE, Router, tokens},
    shard::{Gate, Script},
};

async fn connect(router: &Router) -> SendRequest<Bytes> {
    let socket = TcpStream::connect(&router.address).await.unwrap();
    let (client, connection) = h2::client::handshake(socket).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Sends a request. Dropping the response's future resets its stream.
async fn send(client: &SendRequest<Bytes>, method: Method, path: &str, body: &Value) -> ResponseFuture {
    let mut client = client.clone().ready().await.unwrap();
    let request = Request::builder().method(method).uri(format!("http://x{path}")).body(()).unwrap();
    let (response, mut stream) = client.send_request(request, false).unwrap();
    stream.send_data(body.to_string().into(), true).unwrap();
    response
}

/// The status and the text of a response.
async fn receive(response: ResponseFuture) -> (u16, String) {
    let response = timeout(PATIENCE, response).await.unwrap().unwrap();
    let (status, mut body) = (response.status().as_u16(), response.into_body());
    let mut text = Vec::new();
    while let Some(data) = timeout(PATIENCE, body.data()).await.unwrap() {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        text.extend_from_slice(&data);
    }
    (status, String::from_utf8(text).unwrap())
}

async fn ask(client: &SendRequest<Bytes>, method: Method, path: &str, body: &Value) -> (u16, String) {
    receive(send(client, method, path, body).await).await
}

#[tokio::test]
async fn many_requests_share_a_connection() {
    let router = Router::start(Script::saying(tokens("abc"))).await;
    let client = connect(&router).await;
    let mut running = Vec::new();
    for number in 0..30 {
        let body = json!({"prompt": "x", "n": 1 + number % 2, "stream": number % 3 == 0});
        running.push(send(&client, Method::POST, "/v1/completions", &body).await);
    }
    for response in running {
        let (status, text) = receive(response).await;
        assert!(status == 200 && text.contains(r#""text":"#), "{status} {text}");
    }
    assert_eq!(ask(&client, Method::GET, "/health", &json!(null)).await.0, 200);
    let (status, text) = ask(&client, Method::POST, "/generate", &json!({"inputs": "x"})).await;
    assert_eq!((status, &*text), (200, r#"{"generated_text":"abc"}"#));
}

#[tokio::test]
async fn what_is_refused_before_it_is_read_ends_nothing_else() {
    let router = Router::start(Script::saying(tokens("abc"))).await;
    let client = connect(&router).await;
    let long = json!({"prompt": "x".repeat(30_000)});
    for (method, path, expected) in [
        (Method::POST, "/v1/nothing", 404),
        (Method::PUT, "/v1/completions", 405),
        (Method::POST, "/generate", 422),
        (Method::DELETE, "/v1/models", 405),
    ] {
        assert_eq!(ask(&client, method, path, &long).await.0, expected, "{path}");
        assert_eq!(ask(&client, Method::GET, "/health", &json!(null)).await.0, 200, "after {path}");
    }
}

#[tokio::test]
async fn a_stream_that_is_reset_is_cancelled_alone() {
    let script = Script { held: [Gate::Steps].into(), ..Script::saying(tokens("abc")) };
    let router = Router::start(script).await;
    let client = connect(&router).await;
    let kept = send(&client, Method::POST, "/v1/completions", &json!({"prompt": "x"})).await;
    let reset = send(&client, Method::POST, "/v1/completions", &json!({"prompt": "y", "n": 3})).await;
    router.holds(4).await;
    drop(reset);
    router.holds(1).await;
    router.shard.release(&Gate::Steps);
    assert_eq!(receive(kept).await.0, 200);
}

#[tokio::test]
async fn one_that_leaves_takes_its_requests_along() {
    let script = Script { held: [Gate::Steps].into(), ..Script::saying(tokens("abc")) };
    let router = Router::start(script).await;
    let socket = TcpStream::connect(&router.address).await.unwrap();
    let (client, connection) = h2::client::handshake(socket).await.unwrap();
    let connection = tokio::spawn(connection);
    let _waiting = send(&client, Method::POST, "/v1/completions", &json!({"prompt": "x", "n": 2})).await;
    router.holds(2).await;
    connection.abort();
    router.holds(0).await;
}

#[tokio::test]
async fn one_that_never_ends_its_preface_is_cut_off() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let mut stalled = Vec::new();
    for begun in ["P", "PRI * HTTP/2.0\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r"] {
        let mut socket = TcpStream::connect(&router.address).await.unwrap();
        socket.write_all(begun.as_bytes()).await.unwrap();
        stalled.push(socket);
    }
    // They are there by then.
    router.ok("/generate", &json!({"inputs": "x"})).await;
    tokio::time::pause();
    for mut socket in stalled {
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer).await;
        assert!(answer.is_empty(), "{answer:?}");
    }
}
