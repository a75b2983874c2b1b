//! Whether the process lives, has started, and is ready.

use std::time::Duration;

use reqwest::Client;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    process::Program,
    router::{Router, poll, tokens},
    shard::{Gate, Script},
    sockets::LONG,
};

async fn statuses(router: &Router) -> [u16; 5] {
    let mut all = [0; 5];
    for (status, path) in all.iter_mut().zip(["/livez", "/startupz", "/readyz", "/health", "/"]) {
        *status = router.get(path).await.status().as_u16();
    }
    all
}

#[tokio::test]
async fn life_start_and_readiness_are_three_questions() {
    let mut script = Script::saying(tokens("a"));
    script.held.insert(Gate::Info);
    let router = Router::launch(script, |_| {}).await;
    assert_eq!(statuses(&router).await, [200, 503, 503, 503, 503], "it loads");
    router.shard.release(&Gate::Info);
    router.app.ready().await;
    assert_eq!(statuses(&router).await, [200, 200, 200, 200, 200]);
    router.shard.hold(Gate::Info);
    router.shard.break_stream();
    router.health(503, "").await;
    assert_eq!(statuses(&router).await, [200, 200, 503, 503, 503], "its shard is started anew");
    router.shard.release(&Gate::Info);
    router.health(200, "").await;
    assert_eq!(statuses(&router).await, [200, 200, 200, 200, 200]);
}

#[tokio::test]
async fn before_it_stops_it_says_that_it_is_not_ready_and_goes_on() {
    let mut program = Program::start(Script::saying(tokens("a")), |router| {
        router.shutdown_delay = Duration::from_secs(3);
    });
    let address = program.says("listening on ").await;
    program.signal("-TERM").await;
    // Each on a connection of its own.
    let client = Client::builder().pool_max_idle_per_host(0).build().unwrap();
    let ready = async || client.get(format!("http://{address}/readyz")).send().await.unwrap();
    let unready = poll(async || {
        let answer = ready().await;
        (answer.status() == 503).then_some(answer)
    });
    let said: Value = timeout(LONG, unready).await.unwrap().json().await.unwrap();
    assert_eq!(said, json!({"error": "unhealthy: the server is about to stop", "error_type": "healthcheck"}));
    for (path, status) in [("/livez", 200), ("/startupz", 200), ("/health", 503), ("/", 503)] {
        let answer = client.get(format!("http://{address}{path}")).send().await.unwrap();
        assert_eq!(answer.status(), status, "{path}");
    }
    let answer = client.post(format!("http://{address}/generate")).json(&json!({"inputs": "x"})).send();
    assert_eq!(answer.await.unwrap().status(), 200);
    assert_eq!(program.ended().await, Some(0));
    assert!(client.get(format!("http://{address}/livez")).send().await.is_err());
}
