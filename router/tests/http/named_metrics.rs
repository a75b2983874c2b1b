//! Series of `GET /metrics` with the names of adapters and tenants.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{
    metrics::{samples, scrape, until},
    router::{Router, tokens},
    shard::Script,
};

fn generate(adapter: Option<&str>, new: usize) -> Value {
    json!({"inputs": "xyz", "parameters": {"adapter_id": adapter, "max_new_tokens": new}})
}

/// The series of a metric, by their labels.
fn series(samples: &BTreeMap<String, f64>, name: &str) -> BTreeMap<String, f64> {
    let found = samples.iter().filter_map(|(series, value)| {
        let labels = series.strip_prefix(name)?.strip_prefix('{')?.strip_suffix('}')?;
        Some((labels.to_owned(), *value))
    });
    found.collect()
}

fn script() -> Script {
    Script::answering(|_| tokens("abc").repeat(500))
}

#[tokio::test]
async fn the_adapters_that_are_used_most_are_shown_by_name_and_the_others_together() {
    let router = Router::start_with(script(), |config| config.router.metrics_top = 2).await;
    let prompt = tokens("xyz").len() as f64;
    let adapter = |name: &str| format!("adapter=\"{name}\",source=\"local\"");
    let other = "adapter=\"other\",source=\"\"".to_owned();
    let mut last = [0.0; 2];
    let mut sent = 0.0;
    for (name, count, new) in [("sql", 3, 5), ("tax", 2, 4), ("law", 6, 3), ("other", 1, 2), ("e", 1, 1)] {
        for _ in 0..count {
            router.ok("/generate", &generate(Some(name), new)).await;
            sent += 1.0;
        }
        let samples = scrape(&router).await;
        let requests = series(&samples, "lorax_adapter_requests_total");
        assert!(requests.len() <= 3, "{requests:?}");
        assert_eq!(requests.values().sum::<f64>(), sent, "{requests:?}");
        let others = ["requests", "generated_tokens"];
        let others = others.map(|figure| samples[&format!("lorax_adapter_{figure}_total{{{other}}}")]);
        assert!(others >= last, "{others:?} {last:?}");
        last = others;
    }
    router.post("/generate", &generate(Some("absent"), 1)).await;
    router.ok("/generate", &generate(None, 7)).await;
    let samples = scrape(&router).await;
    // What does not exist is not named, and the base model is no adapter.
    let requests = series(&samples, "lorax_adapter_requests_total");
    let expected = [(adapter("law"), 6.0), (adapter("sql"), 3.0), (other.clone(), 5.0)];
    assert_eq!(requests, BTreeMap::from(expected));
    let generated = series(&samples, "lorax_adapter_generated_tokens_total");
    let expected = [(adapter("law"), 18.0), (adapter("sql"), 15.0), (other.clone(), 11.0)];
    assert_eq!(generated, BTreeMap::from(expected));
    let prompts = series(&samples, "lorax_adapter_prompt_tokens_total");
    let expected = [(adapter("law"), 6.0 * prompt), (adapter("sql"), 3.0 * prompt), (other, 4.0 * prompt)];
    assert_eq!(prompts, BTreeMap::from(expected));
    assert!(series(&samples, "lorax_adapter_queue_seconds_total").values().all(|seconds| *seconds > 0.0));
    let running = series(&samples, "lorax_adapter_running_requests");
    assert_eq!(running, BTreeMap::from([(adapter("law"), 0.0), (adapter("sql"), 0.0)]));
    // All that one tenant has used.
    let tenant = |figure: &str| samples[&format!("lorax_tenant_{figure}_total{{tenant=\"anonymous\"}}")];
    assert_eq!((tenant("requests"), tenant("generated_tokens")), (15.0, 51.0));
    assert_eq!(tenant("prompt_tokens"), 14.0 * prompt);
}

#[tokio::test]
async fn only_the_administrator_sees_the_names_of_tenants_and_what_they_use() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.json");
    let names = ["mail", "other", "a \"quoted\"\\ name\n"];
    let keys =
        names.iter().enumerate().map(|(key, name)| json!({"key": format!("sk-{key}"), "tenant": name}));
    fs::write(&file, json!({"keys": keys.collect::<Vec<_>>()}).to_string()).unwrap();
    for admin in [false, true] {
        let router = Router::start_with(script(), |config| {
            config.router.api_key_file = Some(file.clone());
            config.router.admin_token = admin.then(|| "root".into());
        })
        .await;
        let read = async |key: &str| {
            let header = format!("Bearer {key}");
            let headers = [("authorization", &*header)];
            router.send_with(Method::GET, "/metrics", &headers, &Value::Null).await
        };
        for (key, count) in [("sk-0", 3), ("sk-1", 2), ("sk-2", 1)] {
            for _ in 0..count {
                let header = format!("Bearer {key}");
                let headers = [("authorization", &*header)];
                let sent =
                    router.send_with(Method::POST, "/generate", &headers, &generate(Some("sql"), 4)).await;
                assert_eq!(sent.status(), 200);
                sent.text().await.unwrap();
            }
        }
        for key in ["sk-0", "sk-1", "sk-2"] {
            let page = read(key).await.text().await.unwrap();
            assert!(page.contains("lorax_requests_total") && page.contains("vllm:num_requests_running"));
            for name in ["mail", "quoted", "sql", "lorax_tenant_", "lora_requests_info"] {
                assert!(!page.contains(name), "{key} sees {name}");
            }
        }
        let all = read("root").await;
        if !admin {
            assert_eq!(all.status(), StatusCode::UNAUTHORIZED);
            continue;
        }
        let page = all.text().await.unwrap();
        let requests = series(&samples(&page), "lorax_tenant_requests_total");
        // One with the name of the others together is among them.
        let expected = [
            ("tenant=\"a \\\"quoted\\\"\\\\ name\\n\"".to_owned(), 1.0),
            ("tenant=\"mail\"".to_owned(), 3.0),
            ("tenant=\"other\"".to_owned(), 2.0),
        ];
        assert_eq!(requests, BTreeMap::from(expected));
        assert!(
            page.contains("lorax_adapter_requests_total{adapter=\"sql\",source=\"local\"} 6\n"),
            "{page}"
        );
    }
}

