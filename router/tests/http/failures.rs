//! The shard fails: who is told, and what comes after.

use proto::Step;
use serde_json::{Value, json};

use crate::{
    router::{Router, events, tokens},
    shard::{Gate, IMPROBABLE, Script},
};

async fn unavailable(router: &Router) {
    let (status, body) = router.post("/generate", &json!({"inputs": "x"})).await;
    assert_eq!((status.as_u16(), &body["error_type"]), (503, &json!("unavailable")));
    let (status, body) = router.post("/v1/completions", &json!({"prompt": "x"})).await;
    assert_eq!((status.as_u16(), &body["error"]["type"]), (503, &json!("server_error")));
    assert_eq!(body["error"]["code"], "unavailable");
    for path in ["/health", "/", "/info"] {
        let response = router.get(path).await;
        assert_eq!(response.status(), 503, "{path}");
        assert!(response.json::<Value>().await.unwrap()["error"].is_string(), "{path}");
    }
    assert_eq!(router.get("/v1/models").await.status(), 200);
}

#[tokio::test]
async fn until_the_shard_is_there_requests_are_answered_all_the_same() {
    let mut script = Script::saying(tokens("a"));
    script.held.insert(Gate::Info);
    let router = Router::launch(script, |_| {}).await;
    unavailable(&router).await;
    router.shard.release(&Gate::Info);
    router.app.ready().await;
    router.ok("/generate", &json!({"inputs": "x"})).await;
    assert_eq!(router.get("/health").await.status(), 200);
}

#[tokio::test]
async fn a_broken_stream_fails_what_runs_and_starts_anew() {
    let router = Router::start(Script::saying(tokens("a").repeat(1000))).await;
    router.shard.hold(Gate::Steps);
    let body = json!({"inputs": "A", "parameters": {"max_new_tokens": 900}});
    let native = router.send("/generate_stream", &body).await;
    let chat = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "stream": true});
    let openai = router.send("/v1/chat/completions", &chat).await;
    let third = json!({"inputs": "B", "parameters": {"max_new_tokens": 900}});
    let whole = router.post("/generate", &third);
    let breaks = async {
        router.shard.saw(|seen| seen.steps.first().map(|_| ())).await;
        router.shard.hold(Gate::Info);
        router.shard.break_stream();
        let native = events(&native.text().await.unwrap());
        assert_eq!(native.last().unwrap()["error_type"], "unavailable", "{native:?}");
        let openai = events(&openai.text().await.unwrap());
        let [.., error, done] = &openai[..] else { panic!("{openai:?}") };
        assert_eq!((&error["error"]["code"], done), (&json!("unavailable"), &json!("[DONE]")));
    };
    let ((status, body), ()) = tokio::join!(whole, breaks);
    assert_eq!((status.as_u16(), &body["error_type"]), (503, &json!("unavailable")), "{body}");
    unavailable(&router).await;
    router.shard.release(&Gate::Info);
    router.shard.release(&Gate::Steps);
    router.shard.saw(|seen| (seen.attached == 2).then_some(())).await;
    let answer = loop {
        let (status, body) = router.post("/generate", &json!({"inputs": "C"})).await;
        if status != 503 {
            break body;
        }
    };
    assert_eq!(answer["generated_text"].as_str().unwrap().len(), 1000);
    let first = router.shard.saw(|seen| {
        let at = seen.steps.iter().rposition(|step| step.id == 1)?;
        Some((at, seen.steps[at].added.len()))
    });
    assert_eq!(first.await, (1, 1), "steps count from 1 again, and nothing of before is there");
}

#[tokio::test]
async fn a_request_that_waits_is_told_too() {
    let mut script = Script::saying(tokens("a").repeat(1000));
    script.info.max_sequences = 1;
    let router = Router::start(script).await;
    router.shard.hold(Gate::Steps);
    let body = |prompt: &str| json!({"inputs": prompt, "parameters": {"max_new_tokens": 900}});
    let running = router.send("/generate_stream", &body("A")).await;
    let waiting = router.send("/generate_stream", &body("B")).await;
    router.shard.hold(Gate::Info);
    router.shard.break_stream();
    for stream in [running, waiting] {
        let events = events(&stream.text().await.unwrap());
        assert_eq!(events.last().unwrap()["error_type"], "unavailable");
    }
}

#[tokio::test]
async fn a_client_as_far_behind_as_may_be_is_told_why_too() {
    let router = Router::start(Script::saying(tokens("a").repeat(2000))).await;
    // Leaves the adapter in its slot and no step in flight.
    router.ok("/v1/completions", &json!({"model": "sql", "prompt": "A", "max_tokens": 1})).await;
    // Of two prompts the first runs, and nobody reads its tokens until the second is there as well.
    router.shard.hold(Gate::Preparation(3));
    router.shard.hold(Gate::Steps);
    let body = json!({"model": "sql", "prompt": ["A", "A"], "max_tokens": 2000, "stream": true});
    let breaks = async {
        let begun = |step: &&Step| !step.added.is_empty();
        let first = router.shard.saw(|seen| seen.steps.iter().filter(begun).nth(1).map(|step| step.id)).await;
        let last = first + 1023;
        router.shard.hold(Gate::Step(last));
        router.shard.release(&Gate::Steps);
        router.shard.saw(|seen| seen.steps.iter().find(|step| step.id == last).map(|_| ())).await;
        router.shard.hold(Gate::Info);
        router.shard.break_stream();
        while router.get("/info").await.status() == 200 {}
        router.shard.release(&Gate::Preparation(3));
    };
    let (events, ()) = tokio::join!(router.events("/v1/completions", &body), breaks);
    let failures: Vec<_> = events.iter().filter_map(|event| event["error"]["code"].as_str()).collect();
    assert_eq!(failures, ["unavailable"; 2]);
    // Beside those: a token of each step that was answered, and the mark of the end.
    assert_eq!(events.len(), 2 + 1023 + 1);
}

#[tokio::test]
async fn a_shard_that_hangs_is_unhealthy() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    for path in ["/health", "/"] {
        router.shard.hold(Gate::Health);
        let asked = router.shard.saw(|seen| Some(seen.health)).await;
        let clock = async {
            router.shard.saw(|seen| (seen.health > asked).then_some(())).await;
            // From here on time passes as soon as everybody waits for it.
            tokio::time::pause();
        };
        let (response, ()) = tokio::join!(router.get(path), clock);
        tokio::time::resume();
        assert_eq!(response.status(), 503, "{path}");
        assert_eq!(response.json::<Value>().await.unwrap()["error_type"], "healthcheck", "{path}");
        router.shard.release(&Gate::Health);
        assert_eq!(router.get(path).await.status(), 200, "{path}");
    }
}

#[tokio::test]
async fn what_is_not_computed_with_numbers_is_not_an_answer() {
    let said = [tokens("a"), vec![IMPROBABLE], tokens("a")].concat();
    let router = Router::start(Script::saying(said)).await;
    let body = json!({"inputs": "x", "parameters": {"max_new_tokens": 3, "ignore_eos_token": true}});
    let (status, answer) = router.post("/generate", &body).await;
    assert_eq!(status.as_u16(), 424);
    let error = "Request failed during generation: the logits are not numbers";
    assert_eq!(answer, json!({"error": error, "error_type": "generation"}));
    assert_eq!(router.get("/health").await.status(), 200);
}
