//! Requests that must have their whole answers within `--request-timeout`.

use std::time::Duration;

use proto::Task;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    pooled::pooling,
    refusals::{assert_native, assert_openai},
    router::{PATIENCE, Router, events, tokens},
    shard::{Gate, Script},
};

async fn router(script: Script) -> Router {
    Router::start_with(script, |config| config.router.request_timeout = Some(Duration::from_millis(300)))
        .await
}

const WORDS: &str = "the request was not answered within 0.3 s";

#[tokio::test]
async fn one_that_waits_too_long_is_told_so_and_leaves() {
    // Before its prompt is computed, and before its adapter is there.
    for (gate, adapter) in
        [(Gate::Steps, ""), (Gate::Load("sql".into()), "sql"), (Gate::Stage("sql".into()), "sql")]
    {
        let router = router(Script { held: [gate.clone()].into(), ..Script::saying(tokens("abc")) }).await;
        for (path, body) in [
            ("/v1/completions", json!({"prompt": "x", "n": 3, "model": adapter})),
            ("/v1/completions", json!({"prompt": ["x", "y"], "model": adapter, "stream": true})),
            (
                "/v1/chat/completions",
                json!({"messages": [{"role": "user", "content": "x"}], "model": adapter}),
            ),
            ("/generate", json!({"inputs": "x", "parameters": {"adapter_id": adapter}})),
            ("/generate_stream", json!({"inputs": "x", "parameters": {"adapter_id": adapter}})),
        ] {
            let (status, answer) = timeout(PATIENCE, router.post(path, &body)).await.unwrap();
            assert_eq!(status, 504, "{path} {answer}");
            match path.starts_with("/v1") {
                true => assert_openai(&answer, "request_timeout", WORDS),
                false => assert_native(&answer, "request_timeout", WORDS),
            }
            router.holds(0).await;
        }
        router.shard.release(&gate);
        router.ok("/v1/completions", &json!({"prompt": "x", "model": adapter})).await;
    }
}

/// The same for what is computed of texts, whether the first of them waits or all but the first.
#[tokio::test]
async fn texts_that_wait_too_long_are_told_so() {
    for task in [Task::Embed, Task::ClassifyTokens, Task::ClassifySequences] {
        for (gate, adapter) in
            [(Gate::Steps, ""), (Gate::Load("sql".into()), "sql"), (Gate::Stage("sql".into()), "sql")]
        {
            let script = Script { held: [gate.clone()].into(), ..pooling(task) };
            let router = router(script).await;
            let adapter_id = json!({"adapter_id": adapter});
            let routes = match task {
                Task::Embed => [
                    ("/embed", json!({"inputs": "x", "parameters": adapter_id})),
                    ("/v1/embeddings", json!({"input": vec!["x"; 200], "model": adapter})),
                ],
                _ => [
                    ("/classify", json!({"inputs": "x", "parameters": adapter_id})),
                    ("/classify_batch", json!({"inputs": vec!["x"; 200], "parameters": adapter_id})),
                ],
            };
            for (path, body) in &routes {
                let (status, answer) = timeout(PATIENCE, router.post(path, body)).await.unwrap();
                assert_eq!(status, 504, "{path} {answer}");
                match path.starts_with("/v1") {
                    true => assert_openai(&answer, "request_timeout", WORDS),
                    false => assert_native(&answer, "request_timeout", WORDS),
                }
                router.holds(0).await;
            }
            router.shard.release(&gate);
            router.ok(routes[0].0, &routes[0].1).await;
        }
    }
}

#[tokio::test]
async fn a_stream_that_takes_too_long_ends_with_the_reason() {
    for path in ["/v1/completions", "/generate_stream"] {
        let endless =
            Script { pace: Some(Duration::from_millis(5)), ..Script::saying(tokens("a").repeat(4000)) };
        let router = router(endless).await;
        let body = match path {
            "/v1/completions" => json!({"prompt": "x", "max_tokens": 3000, "stream": true}),
            _ => json!({"inputs": "x", "parameters": {"max_new_tokens": 3000}}),
        };
        let response = router.send(path, &body).await;
        assert_eq!(response.status(), 200, "the head is sent with the first token");
        let events = events(&timeout(PATIENCE, response.text()).await.unwrap().unwrap());
        let errors: Vec<&Value> = events.iter().filter(|event| event.get("error").is_some()).collect();
        assert_eq!(errors.len(), 1, "{events:?}");
        assert!(errors[0].to_string().contains(WORDS), "{errors:?}");
        router.holds(0).await;
    }
}

#[tokio::test]
async fn one_that_is_in_time_is_not_disturbed() {
    let router = router(Script::saying(tokens("abc"))).await;
    for _ in 0..20 {
        let answer = router.ok("/v1/completions", &json!({"prompt": "x", "n": 2})).await;
        assert_eq!(answer["choices"][1]["text"], "abc");
    }
    let lists =
        Router::start_with(Script::saying(tokens("a")), |config| config.router.max_client_batch_size = 3)
            .await;
    lists.ok("/v1/completions", &json!({"prompt": ["a", "b", "c"]})).await;
    let (status, answer) = lists.post("/v1/completions", &json!({"prompt": ["a", "b", "c", "d"]})).await;
    assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("prompt")));
}
