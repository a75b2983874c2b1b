//! `GET /metrics`.

use std::collections::BTreeMap;

use proto::Step;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic::Status;

use crate::{
    router::{PATIENCE, Router, poll, tokens},
    shard::{Gate, IMPROBABLE, Script},
    sockets::head,
};

/// All samples by name and labels.
pub(crate) async fn scrape(router: &Router) -> BTreeMap<String, f64> {
    // Whoever scrapes has a key, if there are any.
    let key = [("authorization", "Bearer abc")];
    let response = router.send_with(Method::GET, "/metrics", &key, &Value::Null).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    samples(&response.text().await.unwrap())
}

/// The samples of a page, by name and labels.
pub(crate) fn samples(page: &str) -> BTreeMap<String, f64> {
    let lines = page.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), value.parse().unwrap())
    };
    lines.map(sample).collect()
}

/// Waits until a scrape is as wanted.
pub(crate) async fn until(router: &Router, what: &str, wanted: impl Fn(&BTreeMap<String, f64>) -> bool) {
    let mut last = BTreeMap::new();
    let turns = poll(async || {
        last = scrape(router).await;
        wanted(&last).then_some(())
    });
    let turned = timeout(PATIENCE, turns).await;
    assert!(turned.is_ok(), "never {what}: {last:#?}");
}

/// Waits until a metric has a value.
pub(crate) async fn becomes(router: &Router, name: &str, value: f64) {
    until(router, &format!("{name} {value}"), |samples| samples.get(name) == Some(&value)).await;
}

/// Requests that have ended, by how; those with none are left out.
fn ends(samples: &BTreeMap<String, f64>) -> BTreeMap<String, u64> {
    let end = |(name, value): (&String, &f64)| {
        let end = name.strip_prefix("lorax_requests_total{end=\"")?.strip_suffix("\"}")?;
        (*value > 0.0).then_some((end.to_owned(), *value as u64))
    };
    samples.iter().filter_map(end).collect()
}

/// Counts what a test has sent.
struct Tally {
    router: Router,
    expected: BTreeMap<String, u64>,
}

impl Tally {
    fn new(router: Router) -> Tally {
        Tally { router, expected: BTreeMap::new() }
    }

    /// One more request has ended: nothing but its count may have changed, and that by one.
    async fn ended(&mut self, end: &str) {
        *self.expected.entry(end.into()).or_default() += 1;
        let sum = |ends: &BTreeMap<String, u64>| ends.values().sum::<u64>();
        let wanted = sum(&self.expected);
        until(&self.router, &format!("{wanted} requests"), |samples| sum(&ends(samples)) >= wanted).await;
        assert_eq!(ends(&scrape(&self.router).await), self.expected, "after {end}");
    }

    async fn answered(&mut self, path: &str, body: Value, status: u16, end: &str) {
        let response = self.router.send(path, &body).await;
        assert_eq!(response.status(), status, "{path} {body}");
        response.text().await.unwrap();
        self.ended(end).await;
    }
}

fn native(prompt: &str, parameters: Value) -> Value {
    json!({"inputs": prompt, "parameters": parameters})
}

fn script() -> Script {
    let mut script = Script::answering(|prompt| match prompt {
        prompt if *prompt == tokens("nan") => vec![IMPROBABLE],
        prompt if *prompt == tokens("short") => tokens("ab"),
        _ => tokens("abc").repeat(500),
    });
    script.untaken.insert(tokens("y")[0]);
    script.unstageable.insert("broken", Status::invalid_argument("not an adapter"));
    script.lost.insert("lost");
    script
}

