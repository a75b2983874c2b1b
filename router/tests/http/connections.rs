//! Bounds of connections, and the reserve.

use config::Config;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{
    router::{Router, poll, tokens},
    shard::{Gate, Script},
    sockets::{LONG, answer, connect_from, head, open, status},
};

async fn router(connections: usize, per_address: usize) -> Router {
    Router::start_with(Script::saying(tokens("a")), |config| {
        config.router.api_keys = vec!["sk-many".into(), "sk-few".into()];
        config.router.max_connections = connections;
        config.router.max_connections_per_address = Some(per_address);
    })
    .await
}

/// Asks for the model on a connection, which stays open if it may, and returns the status.
async fn info(stream: &mut TcpStream, key: &str) -> u16 {
    let request = format!("GET /info HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n\r\n");
    // A connection without a place has its answer already, and may be closed.
    let _ = stream.write_all(request.as_bytes()).await;
    let mut head = [0; 12];
    timeout(LONG, stream.read_exact(&mut head)).await.unwrap().unwrap();
    status(std::str::from_utf8(&head).unwrap())
}

#[tokio::test]
async fn one_address_has_no_more_than_its_part() {
    let router = router(64, 3).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut stream = connect_from(&router.address, 2).await;
        assert_eq!(info(&mut stream, "sk-many").await, 200);
        open.push(stream);
    }
    let refused = answer(connect_from(&router.address, 2).await).await;
    assert_eq!(status(&refused), 429);
    assert!(refused.contains("\r\nretry-after: 1\r\n"), "{refused}");
    assert_eq!(info(&mut connect_from(&router.address, 3).await, "sk-many").await, 200);
    drop(open.pop());
    let again = poll(async || {
        (info(&mut connect_from(&router.address, 2).await, "sk-many").await == 200).then_some(())
    });
    timeout(LONG, again).await.unwrap();
}

#[tokio::test]
async fn the_last_places_are_for_tenants_below_their_share() {
    let router = router(32, 64).await;
    let mut held = Vec::new();
    for _ in 0..30 {
        let mut stream = TcpStream::connect(&router.address).await.unwrap();
        assert_eq!(info(&mut stream, "sk-many").await, 200);
        held.push(stream);
    }
    for _ in 0..3 {
        let body = json!({"inputs": "x", "parameters": {"max_new_tokens": 1}});
        let few = answer(open(&router.address, "sk-few", "/generate", &body).await).await;
        assert_eq!(status(&few), 200);
        assert!(few.contains("\r\nconnection: close\r\n"), "one request: {few}");
        let many = answer(open(&router.address, "sk-many", "/generate", &body).await).await;
        // While the other tenant has no connection, this one's share is everything.
        assert_eq!(status(&many), 200);
    }
    router.shard.hold(Gate::Steps);
    let body = json!({"inputs": "few", "parameters": {"max_new_tokens": 1}});
    let few = open(&router.address, "sk-few", "/generate", &body).await;
    router.holds(1).await;
    let many = answer(open(&router.address, "sk-many", "/generate", &body).await).await;
    assert_eq!(status(&many), 429, "{many}");
    assert!(many.contains("\r\nretry-after: 1\r\n"), "{many}");
    router.shard.release(&Gate::Steps);
    assert_eq!(status(&answer(few).await), 200);
}

#[tokio::test]
async fn when_all_places_are_taken_a_client_is_told_so() {
    let router = router(16, 64).await;
    let mut held = Vec::new();
    for _ in 0..15 {
        let mut stream = TcpStream::connect(&router.address).await.unwrap();
        assert_eq!(info(&mut stream, "sk-many").await, 200);
        held.push(stream);
    }
    let mut last = TcpStream::connect(&router.address).await.unwrap();
    last.write_all(
        head("/generate", "authorization: Bearer sk-few\r\nexpect: 100-continue\r\n", 9).as_bytes(),
    )
    .await
    .unwrap();
    let mut told = [0; 25];
    timeout(LONG, last.read_exact(&mut told)).await.unwrap().unwrap();
    assert_eq!(&told, b"HTTP/1.1 100 Continue\r\n\r\n");
    let refused = answer(TcpStream::connect(&router.address).await.unwrap()).await;
    assert_eq!(status(&refused), 503);
    assert!(refused.contains("\r\nretry-after: 1\r\n"), "{refused}");
    drop(held);
    let again = poll(async || {
        let mut stream = TcpStream::connect(&router.address).await.unwrap();
        (info(&mut stream, "sk-few").await == 200).then_some(())
    });
    timeout(LONG, again).await.unwrap();
}

#[tokio::test]
async fn idle_connections_keep_nobody_out() {
    let router = Router::start_with(Script::saying(tokens("a")), |config| {
        config.router.max_connections = 16;
        config.router.max_connections_per_address = Some(16);
    })
    .await;
    let mut idle = Vec::new();
    for _ in 0..15 {
        idle.push(connect_from(&router.address, 2).await);
    }
    // In the order in which they came the idle ones are there by now.
    for _ in 0..3 {
        let answer = answer(open(&router.address, "none", "/generate", &json!({"inputs": "x"})).await).await;
        assert_eq!(status(&answer), 200);
    }
}

#[tokio::test]
async fn a_client_that_leaves_is_seen_whatever_it_sent_behind_its_request() {
    let more = json!({"inputs": "more"}).to_string();
    let pipelined = format!("{}{more}", head("/generate", "", more.len()));
    for behind in [
        "",
        "\r\n",
        "\n",
        "\r",
        "x",
        "\0",
        "{}",
        "GET /health HTTP/1.1\r\n\r\n",
        "GET /health HT",
        &pipelined,
        &" ".repeat(1 << 10),
        &"\r\n".repeat(1 << 13),
    ] {
        for path in ["/generate", "/generate_stream"] {
            let script = Script::saying(tokens("a").repeat(1000));
            // The step that is held is not a fault.
            let patient = |config: &mut Config| config.router.step_timeout = Some(LONG);
            let router = Router::start_with(script, patient).await;
            router.shard.hold(Gate::Steps);
            let body = json!({"inputs": "left", "parameters": {"max_new_tokens": 900}}).to_string();
            let request = format!("{}{body}{behind}", head(path, "", body.len()));
            let mut stream = TcpStream::connect(&router.address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let id = timeout(LONG, router.shard.sequence_of(&tokens("left"))).await.unwrap();
            drop(stream);
            timeout(LONG, router.holds(0)).await.unwrap_or_else(|_| panic!("{path}: {behind:?} hides it"));
            router.shard.release(&Gate::Steps);
            // What is dropped is told with the next step.
            router.ok("/generate", &json!({"inputs": "next", "parameters": {"max_new_tokens": 1}})).await;
            let dropped = router.shard.saw(|seen| Some(seen.drop_of(id).map(|step| step.id))).await;
            assert!(dropped.is_some_and(|step| step <= 5), "{path}: {behind:?}: {dropped:?}");
        }
    }
}
