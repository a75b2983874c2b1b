//! Adapters of a hub: who may read them, what is kept on the disk, and what a hub that fails does to others.

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use config::Config;
use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use sources::HubSettings;
use tempfile::TempDir;
use tokio::time::timeout;

use crate::{
    exchange::{at_rest, of},
    fake::{Fault, On, Repository, Server},
    metrics::scrape,
    router::{FILES, PATIENCE, Router, poll, tokens},
    shard::Script,
};

/// The time that a hub has for an answer, and for the next bytes of a file.
const HUB_PATIENCE: Duration = Duration::from_millis(500);
/// Bytes of the weights of every adapter.
const WEIGHTS: usize = 2000;

/// The configuration and the weights of an adapter.
fn contents(name: &str) -> (String, Vec<u8>) {
    (json!({"name": name}).to_string(), name.bytes().cycle().take(WEIGHTS).collect())
}

fn repository(name: &str) -> Repository {
    let (text, weights) = contents(name);
    let [config, file] = FILES;
    Repository::new(&[(config, text.as_bytes()), (file, &weights), ("README.md", b"-")])
}

fn settings(url: &str) -> HubSettings {
    HubSettings {
        endpoint: url.into(),
        token: None,
        cache: None,
        offline: false,
        answer: HUB_PATIENCE,
        bytes: HUB_PATIENCE,
    }
}

fn folder() -> Arc<TempDir> {
    Arc::new(tempfile::tempdir().unwrap())
}

async fn start(hub: HubSettings, folder: Arc<TempDir>, change: impl FnOnce(&mut Config)) -> Router {
    let change = |config: &mut Config| {
        config.router.adapter_source = Some("hub".into());
        config.router.max_concurrent_requests = 256;
        change(config);
    };
    Router::start_at_hub(Script::saying(tokens("a").repeat(20)), hub, folder, change).await
}

fn ask(id: &str, token: Option<&str>) -> Value {
    json!({"inputs": "x", "parameters": {"adapter_id": id, "api_token": token, "max_new_tokens": 1}})
}

fn local(id: &str) -> Value {
    json!({"inputs": "x", "parameters": {"adapter_id": id, "adapter_source": "local", "max_new_tokens": 1}})
}

/// The tokens that were shown to the hub with questions for the description of a repository.
fn shown(hub: &Server, id: &str) -> Vec<String> {
    let path = format!("/api/models/{id}");
    let asked = hub.asked().into_iter().filter(|asked| asked.path.starts_with(&path));
    asked.map(|asked| asked.token().unwrap_or_default().to_owned()).collect()
}

/// Sends requests of all routes that name an adapter, each another one that is like `repository`, and returns the
/// credentials that the hub was shown for each.
async fn credentials(
    (router, hub): (&Router, &Server),
    repository: &Repository,
    headers: &[(&str, &str)],
    api_token: Option<&str>,
) -> Vec<Vec<String>> {
    let mut all = Vec::new();
    for route in ["/generate", "/v1/completions", "/v1/chat/completions"] {
        // A failure is remembered for a second.
        let id = format!("org/{}", uuid::Uuid::new_v4());
        hub.put(&id, repository.clone());
        let message = json!([{"role": "user", "content": "x"}]);
        let body = match route {
            "/generate" => ask(&id, api_token),
            "/v1/completions" => json!({"model": id, "prompt": "x", "max_tokens": 1, "api_token": api_token}),
            _ => json!({"model": id, "messages": message, "max_tokens": 1, "api_token": api_token}),
        };
        let answer = router.send_with(Method::POST, route, headers, &body).await;
        // A body that is not read might not be complete.
        answer.bytes().await.unwrap();
        all.push(shown(hub, &id));
    }
    all
}

#[tokio::test]
async fn with_keys_a_key_is_never_shown_to_the_source_of_an_adapter() {
    let hub = Server::start();
    let keys = |config: &mut Config| config.router.api_keys = vec!["sk-first".into()];
    let router = start(settings(&hub.url), folder(), keys).await;
    let both = (&router, &hub);
    for token in ["hub", "body"] {
        hub.know(token);
    }
    let (key, header) = (("authorization", "Bearer sk-first"), ("x-adapter-token", "hub"));
    let public = repository("public");
    assert_eq!(credentials(both, &public, &[key], None).await, vec![vec![""]; 3]);
    assert_eq!(credentials(both, &public, &[key, header], None).await, vec![vec!["hub"]; 3]);
    assert_eq!(credentials(both, &public, &[key], Some("body")).await, vec![vec!["body"]; 3]);
    assert_eq!(credentials(both, &public, &[key, header], Some("body")).await, vec![vec!["body"]; 3]);
    let private = repository("private").readable_by(&["somebody"]);
    assert_eq!(credentials(both, &private, &[key], None).await, vec![vec![""]; 3]);
}

