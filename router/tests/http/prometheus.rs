//! The page of metrics after a known load, series by series, and what reads it: promtool, the dashboard and the alerts.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use reqwest::{Method, Response};
use serde_json::{Value, json};
use tonic::Status;

use crate::{
    metrics::samples,
    router::{Router, events, poll, tokens},
    shard::{Gate, IMPROBABLE, Script},
};

/// Series that this load leaves at zero, by the beginning of their names, and why.
const ZERO: [(&str, &str); 19] = [
    ("lorax_adapter_ask_failures_total", "adapters of this load are absent or invalid"),
    ("lorax_adapter_asks", "no ask is left"),
    ("lorax_adapter_call_failures_total", "the same"),
    ("lorax_adapter_calls", "no call is left"),
    ("lorax_adapter_downloaded_bytes_total", "folders are read in place"),
    ("lorax_adapter_running_requests", "no request is left"),
    ("lorax_adapter_slot", "all slots are full, and no request has waited for one"),
    ("lorax_adapter_tier_", "nothing is copied to the disk, and nothing has left host memory"),
    ("lorax_batch_current_size", "no sequence is left"),
    ("lorax_kv_", "no sequence is left"),
    ("lorax_mask_duration_seconds", "no request has a grammar"),
    ("lorax_oldest_step_age_seconds", "no step is in flight"),
    ("lorax_preempt", "there are blocks for all"),
    ("lorax_queue_", "no sequence waits"),
    ("lorax_workers_", "no prompt hangs"),
    ("vllm:kv_cache_usage_perc", "no sequence is left"),
    ("vllm:num_preemptions_total", "there are blocks for all"),
    ("vllm:num_requests_running", "no sequence is left"),
    ("vllm:num_requests_waiting", "no sequence waits"),
];

/// What the client has counted.
#[derive(Default)]
struct Count {
    ends: BTreeMap<&'static str, f64>,
    statuses: BTreeMap<u16, f64>,
    /// Requests, prompt tokens and generated tokens.
    tenants: BTreeMap<&'static str, [f64; 3]>,
    adapters: BTreeMap<&'static str, [f64; 3]>,
    cached: f64,
    /// Requests that were let in, and sequences that ran to their end.
    validated: f64,
    whole: f64,
    gaps: f64,
}

struct Load {
    router: Router,
    count: Count,
}

/// The tenants that the keys belong to.
const TENANTS: [&str; 2] = ["mail", "search"];

impl Load {
    async fn send(&mut self, tenant: &'static str, body: &Value) -> Response {
        let key = format!("Bearer sk-{tenant}");
        let response =
            self.router.send_with(Method::POST, "/v1/completions", &[("authorization", &key)], body).await;
        *self.count.statuses.entry(response.status().as_u16()).or_default() += 1.0;
        response
    }

    /// A request that is let in, and gets no answer if it has an end other than a good one.
    fn begin(&mut self, tenant: &'static str, adapter: Option<&'static str>) {
        self.count.tenants.entry(tenant).or_default()[0] += 1.0;
        if let Some(adapter) = adapter {
            self.count.adapters.entry(adapter).or_default()[0] += 1.0;
        }
    }

    async fn answered(
        &mut self,
        tenant: &'static str,
        adapter: Option<&'static str>,
        prompt: &str,
        new: u32,
    ) {
        self.begin(tenant, adapter);
        for stream in [false, true] {
            if stream {
                self.begin(tenant, adapter);
            }
            let mut body = json!({"prompt": prompt, "max_tokens": new, "stream": stream});
            if stream {
                body["stream_options"] = json!({"include_usage": true});
            }
            if let Some(adapter) = adapter {
                body["model"] = adapter.into();
            }
            let response = self.send(tenant, &body).await;
            assert_eq!(response.status(), 200);
            let text = response.text().await.unwrap();
            let all = if stream { events(&text) } else { vec![serde_json::from_str(&text).unwrap()] };
            let usage = all.iter().rev().find(|event| event["usage"].is_object()).unwrap()["usage"].clone();
            let reason = all.iter().rev().find_map(|event| event["choices"][0]["finish_reason"].as_str());
            let end = if reason == Some("stop") { "eos_token" } else { "length" };
            *self.count.ends.entry(end).or_default() += 1.0;
            let [prompt, generated] =
                ["prompt_tokens", "completion_tokens"].map(|field| usage[field].as_f64().unwrap());
            self.count.cached += usage["prompt_tokens_details"]["cached_tokens"].as_f64().unwrap();
            let counts = self.count.adapters.get_mut(adapter.unwrap_or_default());
            for counts in counts.into_iter().chain(self.count.tenants.get_mut(tenant)) {
                counts[1] += prompt;
                counts[2] += generated;
            }
            self.count.whole += 1.0;
            self.count.validated += 1.0;
            self.count.gaps += generated - 1.0;
        }
    }

