//! Adapters on their way: who waits for them, and who does not.

use futures::future::join_all;
use serde_json::{Value, json};

use crate::{
    router::{Router, tokens},
    shard::{Gate, Script},
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
async fn preparing_one_delays_nobody_else() {
    let router = router(|_| {}).await;
    router.shard.hold(Gate::Prepare("cold".into()));
    let cold = async { router.ok("/generate", &ask("cold", Some("cold"))).await };
    let others = async {
        router.shard.saw(|seen| seen.prepared.iter().find(|asked| asked.id == "cold").cloned()).await;
        for adapter in [None, Some("warm"), None] {
            assert_eq!(router.ok("/generate", &ask("other", adapter)).await["generated_text"], "a");
        }
        let ran = router.shard.saw(|seen| Some(seen.added().any(|new| new.tokens == tokens("cold")))).await;
        assert!(!ran);
        router.shard.release(&Gate::Prepare("cold".into()));
    };
    assert_eq!(tokio::join!(cold, others).0["generated_text"], "a");
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