#[tokio::test]
async fn every_answer_is_counted_once_with_its_end() {
    let mut tally = Tally::new(Router::start(script()).await);
    for path in ["/generate", "/generate_stream", "/"] {
        tally.answered(path, native("x", json!({"max_new_tokens": 5})), 200, "length").await;
        tally.answered(path, native("short", json!({"max_new_tokens": 5})), 200, "eos_token").await;
        let stops = json!({"max_new_tokens": 50, "stop": ["ca"]});
        tally.answered(path, native("x", stops), 200, "stop_sequence").await;
    }
    for path in ["/v1/completions", "/v1/chat/completions"] {
        for stream in [false, true] {
            let body = |prompt: &str, more: Value| {
                let mut body = json!({"prompt": prompt, "max_tokens": 7, "stream": stream});
                if path.contains("chat") {
                    body = json!({"messages": [{"role": "user", "content": prompt}], "max_tokens": 7, "stream": stream});
                }
                body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
                body
            };
            tally.answered(path, body("x", json!({})), 200, "length").await;
            tally.answered(path, body("x", json!({"stop": "bc"})), 200, "stop_sequence").await;
        }
    }
    // One request of several sequences.
    let several = json!({"prompt": ["x", "z", "x"], "max_tokens": 5});
    tally.answered("/v1/completions", several, 200, "length").await;
    assert_eq!(scrape(&tally.router).await["lorax_request_duration_count"], 18.0);
}

#[tokio::test]
async fn every_failure_is_counted_once_with_its_reason() {
    let router = Router::start_with(script(), |config| config.router.max_body_size = 1000).await;
    let mut tally = Tally::new(router);
    let adapter = |id: &str| native("x", json!({"adapter_id": id, "max_new_tokens": 2}));
    for path in ["/generate", "/generate_stream"] {
        tally.answered(path, json!({"inputs": 7}), 422, "validation").await;
        tally.answered(path, native("x", json!({"temperature": -1})), 422, "validation").await;
        tally.answered(path, native(&"x".repeat(2000), json!({})), 413, "validation").await;
        tally.answered(path, adapter("absent"), 404, "adapter").await;
        tally.answered(path, adapter("secret"), 424, "adapter").await;
        tally.answered(path, adapter("broken"), 422, "adapter").await;
    }
    tally.answered("/generate", native("y", json!({})), 422, "validation").await;
    tally.answered("/generate", native("nan", json!({})), 424, "generation").await;
    tally.answered("/generate", adapter("lost"), 503, "adapter").await;
    tally.answered("/v1/completions", json!({"prompt": "y"}), 400, "validation").await;
    tally
        .answered("/v1/completions", json!({"prompt": ["x", "y", "y"], "max_tokens": 2}), 400, "validation")
        .await;
    tally.answered("/v1/completions", json!({"prompt": "nan"}), 424, "generation").await;
    // What is no request to generate is none.
    for path in ["/health", "/info", "/v1/models", "/nothing"] {
        tally.router.get(path).await;
    }
    assert_eq!(tally.router.send("/nothing", &json!({})).await.status(), 404);
    assert_eq!(tally.router.send("/info", &json!({})).await.status(), 405);
    tally.answered("/generate", json!([]), 422, "validation").await;
}

#[tokio::test]
async fn clients_that_leave_are_counted_once() {
    for path in ["/generate", "/generate_stream"] {
        let mut tally = Tally::new(Router::start(script()).await);
        tally.router.shard.hold(Gate::Steps);
        let body = native("x", json!({"max_new_tokens": 100}));
        let leaving = tally.router.send(path, &body);
        let runs = tally.router.shard.saw(|seen| seen.added().next().map(|_| ()));
        // The request is under way, and then its future is dropped, which closes its connection.
        tokio::select! {
            biased;
            () = runs => {}
            _ = leaving => {}
        }
        tally.ended("cancelled").await;
        tally.router.shard.release(&Gate::Steps);
        tally.answered(path, native("x", json!({"max_new_tokens": 1})), 200, "length").await;
    }
}