    async fn refused(&mut self, tenant: &'static str, body: Value, status: u16, end: &'static str) {
        let response = self.send(tenant, &body).await;
        assert_eq!(response.status(), status, "{body}");
        response.text().await.unwrap();
        *self.count.ends.entry(end).or_default() += 1.0;
    }

    async fn page(&self) -> String {
        let headers = [("authorization", "Bearer root")];
        let page = self.router.send_with(Method::GET, "/metrics", &headers, &Value::Null).await;
        assert_eq!(page.status(), 200);
        page.text().await.unwrap()
    }
}

/// Starts a server and sends it a known load. Returns the page after it, and what the client has counted.
async fn load() -> (String, Count) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.json");
    let keys = TENANTS.map(|tenant| json!({"key": format!("sk-{tenant}"), "tenant": tenant}));
    fs::write(&file, json!({"keys": keys}).to_string()).unwrap();
    let mut script = Script::answering(|prompt| match prompt {
        prompt if *prompt == tokens("nan") => vec![IMPROBABLE],
        prompt if *prompt == tokens("short") => tokens("ab"),
        _ => tokens("abc").repeat(500),
    });
    (script.step_us, script.info.num_slots) = (1500, 2);
    script.lost.insert("lost");
    script.unstageable.insert("torn", Status::invalid_argument("not an adapter"));
    let router = Router::start_with(script, |config| {
        config.router.api_key_file = Some(file);
        config.router.admin_token = Some("root".into());
        config.router.metrics_top = 2;
        config.router.served_model_name = vec!["base".into()];
    })
    .await;
    let mut load = Load { router, count: Count::default() };
    send_all(&mut load).await;
    let sum = |page: &str| {
        let samples = samples(page);
        let ends = samples.iter().filter(|(name, _)| name.starts_with("lorax_requests_total"));
        ends.map(|(_, ended)| ended).sum::<f64>()
    };
    let wanted: f64 = load.count.ends.values().sum();
    let page = poll(async || {
        let page = load.page().await;
        // Gauges are published four times a second.
        let quiet = ["lorax_batch_current_size 0\n", "lorax_adapter_loads_total{result=\"failed\"} 1\n"];
        let published = !page.contains("lorax_adapter_slots{state=\"ready\"} 0\n");
        (sum(&page) >= wanted && published && quiet.iter().all(|line| page.contains(line))).then_some(page)
    })
    .await;
    (page, load.count)
}

/// Answers, failures of each kind, and a client that leaves.
async fn send_all(load: &mut Load) {
    let long = "x".repeat(40);
    load.answered("mail", None, &long, 9).await;
    load.answered("mail", Some("sql"), "y", 5).await;
    load.answered("search", Some("tax"), &long, 4).await;
    load.answered("search", Some("sql"), "short", 20).await;
    // Two slots: one of the others leaves.
    load.answered("search", Some("law"), "z", 3).await;
    load.begin("mail", None);
    load.count.validated += 1.0;
    load.refused("mail", json!({"prompt": "nan", "max_tokens": 3}), 424, "generation").await;
    load.refused("mail", json!({"prompt": 7}), 400, "validation").await;
    load.begin("mail", Some("absent"));
    load.refused("mail", json!({"prompt": "x", "model": "absent"}), 404, "adapter").await;
    load.begin("mail", Some("torn"));
    load.refused("mail", json!({"prompt": "x", "model": "torn"}), 400, "adapter").await;
    load.begin("search", Some("lost"));
    load.count.validated += 1.0;
    load.refused("search", json!({"prompt": "x", "model": "lost"}), 503, "adapter").await;
    load.refused("nobody", json!({"prompt": "x"}), 401, "unauthorized").await;
    cancel(load).await;
}

