//! What becomes of adapters when the shards are lost and come back, with what they had in host memory or without it.

use std::{collections::BTreeSet, sync::Arc};

use config::Config;
use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use sources::HubSettings;
use tokio::time::timeout;

use crate::{
    exchange::at_rest,
    fake::{Fault, On, Repository, Server},
    router::{FILES, PATIENCE, Router, poll, tokens},
    shard::{Gate, Script, Seen},
};

fn ask(adapter: &str) -> Value {
    json!({"inputs": "x", "parameters": {"adapter_id": adapter, "max_new_tokens": 2}})
}

fn script() -> Script {
    let mut script = Script::saying(tokens("a").repeat(20));
    (script.adapter_bytes, script.host_bytes) = (1000, 1000);
    script
}

/// A router with eight times the host memory of an adapter.
async fn router() -> Router {
    Router::start_with(script(), |config: &mut Config| {
        config.shard.adapter_host_memory = 8 * 1100;
        config.router.max_adapter_size = Some(1100);
    })
    .await
}

/// Loses the shards, which come back with what they had in memory or without it, and waits for the next session.
async fn lose(router: &Router, kept: bool) {
    let sessions = router.shard.saw(|seen| Some(seen.sessions.len())).await;
    if !kept {
        router.shard.lose_memory();
    }
    router.shard.break_stream();
    router.shard.saw(|seen| (seen.sessions.len() > sessions).then_some(())).await;
}

async fn get(router: &Router, path: &str) -> Value {
    let response = router.get(path).await;
    assert_eq!(response.status(), 200, "{path}");
    response.json().await.unwrap()
}

/// Waits until an adapter is pinned.
async fn is_pinned(router: &Router, id: &str) -> Value {
    let pinned = poll(async || {
        let shown = get(router, &format!("/v1/adapters/{id}")).await;
        (shown["pins"].as_u64() > Some(0)).then_some(shown)
    });
    timeout(PATIENCE, pinned).await.unwrap_or_else(|_| panic!("{id} is never pinned again"))
}

#[tokio::test]
async fn pinned_adapters_are_loaded_and_pinned_again() {
    let router = router().await;
    let pins = ["sql", "law", "tax"];
    for id in pins {
        router.ok("/v1/adapters", &json!({"id": id, "adapter_id": id, "pin": true})).await;
    }
    router.ok("/v1/adapters", &json!({"id": "plain", "adapter_id": "pirate"})).await;
    let before = get(&router, "/v1/adapters/capacity").await;
    assert_eq!(before["host"]["pinned_bytes"], 3000, "{before}");
    for (loss, kept) in
        [false, true, false, false, true, true, false, true, false, true].into_iter().enumerate()
    {
        let staged = router.shard.saw(|seen| Some(seen.staged.len())).await;
        lose(&router, kept).await;
        for id in pins {
            let shown = is_pinned(&router, id).await;
            assert_eq!(shown["last_error"], Value::Null, "loss {loss}: {shown}");
            assert!(["host", "device"].contains(&shown["tier"].as_str().unwrap()), "loss {loss}: {shown}");
        }
        let held: BTreeSet<_> = router.shard.host().into_iter().collect();
        assert!(pins.iter().all(|id| held.contains(*id)), "loss {loss}: {held:?}");
        let again = router.shard.saw(|seen| Some(seen.staged.len())).await - staged;
        assert_eq!(again, if kept { 0 } else { pins.len() }, "loss {loss}");
        let capacity = get(&router, "/v1/adapters/capacity").await;
        assert_eq!(capacity["host"]["pinned_bytes"], 3000, "loss {loss}: {capacity}");
        router.ok("/generate", &ask(pins[loss % 3])).await;
    }
    // What was not pinned is loaded when somebody asks for it, and pins end as ever.
    router.ok("/generate", &ask("plain")).await;
    for id in pins {
        let path = format!("/v1/adapters/{id}");
        assert_eq!(router.send_with(Method::DELETE, &path, &[], &Value::Null).await.status(), 200);
    }
    let capacity = get(&router, "/v1/adapters/capacity").await;
    assert_eq!(capacity["host"]["pinned_bytes"], 0, "{capacity}");
    at_rest(&router).await;
}

#[tokio::test]
async fn a_pin_that_is_asked_for_while_there_is_no_session_waits_for_one() {
    let router = router().await;
    for (id, kept) in [("sql", true), ("law", false)] {
        router.shard.hold(Gate::Attach);
        lose(&router, kept).await;
        let pin = router.begin("/v1/adapters", &json!({"id": id, "adapter_id": id, "pin": true}));
        crate::metrics::until(&router, "an ask that waits", |samples| {
            crate::exchange::of(samples, "lorax_adapter_asks{state=\"waiting\"}") >= 1.0
        })
        .await;
        router.shard.release(&Gate::Attach);
        let answer = timeout(PATIENCE, pin).await.unwrap().unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(is_pinned(&router, id).await["last_error"], Value::Null);
        router.ok("/generate", &ask(id)).await;
    }
}

/// Where a request is when the shards are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The hub is asked who may read the adapter.
    LookedUp,
    /// The hub is asked for its files.
    Fetched,
    /// It is copied into host memory.
    Staged,
    /// It is copied into a slot.
    Loaded,
    /// The request waits for a step to end.
    Running,
}

const PHASES: [Phase; 5] = [Phase::LookedUp, Phase::Fetched, Phase::Staged, Phase::Loaded, Phase::Running];

impl Phase {
    /// The gate of the shard that holds a request there.
    fn gate(self, id: &str) -> Option<Gate> {
        match self {
            Self::LookedUp | Self::Fetched => None,
            Self::Staged => Some(Gate::Stage(id.into())),
            Self::Loaded => Some(Gate::Load(id.into())),
            Self::Running => Some(Gate::Steps),
        }
    }