#[tokio::test]
async fn without_keys_a_bearer_token_is_shown_to_a_source_that_refuses_without_it() {
    let hub = Server::start();
    let router = start(settings(&hub.url), folder(), |_| {}).await;
    let both = (&router, &hub);
    for token in ["EMPTY", "none", "sk-no-key-required", "real"] {
        let header = format!("bearer {token}");
        let all = credentials(both, &repository("public"), &[("authorization", &header)], None).await;
        assert_eq!(all, vec![vec![""]; 3], "{token}: it was not needed");
    }
    let private = repository("private").readable_by(&["real"]);
    let header = ("authorization", "Bearer real");
    for token in ["hub", "body"] {
        hub.know(token);
    }
    assert_eq!(credentials(both, &private, &[header], None).await, vec![vec!["", "real"]; 3]);
    assert_eq!(credentials(both, &private, &[], None).await, vec![vec![""]; 3]);
    assert_eq!(credentials(both, &private, &[header], Some("body")).await, vec![vec!["body"]; 3]);
    let given = [header, ("x-adapter-token", "hub")];
    assert_eq!(credentials(both, &private, &given, None).await, vec![vec!["hub"]; 3]);
    let broken = Repository::new(&[("README.md", b"no adapter")]);
    let all = credentials(both, &broken, &[header], None).await;
    assert_eq!(all, vec![vec![""]; 3], "a token mends no broken adapter");
}

#[tokio::test]
async fn a_bad_token_is_refused_whatever_is_here_and_touches_nobody_else() {
    let hub = Server::start();
    hub.put("org/private", repository("private").readable_by(&["good"]));
    let router = start(settings(&hub.url), folder(), |_| {}).await;
    router.ok("/generate", &ask("org/private", Some("good"))).await;
    let bodies: Vec<(bool, Value)> = (0..60)
        .map(|number| match number % 3 {
            0 => (true, ask("org/private", Some("good"))),
            1 => (false, ask("org/private", Some(&format!("bad-{number}")))),
            _ => (false, ask("org/private", None)),
        })
        .collect();
    let answers =
        join_all(bodies.iter().map(async |(good, body)| (*good, router.post("/generate", body).await)));
    for (good, (status, body)) in timeout(PATIENCE, answers).await.unwrap() {
        assert_eq!(status == 200, good, "{status}: {body}");
        assert!(good || [404, 424].contains(&status.as_u16()), "{status}: {body}");
        assert!(!body.to_string().contains("bad-"), "{body}");
    }
    router.ok("/generate", &ask("org/private", Some("good"))).await;
    assert_eq!(router.shard.saw(|seen| Some(seen.staged.len())).await, 1);
    at_rest(&router).await;
}

#[tokio::test]
async fn the_time_of_a_refusal_does_not_tell_whether_an_adapter_is_here() {
    const PAIRS: usize = 40;
    let hub = Server::start();
    hub.put("org/here", repository("here").readable_by(&["good"]));
    let router = start(settings(&hub.url), folder(), |_| {}).await;
    router.ok("/generate", &ask("org/here", Some("good"))).await;
    let mut times = [Vec::new(), Vec::new()];
    for pair in 0..PAIRS {
        for (which, id) in ["org/here", "org/none"].into_iter().enumerate() {
            let body = ask(id, Some(&format!("bad-{pair}")));
            let began = Instant::now();
            let (status, _) = router.post("/generate", &body).await;
            times[which].push(began.elapsed());
            assert!([404, 424].contains(&status.as_u16()), "{status}");
        }
    }
    times.iter_mut().for_each(|times| times.sort_unstable());
    let [here, none] = times;
    let difference = here[PAIRS / 2].abs_diff(none[PAIRS / 2]);
    let noise = (here[PAIRS * 3 / 4] - here[PAIRS / 4]).max(none[PAIRS * 3 / 4] - none[PAIRS / 4]);
    println!("medians {:?} and {:?}, noise {noise:?}", here[PAIRS / 2], none[PAIRS / 2]);
    assert!(difference <= noise + Duration::from_millis(1), "{difference:?} of {noise:?}");
}