/// A client leaves while its first step runs.
async fn cancel(load: &mut Load) {
    load.begin("mail", None);
    load.count.validated += 1.0;
    load.router.shard.hold(Gate::Steps);
    let runs =
        load.router.shard.saw(|seen| seen.added().find(|added| added.tokens == tokens("leaves")).map(|_| ()));
    let body = json!({"prompt": "leaves", "max_tokens": 5});
    let headers = [("authorization", "Bearer sk-mail")];
    tokio::select! {
        biased;
        () = runs => {}
        _ = load.router.send_with(Method::POST, "/v1/completions", &headers, &body) => {}
    }
    *load.count.ends.entry("cancelled").or_default() += 1.0;
    let cancelled = "lorax_requests_total{end=\"cancelled\"} 1\n";
    poll(async || load.page().await.contains(cancelled).then_some(())).await;
    load.router.shard.release(&Gate::Steps);
}

/// The values that series must have by the client's own count.
fn expected(count: &Count) -> BTreeMap<String, f64> {
    let mut expected = BTreeMap::new();
    let mut add = |name: String, value: f64| assert!(expected.insert(name, value).is_none());
    for (end, value) in &count.ends {
        add(format!("lorax_requests_total{{end=\"{end}\"}}"), *value);
    }
    for (status, value) in &count.statuses {
        add(format!("lorax_http_responses_total{{route=\"/v1/completions\",status=\"{status}\"}}"), *value);
    }
    for (tenant, [requests, prompt, generated]) in &count.tenants {
        let add = |figure: &str| format!("lorax_tenant_{figure}_total{{tenant=\"{tenant}\"}}");
        let figures = [("requests", requests), ("generated_tokens", generated)];
        for (figure, value) in figures {
            expected.insert(add(figure), *value);
        }
        // That which ended in its first step had a prompt, too.
        let failed = if *tenant == "mail" { tokens("nan").len() as f64 } else { 0.0 };
        expected.insert(add("prompt_tokens"), prompt + failed);
    }
    expected.extend(expected_sums(count));
    expected
}

