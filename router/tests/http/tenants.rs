//! Tenants beside each other, and the flows of one.

use std::{
    fs,
    ops::Range,
    time::{Duration, Instant},
};

use futures::future::{FutureExt, select_all};
use reqwest::{Client, Method, Response};
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, time::timeout};

use crate::{
    metrics::samples,
    process::Program,
    router::{Router, poll, tokens},
    shard::{Gate, Script, Seen},
    sockets::{LONG, answer, open},
};

/// A router with keys of two tenants, `sk-many` and `sk-few`.
async fn router(permits: usize) -> Router {
    let script = Script::saying(tokens("a"));
    Router::start_with(script, |config| {
        config.router.api_keys = vec!["sk-many".into(), "sk-few".into()];
        config.router.max_concurrent_requests = permits;
    })
    .await
}

fn generate(adapter: Option<&str>) -> Value {
    json!({"inputs": "x", "parameters": {"adapter_id": adapter, "max_new_tokens": 1}})
}

/// Returns whether an answer is a refusal that says when to come again.
fn is_shed(answer: &str) -> bool {
    let shed = answer.starts_with("HTTP/1.1 429 ");
    assert!(shed || answer.starts_with("HTTP/1.1 200 "), "{answer}");
    if shed {
        assert!(answer.contains("\r\nretry-after: ") && answer.contains("Model is overloaded"), "{answer}");
    }
    shed
}

#[tokio::test]
async fn one_tenant_with_ten_thousand_open_requests_keeps_no_other_out() {
    const MANY: usize = 10_000;
    // A process of its own: one may not have as many files as both ends of so many connections.
    let mut script = Script::saying(tokens("a"));
    script.pace = Some(Duration::from_millis(10));
    let mut program = Program::start(script, |router| {
        router.api_keys = vec!["sk-many".into(), "sk-few".into()];
        router.max_concurrent_requests = MANY;
        router.max_connections_per_address = Some(2 * MANY);
        // The step that is held is not a fault.
        router.step_timeout = Some(LONG);
    });
    let address = program.says("listening on ").await;
    let client = Client::new();
    program.shard.hold(Gate::Steps);
    let mut many = Vec::new();
    for sent in 0..MANY {
        many.push(open(&address, "sk-many", "/generate", &generate(Some("hot"))).await);
        // No more than the queue of connections that wait to be accepted. All but those of the first step wait.
        if sent % 100 == 99 {
            let asked = async || {
                let page = client.get(format!("http://{address}/metrics")).bearer_auth("sk-many").send();
                let samples = samples(&page.await.unwrap().text().await.unwrap());
                let waiting = samples.get("lorax_queue_length").copied();
                (waiting.unwrap_or_default() + 32.0 > sent as f64).then_some(())
            };
            timeout(LONG, poll(asked)).await.unwrap();
        }
    }
    // Its adapter is in a slot already: what is measured is the wait for its turn.
    let single = json!({"inputs": "single", "parameters": {"adapter_id": "hot", "max_new_tokens": 1}});
    let sent = Instant::now();
    let few = open(&address, "sk-few", "/generate", &single).await;
    // One of the youngest gives way, and that is when the single request is handed to the engine.
    let answered = many.iter().skip(MANY - 200).map(|stream| stream.readable().boxed());
    let (_, index, _) = timeout(LONG, select_all(answered)).await.unwrap();
    assert!(is_shed(&answer(many.remove(MANY - 200 + index)).await));
    let sent_before = program.shard.saw(|seen| Some(seen.steps.len())).await;
    program.shard.release(&Gate::Steps);
    let single = tokens("single");
    let runs = |step: &proto::Step| step.added.iter().any(|new| new.tokens == single);
    let ran = |seen: &Seen| seen.steps.iter().position(runs).map(|index| index + 1);
    let step = program.shard.saw_within(LONG, ran).await;
    println!(
        "the single request ran in step {step} after {sent_before}, {:?} after it was sent",
        sent.elapsed()
    );
    assert!(sent.elapsed() < Duration::from_secs(1), "{:?}", sent.elapsed());
    // One more was in flight already.
    assert!(step <= sent_before + 2, "step {step}, {sent_before} were sent before");
    assert!(!is_shed(&answer(few).await));
    for stream in many {
        assert!(!is_shed(&answer(stream).await), "no more than there was need");
    }
}

#[tokio::test]
async fn the_youngest_of_the_longest_flow_gives_way_on_every_route() {
    let chat = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "stream": true});
    for (path, body) in [
        ("/generate", generate(None)),
        ("/generate_stream", generate(None)),
        ("/", generate(None)),
        ("/v1/completions", json!({"prompt": "x", "max_tokens": 1})),
        ("/v1/completions", json!({"prompt": ["x", "y"], "max_tokens": 1})),
        ("/v1/completions", json!({"prompt": ["x", "y"], "max_tokens": 1, "stream": true})),
        ("/v1/chat/completions", chat),
    ] {
        let sequences = body["prompt"].as_array().map_or(1, Vec::len);
        let router = router(2 * sequences).await;
        router.shard.hold(Gate::Steps);
        let older = open(&router.address, "sk-many", path, &body).await;
        router.holds(sequences).await;
        let younger = open(&router.address, "sk-many", path, &body).await;
        router.holds(2 * sequences).await;
        let few = open(&router.address, "sk-few", path, &body).await;
        assert!(is_shed(&answer(younger).await), "{path}");
        router.holds(2 * sequences).await;
        router.shard.release(&Gate::Steps);
        assert!(!is_shed(&answer(older).await), "{path}");
        assert!(!is_shed(&answer(few).await), "{path}");
        router.holds(0).await;
    }
}

