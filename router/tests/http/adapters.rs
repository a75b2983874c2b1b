//! Adapters on their way: who waits for them, and who does not.

use std::time::Duration;

use config::Config;
use futures::future::join_all;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    router::{PATIENCE, Router, tokens},
    shard::{Gate, Script, Seen},
};

fn ask(prompt: &str, adapter: Option<&str>) -> Value {
    json!({"inputs": prompt, "parameters": {"adapter_id": adapter}})
}

async fn router(script: impl FnOnce(&mut Script)) -> Router {
    let mut said = Script::saying(tokens("a"));
    script(&mut said);
    Router::start(said).await
}

#[tokio::test]
async fn staging_one_delays_nobody_else() {
    let router = router(|_| {}).await;
    router.shard.hold(Gate::Stage("cold".into()));
    let cold = async { router.ok("/generate", &ask("cold", Some("cold"))).await };
    let others = async {
        router.shard.saw(|seen| seen.staged.iter().find(|asked| asked.name == "cold").cloned()).await;
        for adapter in [None, Some("warm"), None] {
            assert_eq!(router.ok("/generate", &ask("other", adapter)).await["generated_text"], "a");
        }
        let ran = router.shard.saw(|seen| Some(seen.added().any(|new| new.tokens == tokens("cold")))).await;
        assert!(!ran);
        router.shard.release(&Gate::Stage("cold".into()));
    };
    assert_eq!(tokio::join!(cold, others).0["generated_text"], "a");
}

#[tokio::test]
async fn staging_one_takes_no_permit_from_others() {
    for permits in [1, 2] {
        let script = Script::saying(tokens("a"));
        let few = |config: &mut Config| config.router.max_concurrent_requests = permits;
        let router = Router::start_with(script, few).await;
        router.shard.hold(Gate::Stage("cold".into()));
        let cold: Vec<_> = (0..3).map(|_| router.begin("/generate", &ask("cold", Some("cold")))).collect();
        let staging = |seen: &Seen| (!seen.staged.is_empty()).then_some(());
        router.shard.saw(staging).await;
        for adapter in [None, Some("warm"), None, Some("other")] {
            assert_eq!(router.ok("/generate", &ask("other", adapter)).await["generated_text"], "a");
        }
        let completion = json!({"model": "warm", "prompt": vec!["x"; permits], "max_tokens": 1});
        router.ok("/v1/completions", &completion).await;
        router.shard.release(&Gate::Stage("cold".into()));
        let mut served = 0;
        for answer in cold {
            let status = answer.await.unwrap().status();
            assert!(status == 200 || status == 429, "{status}");
            served += usize::from(status == 200);
        }
        assert!(served >= permits, "{served} of three at once");
    }
}

#[tokio::test]
async fn one_that_is_not_there_in_time_fails_its_own_requests() {
    let router = Router::start_with(Script::saying(tokens("a")), |config| {
        config.router.prepare_timeout = Duration::from_millis(100);
    })
    .await;
    router.shard.hold(Gate::Stage("cold".into()));
    for path in ["/generate", "/generate_stream", "/"] {
        let (status, body) = router.post(path, &ask("x", Some("cold"))).await;
        let expected =
            json!({"error": "the adapter was not ready within 0.1 s", "error_type": "adapter_timeout"});
        assert_eq!((status.as_u16(), body), (504, expected), "{path}");
    }
    let completion = json!({"model": "cold", "prompt": ["x", "y"], "max_tokens": 1});
    let chat = json!({"model": "cold", "messages": [{"role": "user", "content": "x"}], "stream": true});
    for (path, body) in [("/v1/completions", completion), ("/v1/chat/completions", chat)] {
        let (status, body) = router.post(path, &body).await;
        assert_eq!((status.as_u16(), &body["error"]["code"]), (504, &json!("adapter_timeout")), "{path}");
    }
    router.ok("/generate", &ask("x", Some("warm"))).await;
    router.shard.release(&Gate::Stage("cold".into()));
    router.ok("/generate", &ask("x", Some("cold"))).await;
}