#[tokio::test]
async fn clients_that_leave_within_their_body_are_counted_as_such() {
    let mut tally = Tally::new(Router::start(script()).await);
    let chunked =
        |path| format!("POST {path} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{{");
    for path in ["/", "/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions"] {
        for request in [head(path, "", 100), head(path, "", 100) + "{\"inputs\"", chunked(path)] {
            let mut stream = TcpStream::connect(&tally.router.address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            drop(stream);
            tally.ended("cancelled").await;
        }
    }
    let broken = chunked("/generate") + "}xx";
    let mut stream = TcpStream::connect(&tally.router.address).await.unwrap();
    stream.write_all(broken.as_bytes()).await.unwrap();
    tally.ended("validation").await;
}

#[tokio::test]
async fn clients_that_close_at_once_are_counted() {
    let router = Router::start(script()).await;
    let whole = |path: &str, body: &str| head(path, "", body.len()) + body;
    let bare = |line: &str| format!("{line} HTTP/1.1\r\nhost: x\r\n\r\n");
    let requests = [
        whole("/generate", r#"{"inputs":"x","parameters":{"max_new_tokens":400}}"#),
        whole("/generate_stream", r#"{"inputs":"x","parameters":{"max_new_tokens":400}}"#),
        whole("/v1/completions", r#"{"prompt":"x","max_tokens":400,"stream":true}"#),
        whole("/v1/completions", r#"{"prompt":["x","z"],"max_tokens":400}"#),
        whole("/v1/chat/completions", r#"{"messages":[{"role":"user","content":"x"}]}"#),
        whole("/generate", r#"{"inputs":7}"#),
        whole("/generate", "{"),
        whole("/generate", ""),
        whole("/v1/completions", ""),
        whole("/", ""),
        bare("POST /generate"),
        bare("POST /v1/chat/completions"),
        head("/generate", "", 100),
    ];
    let mut sent = 0;
    for request in &requests {
        for half in [false, true] {
            for _ in 0..10 {
                let mut stream = TcpStream::connect(&router.address).await.unwrap();
                stream.write_all(request.as_bytes()).await.unwrap();
                if half {
                    stream.shutdown().await.unwrap();
                    // Whatever comes, if anything does.
                    _ = timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await.unwrap();
                }
            }
            sent += 10;
            let sum = |samples: &BTreeMap<String, f64>| ends(samples).values().sum::<u64>();
            until(&router, &format!("{sent} ends after {request:?}"), |samples| sum(samples) >= sent).await;
            assert_eq!(sum(&scrape(&router).await), sent, "after {request:?}");
        }
    }
}

#[tokio::test]
async fn requests_that_are_shed_or_find_no_permit_are_counted_once() {
    let router = Router::start_with(script(), |config| config.router.max_concurrent_requests = 2).await;
    let mut tally = Tally::new(router);
    tally.router.shard.hold(Gate::Steps);
    let body = native("x", json!({"max_new_tokens": 2}));
    let adapter = native("x", json!({"max_new_tokens": 2, "adapter_id": "sql"}));
    let (router, other) = (&tally.router, &body);
    let two = async { tokio::join!(router.send("/generate", other), router.send("/generate", other)) };
    let rest = async {
        let mut held = router.app.permits_held();
        held.wait_for(|held| *held == 2).await.unwrap();
        // Both permits are of one flow, so that it gets no third, and gives one to another flow.
        assert_eq!(router.send("/generate", other).await.status(), 429);
        let newcomer = router.send("/generate", &adapter);
        let release = async {
            until(router, "two refused", |samples| ends(samples).get("overloaded") == Some(&2)).await;
            router.shard.release(&Gate::Steps);
        };
        assert_eq!(tokio::join!(newcomer, release).0.status(), 200);
    };
    let ((one, two), ()) = timeout(PATIENCE, async { tokio::join!(two, rest) }).await.unwrap();
    let mut statuses = [one.status().as_u16(), two.status().as_u16()];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 429]);
    tally.expected = BTreeMap::from([("overloaded".into(), 2), ("length".into(), 1)]);
    tally.ended("length").await;
}

#[tokio::test]
async fn callers_without_a_key_are_counted_once() {
    let keys = |config: &mut config::Config| config.router.api_keys = vec!["abc".into()];
    let mut tally = Tally::new(Router::start_with(script(), keys).await);
    tally.answered("/generate", native("x", json!({})), 401, "unauthorized").await;
    tally.answered("/v1/completions", json!({"prompt": "x"}), 401, "unauthorized").await;
}

#[tokio::test]
async fn requests_that_the_model_leaves_are_counted_once() {
    let mut tally = Tally::new(Router::start(script()).await);
    tally.router.shard.hold(Gate::Step(3));
    let body = native("x", json!({"max_new_tokens": 100}));
    let (router, failing) = (&tally.router, async {
        let response = tally.router.send("/generate", &body).await;
        assert_eq!(response.status(), 503);
    });
    let breaks = async {
        router.shard.saw(|seen| seen.steps.iter().any(|step| step.id == 3).then_some(())).await;
        becomes(router, "lorax_batch_current_size", 1.0).await;
        router.shard.hold(Gate::Info);
        router.shard.break_stream();
    };
    tokio::join!(failing, breaks);
    tally.ended("unavailable").await;
    tally.answered("/generate", native("x", json!({})), 503, "unavailable").await;
    tally.answered("/v1/completions", json!({"prompt": "x"}), 503, "unavailable").await;
    let samples = scrape(&tally.router).await;
    assert_eq!(samples["lorax_connected_ranks"], 0.0);
    assert_eq!((samples["lorax_sessions_total"], samples["lorax_session_failures_total"]), (1.0, 1.0));
    assert_eq!(samples["lorax_batch_current_size"], 0.0);
    tally.router.shard.release(&Gate::Info);
    becomes(&tally.router, "lorax_connected_ranks", 1.0).await;
}

#[tokio::test]
async fn tokens_steps_and_adapters_are_counted() {
    let mut script = script();
    (script.step_us, script.info.num_slots) = (1500, 3);
    let router = Router::start_with(script, |config| config.router.prefix_caching = true).await;
    let prompt = "x".repeat(40);
    let length = tokens(&prompt).len() as f64;
    for _ in 0..2 {
        router.ok("/generate", &native(&prompt, json!({"max_new_tokens": 9}))).await;
    }
    router.ok("/generate", &native("short", json!({"adapter_id": "sql"}))).await;
    router.post("/generate", &native("x", json!({"adapter_id": "absent"}))).await;
    router.post("/generate", &native("x", json!({"adapter_id": "lost"}))).await;
    becomes(&router, "lorax_adapter_loads_total{result=\"failed\"}", 1.0).await;
    becomes(&router, "lorax_adapter_slots{state=\"ready\"}", 1.0).await;
    let steps = router.shard.saw(|seen| Some(seen.steps.clone())).await;
    let rows = |step: &Step| f64::from(step.rows.iter().map(|rows| rows.rows).sum::<u32>());
    becomes(&router, "lorax_step_duration_seconds_count", steps.len() as f64).await;
    let samples = scrape(&router).await;
    for (name, value) in [
        ("lorax_build_info{version=\"0.1.0\"}", 1.0),
        ("lorax_connected_ranks", 1.0),
        ("lorax_sessions_total", 1.0),
        ("lorax_session_failures_total", 0.0),
        ("lorax_prompt_tokens_total", 2.0 * length + tokens("short").len() as f64),
        // In blocks of 16 tokens, of which the last must be computed.
        ("lorax_cached_prompt_tokens_total", ((length - 1.0) / 16.0).floor() * 16.0),
        // "ab" and the token that ends it.
        ("lorax_generated_tokens_total", 9.0 + 9.0 + 3.0),
        ("lorax_request_generated_tokens_sum", 9.0 + 9.0 + 3.0),
        ("lorax_request_generated_tokens_count", 3.0),
        ("lorax_request_input_length_count", 3.0),
        ("lorax_request_queue_duration_count", 3.0),
        ("lorax_request_first_token_duration_count", 3.0),
        ("lorax_request_inter_token_duration_count", 8.0 + 8.0 + 2.0),
        ("lorax_step_rows_count", steps.len() as f64),
        ("lorax_step_rows_sum", steps.iter().map(rows).sum()),
        ("lorax_adapter_loads_total{result=\"ready\"}", 1.0),
        ("lorax_adapter_ask_duration_seconds_count", 3.0),
        ("lorax_adapter_ask_failures_total{error=\"not_found\"}", 1.0),
        ("lorax_adapter_ask_failures_total{error=\"abandoned\"}", 0.0),
        ("lorax_adapter_slots{state=\"loading\"}", 0.0),
        ("lorax_adapter_slots{state=\"empty\"}", 2.0),
        ("lorax_queue_length", 0.0),
        ("lorax_queue_oldest_age_seconds", 0.0),
        ("lorax_batch_current_size", 0.0),
        ("lorax_preempted_sequences", 0.0),
        ("lorax_preemptions_total", 0.0),
        ("lorax_adapter_slot_evictions_total", 0.0),
        ("lorax_adapter_slot_idle_steps_total", 0.0),
        ("lorax_oldest_step_age_seconds", 0.0),
        ("lorax_kv_blocks{state=\"used\"}", 0.0),
        ("lorax_http_responses_total{route=\"/generate\",status=\"200\"}", 3.0),
        ("lorax_http_responses_total{route=\"/generate\",status=\"404\"}", 1.0),
        ("lorax_http_responses_total{route=\"/generate\",status=\"503\"}", 1.0),
    ] {
        assert_eq!(samples.get(name), Some(&value), "{name} in {samples:#?}");
    }
    let seconds = 0.0015 * steps.len() as f64;
    assert!((samples["lorax_step_duration_seconds_sum"] - seconds).abs() < 1e-9);
    let blocks =
        ["free", "cached", "used"].map(|state| samples[&format!("lorax_kv_blocks{{state=\"{state}\"}}")]);
    assert_eq!(blocks.iter().sum::<f64>(), 4096.0);
    assert!(blocks[1] >= 2.0, "{blocks:?}");
}

#[tokio::test]
async fn gauges_show_who_waits_and_who_had_to_give_way() {
    let mut script = script();
    (script.info.max_sequences, script.info.num_blocks) = (2, 8);
    let router = Router::start(script).await;
    router.shard.hold(Gate::Steps);
    let ask =
        |prompt: &str, new: u32| native(prompt, json!({"max_new_tokens": new, "ignore_eos_token": true}));
    let (one, two, three) = (ask("x", 100), ask("z", 100), ask("w", 2));
    let all = async {
        tokio::join!(
            router.ok("/generate", &one),
            router.ok("/generate", &two),
            router.ok("/generate", &three)
        )
    };
    let looks = async {
        // Two steps are in flight, so that whoever came after they were sent waits.
        until(&router, "some that run and some that wait", |samples| {
            let of = |name: &str| samples.get(name).copied().unwrap_or_default();
            let (running, waiting) = (of("lorax_batch_current_size"), of("lorax_queue_length"));
            running >= 1.0 && waiting >= 1.0 && running + waiting == 3.0
        })
        .await;
        until(&router, "a waiting one that ages", |samples| {
            ["lorax_queue_oldest_age_seconds", "lorax_oldest_step_age_seconds"]
                .iter()
                .all(|name| samples.get(*name).is_some_and(|age| *age > 0.3))
        })
        .await;
        router.shard.release(&Gate::Steps);
    };
    tokio::join!(all, looks);
    let preempted = |samples: &BTreeMap<String, f64>| samples.get("lorax_preemptions_total") >= Some(&1.0);
    until(&router, "a preemption", preempted).await;
    becomes(&router, "lorax_queue_length", 0.0).await;
    becomes(&router, "lorax_kv_blocks{state=\"free\"}", 8.0).await;
}

#[tokio::test]
async fn routes_are_few_whatever_clients_ask_for() {
    let router = Router::start(script()).await;
    for i in 0..50 {
        router.get(&format!("/nothing/{i}")).await;
        router.get(&format!("/generate?{i}")).await;
    }
    let samples = scrape(&router).await;
    let routes: Vec<_> =
        samples.iter().filter(|(name, _)| name.starts_with("lorax_http_responses")).collect();
    let named = |route: &str, status: u16| {
        let name = format!("lorax_http_responses_total{{route=\"{route}\",status=\"{status}\"}}");
        samples.get(&name).copied()
    };
    assert_eq!((named("none", 404), named("/generate", 405)), (Some(50.0), Some(50.0)), "{routes:?}");
    assert_eq!(routes.len(), 2, "{routes:?}");
}

/// The names of a page's metrics.
async fn names(router: &Router) -> Vec<String> {
    let page = router.get("/metrics").await.text().await.unwrap();
    let typed = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    typed.map(|line| line.split_once(' ').unwrap().0.to_owned()).collect()
}

#[tokio::test]
async fn each_set_of_names_can_be_left_out() {
    use config::MetricNames::{Legacy, Native, Vllm};
    let is_vllm = |name: &&String| name.starts_with("vllm:");
    let legacy = ["lorax_request_count", "lorax_request_success", "lorax_request_failure"];
    for sets in [vec![Native], vec![Vllm], vec![Legacy], vec![Vllm, Legacy], vec![Native, Vllm, Legacy]] {
        let shown = sets.clone();
        let router = Router::start_with(script(), |config| config.router.metrics = shown).await;
        router.ok("/generate", &native("x", json!({"max_new_tokens": 3}))).await;
        let names = names(&router).await;
        let mut sorted = names.clone();
        sorted.dedup();
        assert_eq!(sorted, names, "a metric is told twice");
        let has = |name: &str| names.iter().any(|known| known == name);
        assert_eq!(names.iter().filter(is_vllm).count() >= 24, sets.contains(&Vllm), "{sets:?} {names:?}");
        assert_eq!(names.iter().any(|name| is_vllm(&name)), sets.contains(&Vllm), "{sets:?}");
        assert!(legacy.iter().all(|name| has(name) == sets.contains(&Legacy)), "{sets:?}");
        assert_eq!(has("lorax_request_duration"), sets.iter().any(|set| *set != Vllm), "{sets:?}");
        assert_eq!(has("lorax_step_rows"), sets.contains(&Native), "{sets:?}");
    }
}

#[tokio::test]
async fn other_names_tell_the_same_figures() {
    let mut script = script();
    script.step_us = 1500;
    let router = Router::start_with(script, |config| {
        config.router.served_model_name = vec!["the \"model\"".into()];
        config.router.prefix_caching = true;
    })
    .await;
    let prompt = "x".repeat(40);
    for _ in 0..2 {
        router.ok("/generate", &native(&prompt, json!({"max_new_tokens": 9}))).await;
    }
    router.ok("/generate", &native("x", json!({"max_new_tokens": 50, "stop": ["ca"]}))).await;
    router.ok("/generate", &native("short", json!({}))).await;
    router.post("/generate", &native("nan", json!({}))).await;
    router.post("/generate", &native("x", json!({"adapter_id": "absent"}))).await;
    until(&router, "six requests and an empty batch", |samples| {
        samples["lorax_request_count"] == 6.0
            && samples["lorax_request_generated_tokens_count"] == 4.0
            && samples["lorax_batch_current_size"] == 0.0
    })
    .await;
    let samples = scrape(&router).await;
    let labels = r#"model_name="the \"model\"",engine="0""#;
    let vllm = |name: &str| samples[&format!("vllm:{name}{{{labels}}}")];
    for (name, own) in [
        ("num_requests_running", "lorax_batch_current_size"),
        ("kv_cache_usage_perc", "lorax_kv_use_ratio"),
        ("prompt_tokens_total", "lorax_prompt_tokens_total"),
        ("prefix_cache_hits_total", "lorax_cached_prompt_tokens_total"),
        ("generation_tokens_total", "lorax_generated_tokens_total"),
        ("time_to_first_token_seconds_count", "lorax_request_first_token_duration_count"),
        ("request_decode_time_seconds_sum", "lorax_request_decode_duration_sum"),
        ("request_params_max_tokens_sum", "lorax_request_max_new_tokens_sum"),
    ] {
        assert_eq!(vllm(name), samples[own], "{name}");
    }
    assert!(vllm("prefix_cache_hits_total") > 0.0);
    let ended = |reason: &str| {
        samples[&format!("vllm:request_success_total{{{labels},finished_reason=\"{reason}\"}}")]
    };
    assert_eq!(["stop", "length", "abort", "error"].map(ended), [2.0, 2.0, 0.0, 1.0]);
    assert_eq!(
        (samples["lorax_request_success"], samples["lorax_request_failure{err=\"load_adapter\"}"]),
        (4.0, 1.0)
    );
    // Four sequences ran to their ends, each with more than one token.
    for name in ["prefill", "decode", "inference", "time_per_output_token", "mean_time_per_token"] {
        assert_eq!(samples[&format!("lorax_request_{name}_duration_count")], 4.0, "{name}");
    }
    let sum = |name: &str| samples[&format!("lorax_request_{name}_duration_sum")];
    assert!((sum("prefill") + sum("decode") - sum("inference")).abs() < 1e-6);
    assert!(sum("decode") > 0.0 && sum("mean_time_per_token") > sum("prefill") / 50.0);
    // Nine tokens of two sequences each are in the bucket up to ten, and not in that up to five.
    let bucket =
        |le: &str| samples[&format!("vllm:request_generation_tokens_bucket{{{labels},le=\"{le}\"}}")];
    assert!(bucket("10.0") >= bucket("5.0") + 2.0);
    assert_eq!(bucket("+Inf"), 4.0);
}