/// The labels of `vllm:lora_requests_info` as llm-d's router reads them: of the series with the highest value, of which
/// there is one here, the lists are split at commas and trimmed.
fn lora_gauge(page: &str) -> (f64, usize, BTreeSet<String>, BTreeSet<String>) {
    let lines: Vec<_> = page.lines().filter(|line| line.starts_with("vllm:lora_requests_info{")).collect();
    let [line] = lines[..] else { panic!("{lines:?}") };
    let (labels, value) = line.rsplit_once(' ').unwrap();
    let label = |name: &str| {
        let (_, rest) = labels.split_once(&format!("{name}=\"")).unwrap();
        rest.split_once('"').unwrap().0
    };
    let list = |name: &str| {
        let names = label(name).split(',').map(|name| name.trim().to_owned());
        names.filter(|name| !name.is_empty()).collect()
    };
    let lists = (list("running_lora_adapters"), list("waiting_lora_adapters"));
    (value.parse().unwrap(), label("max_lora").parse().unwrap(), lists.0, lists.1)
}

#[tokio::test]
async fn the_lora_gauge_names_residents_and_those_that_requests_wait_for() {
    let mut script = script();
    (script.info.num_slots, script.pace) = (2, Some(Duration::from_millis(10)));
    let router = Router::start_with(script, |config| {
        config.router.preloaded_adapter_ids = vec!["pirate".into()];
    })
    .await;
    let page = async || router.get("/metrics").await.text().await.unwrap();
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    let begun = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    for name in ["sql", "tax"] {
        router.ok("/v1/completions", &json!({"model": name, "prompt": "x", "max_tokens": 2})).await;
    }
    let (at, max_lora, resident, waiting) = lora_gauge(&page().await);
    assert!((begun..begun + 600.0).contains(&at), "{at}");
    assert_eq!((max_lora, resident, waiting), (2, set(&["sql", "tax"]), set(&[])));
    // One that there is no room for, while both slots are in use.
    let run = async |name: &str, new: u32| {
        let body = json!({"model": name, "prompt": "x", "max_tokens": new});
        assert_eq!(router.send("/v1/completions", &body).await.status(), 200);
    };
    let running = async || {
        until(&router, "two that run", |samples| samples["lorax_batch_current_size"] == 2.0).await;
    };
    let waits = async {
        until(&router, "law waits", |samples| {
            samples.contains_key("lorax_queue_length")
                && samples.keys().any(|name| name.contains("waiting_lora_adapters=\"law\""))
        })
        .await;
        let page = page().await;
        let (_, _, resident, waiting) = lora_gauge(&page);
        assert_eq!((resident, waiting), (set(&["sql", "tax"]), set(&["law"])));
        let loaded = series(&samples(&page), "vllm:lora_adapter_loaded");
        let has = |name: &str, level: &str, pinned: bool| {
            let labels = format!("adapter_name=\"{name}\",level=\"{level}\",pinned=\"{pinned}\",rank=\"");
            loaded.keys().any(|known| known.contains(&labels))
        };
        for name in ["sql", "tax"] {
            assert!(has(name, "gpu", false) && has(name, "cpu", false), "{loaded:?}");
        }
        assert!(has("pirate", "cpu", true), "{loaded:?}");
        assert!(has("law", "cpu", false) && !has("law", "gpu", false), "{loaded:?}");
    };
    let third = async {
        running().await;
        tokio::join!(run("law", 2), waits);
    };
    tokio::join!(run("sql", 300), run("tax", 300), third);
    check_gauges(&scrape(&router).await);
}

/// Gauges of two slots that are full, after three loads.
fn check_gauges(samples: &BTreeMap<String, f64>) {
    let vllm = |name: &str| {
        let found = samples.iter().find(|(series, _)| series.starts_with(&format!("vllm:{name}{{")));
        *found.unwrap_or_else(|| panic!("{name}")).1
    };
    assert_eq!((vllm("max_gpu_lora_adapters"), vllm("num_gpu_loaded_lora_adapters")), (2.0, 2.0));
    assert!(vllm("num_cpu_loaded_lora_adapters") >= 3.0);
    assert_eq!(vllm("lora_adapter_load_seconds_count"), 3.0);
    let config = series(samples, "vllm:cache_config_info");
    let [labels] = config.keys().collect::<Vec<_>>()[..] else { panic!("{config:?}") };
    let blocks: f64 = ["free", "cached", "used"]
        .iter()
        .map(|state| samples[&format!("lorax_kv_blocks{{state=\"{state}\"}}")])
        .sum();
    assert!(
        labels.contains(&format!("num_gpu_blocks=\"{blocks}\"")) && labels.contains("block_size=\""),
        "{labels}"
    );
}