#[tokio::test]
async fn copying_one_into_a_slot_delays_nobody_else() {
    let router = router(|_| {}).await;
    router.shard.hold(Gate::Load("cold".into()));
    let cold = async { router.ok("/generate", &ask("cold", Some("cold"))).await };
    let others = async {
        router.shard.saw(|seen| seen.steps.iter().find(|step| !step.load.is_empty()).cloned()).await;
        for adapter in [None, Some("warm"), None] {
            assert_eq!(router.ok("/generate", &ask("other", adapter)).await["generated_text"], "a");
        }
        router.shard.release(&Gate::Load("cold".into()));
    };
    assert_eq!(tokio::join!(cold, others).0["generated_text"], "a");
}

#[tokio::test]
async fn more_adapters_than_slots_take_turns() {
    let router = router(|script| script.info.num_slots = 2).await;
    let asks: Vec<Value> =
        (0..12).map(|i| ask(&format!("{i}"), Some(&format!("adapter-{}", i % 6)))).collect();
    for answer in join_all(asks.iter().map(|body| router.ok("/generate", body))).await {
        assert_eq!(answer["generated_text"], "a");
    }
    let unloads: usize =
        router.shard.saw(|seen| Some(seen.steps.iter().map(|step| step.unload.len()).sum())).await;
    assert!(unloads >= 4, "{unloads}");
}

#[tokio::test]
async fn one_that_cannot_be_loaded_fails_its_own_requests() {
    let router = router(|script| _ = script.lost.insert("bad")).await;
    let (bad, good) = (ask("one", Some("bad")), ask("two", Some("good")));
    let ((status, body), good) = tokio::join!(router.post("/generate", &bad), router.ok("/generate", &good));
    assert_eq!((status.as_u16(), &body["error_type"]), (503, &json!("unavailable")), "{body}");
    assert_eq!(good["generated_text"], "a");
    let (status, body) = router.post("/generate_stream", &bad).await;
    assert_eq!((status.as_u16(), &body["error_type"]), (503, &json!("unavailable")), "{body}");
}

#[tokio::test]
async fn sizes_of_adapters_whose_sum_no_number_can_hold_are_counted_all_the_same() {
    const MAX: u64 = u64::MAX;
    // The size that a shard reports of every adapter, the room that it has for them (0 is no bound), and whether one fits.
    for (bytes, room, fits) in [
        (MAX, 0, true),
        (MAX - 1, 0, true),
        (MAX / 2, 0, true),
        (MAX / 2 + 1, 0, true),
        (MAX / 3 + 1, 0, true),
        (MAX, MAX, true),
        (MAX - 1, MAX, true),
        (MAX / 2, MAX, true),
        (MAX / 2 + 1, MAX, true),
        (MAX / 3 + 1, MAX - 1, true),
        (MAX, MAX - 1, false),
        (MAX, 1, false),
        (MAX / 2 + 1, MAX / 2, false),
    ] {
        let mut script = Script::saying(tokens("a"));
        (script.adapter_bytes, script.info.adapter_bytes) = (bytes, room);
        // Some are there from the start.
        script.filled = [(0, "a"), (1, "b"), (2, "c")].into();
        let router = Router::start_with(script, |_| {}).await;
        for adapter in ["a", "b", "c", "d", "e", "f", "a"] {
            let body = json!({"inputs": "x", "parameters": {"adapter_id": adapter, "max_new_tokens": 1}});
            let (status, answer) = timeout(PATIENCE, router.post("/generate", &body)).await.unwrap();
            if fits {
                assert_eq!(status, 200, "{bytes} of {room}: {answer}");
            } else {
                assert_eq!(status, 422, "{bytes} of {room}: {answer}");
                assert!(answer["error"].as_str().unwrap().contains(&bytes.to_string()), "{answer}");
            }
        }
        assert_eq!(*router.failures.lock().unwrap(), [], "{bytes} of {room}");
    }
}