#[tokio::test]
async fn what_many_ask_for_is_looked_up_and_downloaded_once() {
    let hub = Server::start();
    hub.put("org/one", repository("one"));
    let router = start(settings(&hub.url), folder(), |_| {}).await;
    let body = ask("org/one", None);
    let answers = join_all((0..30).map(|_| router.ok("/generate", &body)));
    timeout(PATIENCE, answers).await.unwrap();
    let asked = hub.asked();
    let count = |part: &str| asked.iter().filter(|asked| asked.path.contains(part)).count();
    assert_eq!((count("/api/models/"), count("/resolve/")), (1, 2), "{asked:#?}");
    // The answer is used again for a while.
    router.ok("/generate", &body).await;
    assert_eq!(hub.asked().len(), 0);
    at_rest(&router).await;
}

/// Bytes of the files in a folder and below it.
fn bytes_in(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let bytes = entries.flatten().map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => bytes_in(&entry.path()),
        _ => entry.metadata().map_or(0, |data| data.len()),
    });
    bytes.sum()
}

/// Returns whether the adapter of a repository is in a router's cache.
fn is_on_disk(folder: &Path, id: &str) -> bool {
    let files = tempfile::tempdir().unwrap();
    let [config, file] = FILES.map(|name| files.path().join(name));
    let (text, weights) = contents(id);
    fs::write(&config, text).unwrap();
    fs::write(&file, weights).unwrap();
    let [config, file] = [config, file].map(|path| fs::File::open(path).unwrap());
    let content = store::content_of(&[(FILES[0], &config), (FILES[1], &file)]).unwrap();
    let name: String = content.iter().map(|byte| format!("{byte:02x}")).collect();
    folder.join("adapter-cache/contents").join(name).exists()
}

#[tokio::test]
async fn the_disk_is_bounded_and_outlives_the_router() {
    const ADAPTERS: usize = 10;
    const ROOM: u64 = 4 * (WEIGHTS as u64 + 30);
    let (hub, folder) = (Server::start(), folder());
    let ids: Vec<String> = (0..ADAPTERS).map(|number| format!("org/a{number}")).collect();
    ids.iter().for_each(|id| hub.put(id, repository(id)));
    let few = |config: &mut Config| {
        config.router.adapter_cache_size = ROOM;
        config.shard.adapter_host_memory = 8 << 20;
    };
    let router = start(settings(&hub.url), folder.clone(), few).await;
    let bodies: Vec<Value> = ids.iter().map(|id| ask(id, None)).collect();
    timeout(PATIENCE, join_all(bodies.iter().map(|body| router.ok("/generate", body)))).await.unwrap();
    at_rest(&router).await;
    let samples = scrape(&router).await;
    let used = of(&samples, "lorax_adapter_tier_bytes{tier=\"disk\",state=\"used\"}");
    assert!(used > 0.0 && used <= ROOM as f64, "{used}");
    assert!(of(&samples, "lorax_adapter_tier_evictions_total{tier=\"disk\"}") >= (ADAPTERS - 4) as f64);
    let published = bytes_in(&folder.path().join("adapter-cache/contents"));
    // Each entry has a record of some hundred bytes beside its files.
    assert!(published > WEIGHTS as u64 && published < 2 * ROOM, "{published}");
    drop(router);
    // Another router finds what is there.
    let there = ids.iter().find(|id| is_on_disk(folder.path(), id)).unwrap();
    hub.asked();
    let router = start(settings(&hub.url), folder.clone(), few).await;
    let copies = of(&scrape(&router).await, "lorax_adapter_tier_copies{tier=\"disk\"}");
    assert!((1.0..=4.0).contains(&copies), "{copies}");
    router.ok("/generate", &ask(there, None)).await;
    assert_eq!(of(&scrape(&router).await, "lorax_adapter_tier_hits_total{tier=\"disk\"}"), 1.0);
    assert!(hub.asked().iter().all(|asked| asked.path.starts_with("/api/")));
    for body in &bodies {
        router.ok("/generate", body).await;
    }
    at_rest(&router).await;
    drop(router);
    // A hub that must not be asked is not asked for what is there.
    hub.asked();
    let offline = HubSettings { offline: true, ..settings(&hub.url) };
    let router = start(offline, folder, few).await;
    let mut served = 0;
    for id in &ids {
        let (status, body) = router.post("/generate", &ask(id, None)).await;
        assert!([200, 424].contains(&status.as_u16()), "{body}");
        served += usize::from(status == 200);
    }
    assert!((1..=4).contains(&served), "{served}");
    assert_eq!(hub.asked().len(), 0);
    at_rest(&router).await;
}