    /// Has the hub be out of order there for a moment. It is asked again after 0.25 s, and once more after 0.5 s.
    fn delay(self, hub: &Server) {
        match self {
            Self::LookedUp => hub.fail(On::Api, Fault::Status(503), 2),
            Self::Fetched => hub.fail(On::Storage, Fault::Status(503), 2),
            _ => {}
        }
    }

    /// Waits until a request is there.
    async fn reached(self, router: &Router, hub: &Server, id: &str) {
        let is_asked = |words: &str| hub.asked().iter().any(|asked| asked.path.contains(words));
        let asked = async |words: &str| poll(async || is_asked(words).then_some(())).await;
        let staged = |seen: &Seen| seen.staged.iter().any(|asked| asked.name == id);
        let reached = async {
            match self {
                Self::LookedUp => asked("/api/models/").await,
                Self::Fetched => asked(FILES[1]).await,
                Self::Staged => router.shard.saw(|seen| staged(seen).then_some(())).await,
                Self::Loaded => {
                    let loads = |seen: &Seen| seen.steps.iter().any(|step| !step.load.is_empty());
                    router.shard.saw(|seen| loads(seen).then_some(())).await;
                }
                Self::Running => router.shard.saw(|seen| (seen.added().count() > 1).then_some(())).await,
            }
        };
        timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("{self:?} is never reached"));
    }
}

/// A router whose adapters come from a hub.
async fn at_hub(hub: &Server) -> Router {
    let settings = HubSettings {
        endpoint: hub.url.clone(),
        token: None,
        cache: None,
        offline: false,
        answer: PATIENCE,
        bytes: PATIENCE,
    };
    let folder = Arc::new(tempfile::tempdir().unwrap());
    let change = |config: &mut Config| config.router.adapter_source = Some("hub".into());
    Router::start_at_hub(script(), settings, folder, change).await
}

#[tokio::test]
async fn what_is_under_way_is_answered_or_refused_wherever_it_is_when_the_shards_are_lost() {
    let case = async |phase: Phase, kept: bool| {
        let hub = Server::start();
        let [config, weights] = FILES;
        hub.put("org/one", Repository::new(&[(config, b"{}"), (weights, &[1; 500])]));
        hub.put("org/two", Repository::new(&[(config, b"{}"), (weights, &[2; 500])]));
        let router = at_hub(&hub).await;
        if phase == Phase::Running {
            // It is in its slot then.
            router.ok("/generate", &ask("org/one")).await;
        }
        let gate = phase.gate("org/one");
        gate.iter().for_each(|gate| router.shard.hold(gate.clone()));
        phase.delay(&hub);
        let answers: Vec<_> = (0..3).map(|_| router.begin("/generate", &ask("org/one"))).collect();
        phase.reached(&router, &hub, "org/one").await;
        lose(&router, kept).await;
        gate.iter().for_each(|gate| router.shard.release(gate));
        for answer in answers {
            let answer = timeout(PATIENCE, answer).await.unwrap().unwrap();
            let (status, body) = (answer.status(), answer.json::<Value>().await.unwrap());
            // Nothing of those is lost that the shards had no part in yet.
            match phase {
                Phase::LookedUp | Phase::Fetched | Phase::Staged => {
                    assert_eq!(status, 200, "{phase:?}, {kept}: {body}")
                }
                Phase::Loaded | Phase::Running => {
                    assert_eq!(
                        (status.as_u16(), &body["error_type"]),
                        (503, &json!("unavailable")),
                        "{phase:?}, {kept}: {body}"
                    );
                }
            }
        }
        router.health(200, "").await;
        router.ok("/generate", &ask("org/one")).await;
        router.ok("/generate", &ask("org/two")).await;
        at_rest(&router).await;
    };
    let cases = PHASES.iter().flat_map(|&phase| [(phase, true), (phase, false)]);
    join_all(cases.map(|(phase, kept)| case(phase, kept))).await;
}

#[tokio::test]
async fn a_lookup_that_fails_while_there_is_no_session_is_answered_with_its_own_error() {
    for (repository, expected) in [
        (None, 404),
        (Some(Repository::new(&[(FILES[0], b"{}")])), 400),
        (Some(Repository::new(&[(FILES[0], b"{}"), (FILES[1], b"x")]).readable_by(&["somebody"])), 404),
        (
            Some(Repository::new(&[(FILES[0], b"{}"), (FILES[1], b"x")]).readable_by(&["somebody"]).gated()),
            403,
        ),
    ] {
        let hub = Server::start();
        repository.into_iter().for_each(|repository| hub.put("org/one", repository));
        let router = at_hub(&hub).await;
        Phase::LookedUp.delay(&hub);
        let body = json!({"model": "org/one", "prompt": "x", "max_tokens": 1});
        let answer = router.begin("/v1/completions", &body);
        Phase::LookedUp.reached(&router, &hub, "org/one").await;
        router.shard.hold(Gate::Attach);
        lose(&router, false).await;
        let answer = timeout(PATIENCE, answer).await.unwrap().unwrap();
        assert_eq!(answer.status(), expected, "{}", answer.text().await.unwrap());
        // Those that come meanwhile are told that there is nobody to answer.
        let (status, body) = timeout(PATIENCE, router.post("/v1/completions", &body)).await.unwrap();
        assert_eq!((status.as_u16(), &body["error"]["code"]), (503, &json!("unavailable")), "{body}");
        router.shard.release(&Gate::Attach);
        router.health(200, "").await;
    }
}