/// Those of all requests together.
fn expected_sums(count: &Count) -> BTreeMap<String, f64> {
    let mut expected = BTreeMap::new();
    let ended = |end: &str| count.ends.get(end).copied().unwrap_or_default();
    let mut add = |name: &str, value: f64| assert!(expected.insert(name.into(), value).is_none(), "{name}");
    let [_, prompt, generated] =
        count.tenants.values().fold([0.0; 3], |sum, figures| std::array::from_fn(|at| sum[at] + figures[at]));
    let (prompt, good) = (prompt + tokens("nan").len() as f64, ended("length") + ended("eos_token"));
    let vllm = "{model_name=\"base\",engine=\"0\"}";
    let reason = |reason: &str| format!("{},finished_reason=\"{reason}\"}}", &vllm[..vllm.len() - 1]);
    for (own, theirs, value) in [
        ("lorax_prompt_tokens_total", "prompt_tokens_total", prompt),
        ("lorax_cached_prompt_tokens_total", "prefix_cache_hits_total", count.cached),
        ("lorax_request_duration_count", "e2e_request_latency_seconds_count", good),
        ("lorax_request_generated_tokens_count", "request_generation_tokens_count", count.whole),
        ("lorax_request_generated_tokens_sum", "request_generation_tokens_sum", generated),
        ("lorax_request_prefill_duration_count", "request_prefill_time_seconds_count", count.whole),
        ("lorax_request_decode_duration_count", "request_decode_time_seconds_count", count.whole),
        ("lorax_request_inference_duration_count", "request_inference_time_seconds_count", count.whole),
        ("lorax_request_inter_token_duration_count", "inter_token_latency_seconds_count", count.gaps),
        ("lorax_request_input_length_sum", "request_prompt_tokens_sum", prompt),
    ] {
        add(own, value);
        add(&format!("vllm:{theirs}{vllm}"), value);
    }
    for (ends, value) in [
        (reason("stop"), ended("eos_token")),
        (reason("length"), ended("length")),
        (reason("abort"), 1.0),
        (reason("error"), 1.0),
    ] {
        add(&format!("vllm:request_success_total{ends}"), value);
    }
    add("lorax_request_mean_time_per_token_duration_count", count.whole);
    add("lorax_request_validation_duration_count", count.validated);
    add("lorax_request_count", count.ends.values().sum());
    add("lorax_request_success", good);
    add("lorax_request_failure{err=\"load_adapter\"}", ended("adapter"));
    add("lorax_request_failure{err=\"dropped\"}", 1.0);
    add("lorax_adapter_loads_total{result=\"failed\"}", 1.0);
    add("lorax_adapter_loads_total{result=\"ready\"}", 3.0);
    add("lorax_adapter_ask_failures_total{error=\"not_found\"}", 1.0);
    add("lorax_adapter_ask_failures_total{error=\"invalid\"}", 1.0);
    add("lorax_sessions_total", 1.0);
    add("lorax_connected_ranks", 1.0);
    expected
}

#[tokio::test]
async fn every_series_tells_what_the_client_has_counted() {
    let (page, count) = load().await;
    let samples = samples(&page);
    let expected = expected(&count);
    for (name, value) in &expected {
        assert_eq!(samples.get(name), Some(value), "{name} in {page}");
    }
    // Adapters: two by name, and the sum of all is the sum of all.
    for (at, figure) in ["requests", "prompt_tokens", "generated_tokens"].iter().enumerate() {
        let begin = format!("lorax_adapter_{figure}_total{{");
        let all: BTreeMap<_, _> = samples.iter().filter(|(name, _)| name.starts_with(&begin)).collect();
        assert_eq!(all.len(), 3, "{all:?}");
        let sum = count.adapters.values().map(|figures| figures[at]).sum::<f64>();
        assert_eq!(all.values().copied().sum::<f64>(), sum, "{all:?}");
        assert_eq!(samples[&format!("{begin}adapter=\"sql\",source=\"local\"}}")], count.adapters["sql"][at]);
    }
    // A bucket may be empty; anything else at zero shows that it is not counted.
    let zero = samples.iter().filter(|(name, value)| **value == 0.0 && !name.contains("_bucket{"));
    let zero = zero.map(|(name, _)| name).filter(|name| !expected.contains_key(*name));
    let known = |name: &str| ZERO.iter().any(|(begin, _)| name.starts_with(begin));
    let unknown: Vec<_> = zero.filter(|name| !known(name) && !is_rare(name)).collect();
    assert_eq!(unknown, Vec::<&String>::new(), "{page}");
}