#[tokio::test]
async fn a_hub_that_fails_delays_only_those_who_name_it() {
    let secret = "hf_secret";
    for (case, (on, fault, status)) in [
        (On::Api, Fault::Silence, 424),
        (On::Api, Fault::Close, 424),
        (On::Api, Fault::Status(500), 424),
        (On::Api, Fault::Status(429), 424),
        (On::Api, Fault::Echo(503), 424),
        (On::Api, Fault::Text("not JSON".into()), 422),
        (On::File, Fault::Silence, 424),
        (On::File, Fault::Status(502), 424),
        (On::Storage, Fault::Silence, 424),
        (On::Storage, Fault::Stall(0.5), 424),
        (On::Storage, Fault::Cut(0.5), 424),
        (On::Storage, Fault::Length(1 << 40), 424),
        (On::Storage, Fault::Twice, 424),
    ]
    .into_iter()
    .enumerate()
    {
        let hub = Server::start();
        hub.know(secret);
        hub.put("org/failing", repository("failing"));
        let router = start(settings(&hub.url), folder(), |_| {}).await;
        hub.fail(on, fault.clone(), 1000);
        let failing = router.begin("/generate", &ask("org/failing", Some(secret)));
        for name in ["sql", "law", "warm", "sql"] {
            timeout(HUB_PATIENCE * 4, router.ok("/generate", &local(name))).await.unwrap();
        }
        let answer = timeout(PATIENCE, failing).await.unwrap().unwrap();
        let got = answer.status().as_u16();
        let body: Value = answer.json().await.unwrap();
        assert_eq!(got, status, "case {case}, {fault:?}: {body}");
        let error = body["error"].as_str().unwrap();
        assert!(error.contains("org/failing") && !error.contains(secret), "case {case}: {error}");
        // It is remembered for a while, and not for ever.
        let (again, _) = router.post("/generate", &ask("org/failing", Some(secret))).await;
        assert_eq!(again.as_u16(), status, "case {case}, {fault:?}");
        hub.recover();
        let recovered = poll(async || {
            let (status, _) = router.post("/generate", &ask("org/failing", Some(secret))).await;
            (status == 200).then_some(())
        });
        timeout(PATIENCE, recovered).await.unwrap();
        at_rest(&router).await;
    }
}

#[tokio::test]
async fn one_that_is_huge_is_refused_before_a_byte_is_read() {
    let hub = Server::start();
    hub.put("org/huge", repository("huge"));
    let small = |config: &mut Config| config.router.max_adapter_size = Some(WEIGHTS as u64);
    let router = start(settings(&hub.url), folder(), small).await;
    let (status, body) = router.post("/generate", &ask("org/huge", None)).await;
    assert_eq!(status.as_u16(), 424, "{body}");
    assert!(body["error"].as_str().unwrap().contains("room for 2000"), "{body}");
    assert!(hub.asked().iter().all(|asked| asked.path.starts_with("/api/")));
    at_rest(&router).await;
}

#[tokio::test]
async fn one_reference_that_hangs_delays_no_other_of_its_hub() {
    let hub = Server::start();
    let ids: Vec<String> = (0..20).map(|number| format!("org/a{number}")).collect();
    ids.iter().for_each(|id| hub.put(id, repository(id)));
    let slow = HubSettings { answer: PATIENCE, bytes: PATIENCE, ..settings(&hub.url) };
    let router = start(slow, folder(), |_| {}).await;
    hub.fail(On::Storage, Fault::Drip, 1);
    hub.fail(On::Api, Fault::Silence, 1);
    let hanging = router.begin("/generate", &ask("org/a0", None));
    timeout(PATIENCE, poll(async || (!hub.asked().is_empty()).then_some(()))).await.unwrap();
    // Its bytes come one by one, for 40 seconds.
    let dripping = router.begin("/generate", &ask("org/a1", None));
    let storage = poll(async || hub.asked().iter().any(|asked| asked.query.contains("X-Amz")).then_some(()));
    timeout(PATIENCE, storage).await.unwrap();
    let bodies: Vec<Value> = ids[2..].iter().map(|id| ask(id, None)).collect();
    let answers = join_all(bodies.iter().map(|body| router.ok("/generate", body)));
    timeout(Duration::from_secs(10), answers).await.unwrap();
    assert!(!hanging.is_finished() && !dripping.is_finished());
    hanging.abort();
    dripping.abort();
}
