//! Parts of the router that end before the router does.

use std::{sync::mpsc::sync_channel, time::Duration};

use lifecycle::{Failure, Supervisor};
use lorax_router::App;
use serde_json::json;

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
        let (report, failures) = sync_channel(4);
        let supervisor = Supervisor::reporting_to(move |failure| report.try_send(failure).unwrap()).unwrap();
        let app = App::start(configuration(&socket), &supervisor).unwrap();
        if reachable {
            app.ready().await;
        }
        drop(app);
        let failure = tokio::task::spawn_blocking(move || failures.recv_timeout(PATIENCE)).await.unwrap();
        assert_eq!(failure, Ok(Failure::Returned { name: "engine".into() }));
    }
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