#[tokio::test]
async fn what_a_shed_request_ran_is_cancelled() {
    let router = router(2).await;
    router.shard.hold(Gate::Steps);
    let long = |prompt: &str| json!({"inputs": prompt, "parameters": {"max_new_tokens": 50, "ignore_eos_token": true}});
    let older = open(&router.address, "sk-many", "/generate", &long("older")).await;
    router.shard.sequence_of(&tokens("older")).await;
    let younger = open(&router.address, "sk-many", "/generate", &long("younger")).await;
    router.holds(2).await;
    let few = open(&router.address, "sk-few", "/generate", &long("few")).await;
    assert!(is_shed(&answer(younger).await));
    router.shard.release(&Gate::Steps);
    assert!(!is_shed(&answer(older).await) && !is_shed(&answer(few).await));
    let left = router.shard.saw(|seen| {
        let younger = seen.added().find(|new| new.tokens == tokens("younger")).map(|new| new.sequence);
        Some(younger.is_none_or(|id| seen.drop_of(id).is_some()))
    });
    assert!(left.await, "it is dropped if it was ever run");
}

#[tokio::test]
async fn an_answer_that_has_begun_is_never_shed() {
    let script = Script::saying(tokens("a").repeat(2000));
    let router = Router::start_with(script, |config| {
        config.router.api_keys = vec!["sk-many".into(), "sk-few".into()];
        config.router.max_concurrent_requests = 2;
    })
    .await;
    let body = json!({"inputs": "x", "parameters": {"max_new_tokens": 1500}});
    let mut begun = Vec::new();
    for _ in 0..2 {
        let mut stream = open(&router.address, "sk-many", "/generate_stream", &body).await;
        let mut head = [0; 15];
        timeout(LONG, stream.read_exact(&mut head)).await.unwrap().unwrap();
        assert_eq!(&head, b"HTTP/1.1 200 OK");
        begun.push(stream);
    }
    router.shard.hold(Gate::Steps);
    let few = open(&router.address, "sk-few", "/generate", &generate(None)).await;
    assert!(is_shed(&answer(few).await), "nobody could be shed for it");
    router.shard.release(&Gate::Steps);
    for stream in begun {
        assert!(answer(stream).await.contains(&"a".repeat(1500)));
    }
}

#[tokio::test]
async fn without_keys_flows_are_adapters() {
    let router = Router::start_with(Script::saying(tokens("a")), |config| {
        config.router.max_concurrent_requests = 4;
    })
    .await;
    router.shard.hold(Gate::Steps);
    let mut hot = Vec::new();
    for held in 1..=4 {
        hot.push(open(&router.address, "none", "/generate", &generate(Some("hot"))).await);
        router.holds(held).await;
    }
    let mut others = Vec::new();
    for (adapter, left) in [(None, 3), (Some("cold"), 2)] {
        others.push(open(&router.address, "none", "/generate", &generate(adapter)).await);
        assert!(is_shed(&answer(hot.pop().unwrap()).await), "{adapter:?}");
        assert_eq!(hot.len(), left);
    }
    let more = open(&router.address, "none", "/generate", &generate(Some("hot"))).await;
    assert!(is_shed(&answer(more).await), "of the longest flow the newcomer is refused");
    router.shard.release(&Gate::Steps);
    for stream in hot.into_iter().chain(others) {
        assert!(!is_shed(&answer(stream).await));
    }
}

#[tokio::test]
async fn limits_of_a_tenant_are_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.json");
    let key = |name: &str, limits: Value| json!({"key": name, "tenant": name, "limits": limits});
    let keys = json!({"keys": [
        key("concurrent", json!({"max_concurrent_requests": 2})),
        key("requests", json!({"requests_per_minute": 1})),
        key("tokens", json!({"tokens_per_minute": 2})),
        key("free", json!({})),
    ]});
    fs::write(&file, keys.to_string()).unwrap();
    let script = Script::saying(tokens("a"));
    let router = Router::start_with(script, |config| config.router.api_key_file = Some(file)).await;
    let ask = async |key: &str, path: &str, body: &Value| {
        let header = format!("Bearer {key}");
        router.send_with(Method::POST, path, &[("authorization", &header)], body).await
    };
    let completion = json!({"prompt": ["x", "y"], "max_tokens": 1});
    let check = async |refused: Response, limit: &str, seconds: Range<u64>| {
        assert_eq!(refused.status(), 429, "{limit}");
        let after: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
        assert!(seconds.contains(&after), "{limit}: {after}");
        let body: Value = refused.json().await.unwrap();
        assert_eq!(body["error"]["message"], format!("the tenant's limit of {limit} is reached"));
        assert_eq!(body["error"]["code"], "rate_limit_exceeded");
        assert_eq!(ask("free", "/v1/completions", &completion).await.status(), 200, "{limit}");
    };
    for (key, first, limit, seconds) in [
        ("requests", generate(None), "1 requests per minute", 59..61),
        // A token of the prompt and two of the answer, the last of which ends it.
        ("tokens", json!({"inputs": "x"}), "2 tokens per minute", 59..61),
    ] {
        assert_eq!(ask(key, "/generate", &first).await.status(), 200, "{key}");
        check(ask(key, "/v1/completions", &completion).await, limit, seconds).await;
    }
    // While one runs there is room for one more, and not for two.
    router.holds(0).await;
    router.shard.hold(Gate::Steps);
    let first = generate(None);
    let refused = async {
        router.holds(1).await;
        let refused = ask("concurrent", "/v1/completions", &completion).await;
        router.shard.release(&Gate::Steps);
        refused
    };
    let (first, refused) = tokio::join!(ask("concurrent", "/generate", &first), refused);
    assert_eq!(first.status(), 200);
    check(refused, "2 concurrent requests", 1..2).await;
}
