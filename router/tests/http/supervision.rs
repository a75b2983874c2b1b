//! Parts of the router that end before the router does.

use std::{sync::mpsc::sync_channel, time::Duration};

use axum::{body::Body, http::Request};
use lifecycle::{Failure, Supervisor};
use lorax_router::App;
use serde_json::json;
use tokio::runtime::Builder;
use tower::ServiceExt;

use crate::{
    router::{PATIENCE, Router, configuration, tokens},
    shard::{Gate, Script, ScriptedShard},
};

/// An engine whose handles are gone while nobody has told the process to stop.
#[tokio::test]
async fn an_engine_that_ends_is_reported() {
    for reachable in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("shard.sock");
        let mut script = Script::saying(tokens("a"));
        script.held.extend((!reachable).then_some(Gate::Info));
        let _shard = ScriptedShard::start(script, &socket);
        let (report, failures) = sync_channel(16);
        let supervisor = Supervisor::reporting_to(move |failure| report.try_send(failure).unwrap()).unwrap();
        let app = App::start(configuration(&socket), &supervisor).unwrap();
        if reachable {
            app.ready().await;
        }
        drop(app);
        // The task of the adapters and the thread of the masks end as well, in any order.
        let ends = move || [(); 3].map(|()| failures.recv_timeout(PATIENCE));
        let ends = tokio::task::spawn_blocking(ends).await.unwrap();
        assert!(ends.contains(&Ok(Failure::Returned { name: "engine".into() })), "{ends:?}");
    }
}

/// Steps are sent and answered while all threads of the HTTP side have other work.
#[test]
fn the_engine_goes_on_while_the_http_side_is_busy() {
    let runtime = || Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (http, shards) = (runtime(), runtime());
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("shard.sock");
    let shard =
        shards.block_on(async { ScriptedShard::start(Script::saying(tokens("a").repeat(900)), &socket) });
    let (report, failures) = sync_channel(4);
    let supervisor = Supervisor::reporting_to(move |failure| report.try_send(failure).unwrap()).unwrap();
    let app = http.block_on(async {
        let app = App::start(configuration(&socket), &supervisor).unwrap();
        app.ready().await;
        app
    });
    shard.hold(Gate::Step(5));
    let body = json!({"inputs": "x", "parameters": {"max_new_tokens": 900}}).to_string();
    let request = Request::post("/generate").body(Body::from(body)).unwrap();
    let answer = http.spawn(app.routes().oneshot(request));
    shards.block_on(shard.saw(|seen| (seen.steps.len() >= 5).then_some(())));
    let (go_on, gone_on) = sync_channel::<()>(0);
    let (told, blocked) = sync_channel(1);
    http.spawn(async move {
        told.send(()).unwrap();
        _ = gone_on.recv();
    });
    blocked.recv_timeout(PATIENCE).unwrap();
    shard.release(&Gate::Step(5));
    shards.block_on(shard.saw(|seen| (seen.steps.len() >= 900).then_some(())));
    drop(go_on);
    assert_eq!(shards.block_on(answer).unwrap().unwrap().status(), 200);
    assert!(failures.try_recv().is_err());
    supervisor.stopping();
}

#[tokio::test]
async fn an_engine_that_is_idle_or_waits_for_the_shards_is_not_taken_to_hang() {
    let mut script = Script::saying(tokens("a"));
    script.held.insert(Gate::Info);
    let soon = |config: &mut config::Config| config.router.step_timeout = Some(Duration::from_secs(1));
    let router = Router::launch(script, soon).await;
    let begun = std::time::Instant::now();
    while begun.elapsed() < Duration::from_secs(2) {
        assert_eq!(router.get("/health").await.status(), 503);
    }
    router.shard.release(&Gate::Info);
    router.health(200, "").await;
    let begun = std::time::Instant::now();
    while begun.elapsed() < Duration::from_secs(2) {
        assert_eq!(router.get("/health").await.status(), 200);
    }
    router.ok("/generate", &json!({"inputs": "x"})).await;
    assert_eq!(*router.failures.lock().unwrap(), []);
}