/// Ends that this load does not have; the tests of `metrics.rs` show each of them.
fn is_rare(name: &str) -> bool {
    let rare = ["overloaded", "unavailable", "stop_sequence", "session_failures", "tenant=\"other\""];
    rare.iter().any(|end| name.contains(end))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs promtool; it must find nothing wrong.
fn promtool(arguments: &[&str], input: &str) {
    let program = root().join(".cache/promtool/usr/bin/promtool");
    let started = Command::new(&program)
        .args(arguments)
        .current_dir(root())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = started.unwrap_or_else(|error| panic!("{}: {error}: make promtool", program.display()));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
}

#[tokio::test]
async fn promtool_and_the_dashboard_and_the_page_on_metrics_agree_with_the_page() {
    let (page, _) = load().await;
    check_page(&page);
    let typed = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let known: BTreeSet<&str> = typed.map(|line| line.split_once(' ').unwrap().0).collect();
    let document = fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    for name in &known {
        assert!(document.contains(&format!("`{name}`")), "{name} is not in docs/metrics.md");
    }
    let dashboard = fs::read_to_string(root().join("deploy/grafana/lorax.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    let queries = queries(&dashboard);
    assert!(queries.len() > 40, "{}", queries.len());
    let rules = queries
        .iter()
        .enumerate()
        .map(|(number, query)| json!({"record": format!("q{number}"), "expr": query}));
    let rules = json!({"groups": [{"name": "dashboard", "rules": rules.collect::<Vec<_>>()}]});
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), rules.to_string()).unwrap();
    promtool(&["check", "rules", file.path().to_str().unwrap()], "");
    let alerts = fs::read_to_string(root().join("deploy/prometheus/alerts.yml")).unwrap();
    for text in
        queries.iter().map(String::as_str).chain(alerts.lines().filter(|line| !line.contains("summary:")))
    {
        for name in words(text).filter(|word| word.starts_with("lorax_")) {
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            assert!(
                known.contains(name) || base.is_some_and(|base| known.contains(base)),
                "{name} in {text}"
            );
        }
    }
}

#[test]
fn alerts_fire_where_they_should() {
    promtool(&["check", "rules", "deploy/prometheus/alerts.yml"], "");
    promtool(&["test", "rules", "deploy/prometheus/alerts_test.yml"], "");
    let alerts = fs::read_to_string(root().join("deploy/prometheus/alerts.yml")).unwrap();
    let tests = fs::read_to_string(root().join("deploy/prometheus/alerts_test.yml")).unwrap();
    let names: Vec<_> = alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(names.len() > 10, "{names:?}");
    for name in names {
        let tested = tests.matches(&format!("alertname: {name}")).count();
        assert!(tested >= 2, "{name} is not tested to fire and not to fire");
    }
}

#[test]
fn the_dashboards_panels_are_where_they_can_be_seen() {
    let text = fs::read_to_string(root().join("deploy/grafana/lorax.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
    let mut taken = BTreeSet::new();
    for panel in panels {
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().unwrap());
        assert!(x + w <= 24, "{panel}");
        for place in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(taken.insert(place), "{} lies over another", panel["title"]);
        }
        assert!(["row", "stat", "timeseries"].contains(&panel["type"].as_str().unwrap()), "{panel}");
        let targets = panel["targets"].as_array().map_or(&[][..], Vec::as_slice);
        assert_eq!(targets.is_empty(), panel["type"] == "row", "{panel}");
        assert!(targets.iter().all(|target| target["datasource"]["uid"] == "${datasource}"), "{panel}");
    }
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let names: Vec<_> = variables.iter().map(|variable| variable["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["datasource", "job", "instance"]);
}

/// What promtool finds fault with: names that other servers have given, and that their dashboards expect.
fn is_given(complaint: &str) -> bool {
    let name = complaint.split(' ').next().unwrap_or_default();
    name.starts_with("vllm:")
        || ["lorax_request_count", "lorax_request_success", "lorax_request_failure"].contains(&name)
}

/// promtool's check of the page.
fn check_page(page: &str) {
    let program = root().join(".cache/promtool/usr/bin/promtool");
    let started = Command::new(&program)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = started.unwrap_or_else(|error| panic!("{}: {error}: make promtool", program.display()));
    child.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let strange: Vec<&str> = said.lines().filter(|line| !is_given(line)).collect();
    assert_eq!(strange, Vec::<&str>::new(), "{said}");
}

/// The queries of a dashboard, with values in place of its variables.
fn queries(dashboard: &Value) -> Vec<String> {
    let targets =
        dashboard["panels"].as_array().unwrap().iter().filter_map(|panel| panel["targets"].as_array());
    let queries = targets.flatten().map(|target| target["expr"].as_str().unwrap());
    queries
        .map(|query| query.replace("$__rate_interval", "5m").replace("$job", ".*").replace("$instance", ".*"))
        .collect()
}

/// The names in a query.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':').filter(|word| !word.is_empty())
}
