//! Adapters between their folders, host memory and slots: what is done once, what is bounded, and what is given back.

use std::{collections::BTreeMap, fs, path::Path};

use config::Config;
use futures::future::join_all;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{task::yield_now, time::timeout};

use crate::{
    metrics::{scrape, until},
    router::{FILES, PATIENCE, Router, tokens, write_adapter},
    shard::{Gate, Script, Seen},
};

fn ask(adapter: &str) -> Value {
    json!({"inputs": "x", "parameters": {"adapter_id": adapter, "max_new_tokens": 2}})
}

fn saying_a() -> Script {
    Script::saying(tokens("a").repeat(500))
}

/// A folder with this many adapters, "0" and so on, of 1,000 bytes and a little more each.
fn folder(adapters: usize) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    (0..adapters).for_each(|number| write_adapter(folder.path(), &number.to_string(), 1000));
    folder
}

/// A router whose adapters are in a folder, and whose host memory takes so many of them.
async fn router(script: Script, folder: &Path, held: u64) -> Router {
    Router::start_with(script, |config: &mut Config| {
        config.shard.adapter_dir = Some(folder.into());
        config.shard.adapter_host_memory = held * 1100;
        config.router.max_adapter_size = Some(1100);
        config.router.max_concurrent_requests = 256;
        config.router.max_body_size = 1 << 20;
    })
    .await
}

pub(crate) fn of(samples: &BTreeMap<String, f64>, name: &str) -> f64 {
    samples.get(name).copied().unwrap_or_default()
}

/// Waits until nobody waits for an adapter, has a lease on one, or calls for one.
pub(crate) async fn at_rest(router: &Router) {
    until(router, "at rest", |samples| {
        let busy = samples.iter().filter(|(name, value)| {
            let moving =
                ["asks", "calls"].iter().any(|part| name.starts_with(&format!("lorax_adapter_{part}{{")));
            moving && **value > 0.0
        });
        samples.contains_key("lorax_adapter_asks{state=\"leased\"}") && busy.count() == 0
    })
    .await;
    assert_eq!(*router.failures.lock().unwrap(), []);
}

#[tokio::test]
async fn a_request_asks_once_however_many_sequences_it_has() {
    let folder = folder(1);
    let router = router(saying_a(), folder.path(), 4).await;
    let prompts: Vec<String> = (0..128).map(|number| number.to_string()).collect();
    for stream in [false, true] {
        let body = json!({"model": "0", "prompt": prompts, "max_tokens": 2, "stream": stream});
        let response = timeout(PATIENCE, router.send("/v1/completions", &body)).await.unwrap();
        assert_eq!(response.status(), 200);
        response.bytes().await.unwrap();
    }
    at_rest(&router).await;
    let samples = scrape(&router).await;
    assert_eq!(of(&samples, "lorax_adapter_ask_duration_seconds_count"), 2.0);
    assert_eq!(router.shard.saw(|seen| Some(seen.staged.len())).await, 1);
    assert_eq!(of(&samples, "lorax_adapter_tier_hits_total{tier=\"host\"}"), 1.0);
    assert_eq!(of(&samples, "lorax_adapter_tier_misses_total{tier=\"host\"}"), 1.0);
}

#[tokio::test]
async fn what_many_ask_for_is_read_once() {
    let folder = folder(3);
    let router = router(saying_a(), folder.path(), 4).await;
    router.shard.hold(Gate::Stage("0".into()));
    let bodies: Vec<Value> = (0..50).map(|number| ask(&(number % 2).to_string())).collect();
    let answers = join_all(bodies.iter().map(|body| router.ok("/generate", body)));
    let release = async {
        let all_wait =
            |samples: &BTreeMap<String, f64>| of(samples, "lorax_adapter_asks{state=\"waiting\"}") == 25.0;
        until(&router, "25 that wait", all_wait).await;
        router.shard.release(&Gate::Stage("0".into()));
    };
    timeout(PATIENCE, async { tokio::join!(answers, release) }).await.unwrap();
    assert_eq!(router.shard.saw(|seen| Some(seen.staged.len())).await, 2);
    at_rest(&router).await;
    let samples = scrape(&router).await;
    assert_eq!(of(&samples, "lorax_adapter_call_duration_seconds_count{kind=\"fetch\"}"), 2.0);
    assert_eq!(of(&samples, "lorax_adapter_call_duration_seconds_count{kind=\"stage\"}"), 2.0);
}

#[tokio::test]
async fn one_that_hangs_delays_nobody_else() {
    let folder = folder(40);
    let router = router(saying_a(), folder.path(), 64).await;
    // All that a tenant has permits for.
    let hanging: Vec<String> = (0..4).map(|number| number.to_string()).collect();
    hanging.iter().for_each(|name| router.shard.hold(Gate::Stage(name.clone())));
    let stuck: Vec<_> = hanging.iter().map(|name| router.begin("/generate", &ask(name))).collect();
    let held = |seen: &Seen| (seen.staged.len() >= 4).then_some(());
    router.shard.saw(held).await;
    let healthy: Vec<Value> = (10..40).map(|number| ask(&number.to_string())).collect();
    // Calls that have taken long give their permits back.
    let answers = join_all(healthy.iter().map(|body| router.ok("/generate", body)));
    timeout(PATIENCE, answers).await.unwrap();
    hanging.iter().for_each(|name| router.shard.release(&Gate::Stage(name.clone())));
    for answer in stuck {
        assert_eq!(timeout(PATIENCE, answer).await.unwrap().unwrap().status(), 200);
    }
    at_rest(&router).await;
}

#[tokio::test]
async fn clients_that_leave_give_their_leases_back() {
    let folder = folder(4);
    let router = router(saying_a(), folder.path(), 4).await;
    // While it is staged, while it is copied into a slot, and while it runs.
    for (adapter, gate) in [("0", Gate::Stage("0".into())), ("1", Gate::Load("1".into())), ("2", Gate::Steps)]
    {
        router.shard.hold(gate.clone());
        let leaving = router.begin("/generate", &ask(adapter));
        let reached = |seen: &Seen| {
            let staged = seen.staged.iter().any(|asked| asked.name == adapter);
            let loaded =
                gate == Gate::Stage(adapter.into()) || seen.steps.iter().any(|step| !step.load.is_empty());
            (staged && loaded).then_some(())
        };
        router.shard.saw(reached).await;
        leaving.abort();
        assert!(leaving.await.unwrap_err().is_cancelled());
        until(&router, "no asks", |samples| {
            ["waiting", "leased"]
                .iter()
                .all(|state| of(samples, &format!("lorax_adapter_asks{{state=\"{state}\"}}")) == 0.0)
        })
        .await;
        router.shard.release(&gate);
        router.ok("/generate", &ask(adapter)).await;
    }
    at_rest(&router).await;
    router.holds(0).await;
}

#[tokio::test]
async fn leases_end_with_their_session() {
    let folder = folder(4);
    let mut script = saying_a();
    script.info.max_sequences = 1;
    let router = router(script, folder.path(), 4).await;
    for (adapter, gate) in [("0", Gate::Load("0".into())), ("1", Gate::Steps)] {
        router.shard.hold(gate.clone());
        // One that is on its way, and one that waits in the queue.
        let answers: Vec<_> =
            [adapter, adapter].map(|adapter| router.begin("/generate", &ask(adapter))).into();
        let leased =
            |samples: &BTreeMap<String, f64>| of(samples, "lorax_adapter_asks{state=\"leased\"}") >= 1.0;
        until(&router, "a lease", leased).await;
        router.shard.break_stream();
        for answer in answers {
            let response = timeout(PATIENCE, answer).await.unwrap().unwrap();
            assert_eq!(response.status(), 503);
            assert_eq!(response.json::<Value>().await.unwrap()["error_type"], "unavailable");
        }
        router.shard.release(&gate);
        router.health(200, "").await;
        router.ok("/generate", &ask(adapter)).await;
        at_rest(&router).await;
    }
    // What was in host memory has been taken over.
    assert_eq!(router.shard.saw(|seen| Some(seen.staged.len())).await, 2);
}

#[tokio::test]
async fn an_ask_outlives_a_session_that_is_lost_while_it_waits() {
    let folder = folder(1);
    let router = router(saying_a(), folder.path(), 4).await;
    let gate = Gate::Stage("0".into());
    router.shard.hold(gate.clone());
    let waiting = router.begin("/generate", &ask("0"));
    router.shard.saw(|seen| (!seen.staged.is_empty()).then_some(())).await;
    router.shard.break_stream();
    router.shard.saw(|seen| (seen.sessions.len() == 2).then_some(())).await;
    router.shard.saw(|seen| (seen.staged.len() == 2).then_some(())).await;
    router.shard.release(&gate);
    assert_eq!(timeout(PATIENCE, waiting).await.unwrap().unwrap().status(), 200);
    at_rest(&router).await;
}

#[tokio::test]
async fn host_memory_is_bounded_and_more_adapters_take_turns() {
    const HELD: u64 = 4;
    for (adapters, slots) in [(8, 2), (40, 3), (40, 8)] {
        let folder = folder(adapters);
        let mut script = saying_a();
        script.info.num_slots = slots;
        let router = router(script, folder.path(), HELD).await;
        let bodies: Vec<Value> =
            (0..3 * adapters).map(|number| ask(&(number % adapters).to_string())).collect();
        let answers = join_all(bodies.iter().map(|body| router.ok("/generate", body)));
        for answer in timeout(4 * PATIENCE, answers).await.unwrap() {
            assert_eq!(answer["generated_text"], "aa");
        }
        at_rest(&router).await;
        let most = router.shard.saw(|seen| Some(seen.most_held)).await;
        assert!(most as u64 <= HELD, "{most} of {adapters} at the same time");
        let samples = scrape(&router).await;
        assert!(
            of(&samples, "lorax_adapter_tier_evictions_total{tier=\"host\"}")
                >= (adapters - HELD as usize) as f64
        );
        assert_eq!(of(&samples, "lorax_adapter_tier_bytes{state=\"reserved\",tier=\"host\"}"), 0.0);
    }
}

#[tokio::test]
async fn an_adapter_that_is_larger_than_it_may_be_is_refused_with_both_numbers() {
    let folder = folder(1);
    write_adapter(folder.path(), "large", 2000);
    let router = router(saying_a(), folder.path(), 4).await;
    let (status, body) = router.post("/generate", &ask("large")).await;
    assert_eq!((status.as_u16(), &body["error_type"]), (424, &json!("generation")), "{body}");
    let error = body["error"].as_str().unwrap();
    for words in ["adapter \"large\"", "takes 2016 bytes", "room for 1100"] {
        assert!(error.contains(words), "{words} in {error}");
    }
    let body = json!({"model": "large", "prompt": "x", "max_tokens": 1});
    let (status, body) = router.post("/v1/completions", &body).await;
    assert_eq!((status.as_u16(), &body["error"]["code"]), (424, &json!("adapter_unavailable")), "{body}");
    assert_eq!(router.shard.saw(|seen| Some(seen.staged.len())).await, 0);
    router.ok("/generate", &ask("0")).await;
    at_rest(&router).await;
}

#[tokio::test]
async fn an_adapter_of_absurd_size_is_refused_without_a_flag_before_it_is_read() {
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    // Host memory, and the largest adapter that it takes.
    for (host, largest) in [
        (1100, 1100),
        (MIB, MIB),
        (100 * MIB, 100 * MIB),
        (511 * MIB, 511 * MIB),
        (512 * MIB, 512 * MIB),
        (513 * MIB, 512 * MIB),
        (GIB, 512 * MIB),
        (2 * GIB, 512 * MIB),
        (3 * GIB, 768 * MIB),
        (4 * GIB, GIB),
        (24 * GIB, 6 * GIB),
        (1024 * GIB, 256 * GIB),
    ] {
        let folder = folder(1);
        let router = Router::start_with(saying_a(), |config: &mut Config| {
            config.shard.adapter_dir = Some(folder.path().into());
            config.shard.adapter_host_memory = host;
        })
        .await;
        let capacity = router.get("/v1/adapters/capacity").await.json::<Value>().await.unwrap();
        assert_eq!(capacity["max_adapter_bytes"], largest, "{host}");
        // A file with nothing in it but a hole. To read it would take longer than this test may.
        for (name, bytes) in [("above", largest), ("absurd", (4 * largest).max(1 << 40))] {
            write_adapter(folder.path(), name, 1);
            let weights =
                fs::File::options().write(true).open(folder.path().join(name).join(FILES[1])).unwrap();
            weights.set_len(bytes).unwrap();
            let (status, body) = timeout(PATIENCE, router.post("/generate", &ask(name))).await.unwrap();
            assert_eq!((status.as_u16(), &body["error_type"]), (424, &json!("generation")), "{host}: {body}");
            let error = body["error"].as_str().unwrap();
            assert!(error.contains(&format!("room for {largest}")), "{host}: {error}");
        }
        assert_eq!(router.shard.saw(|seen| Some(seen.staged.len())).await, 0, "{host}");
        router.ok("/generate", &ask("0")).await;
    }
}

#[tokio::test]
async fn a_folder_that_changes_is_another_adapter_and_what_runs_keeps_the_old_one() {
    let folder = folder(1);
    let router = router(saying_a(), folder.path(), 4).await;
    let slow = json!({"inputs": "old", "parameters": {"adapter_id": "0", "max_new_tokens": 50}});
    router.ok("/generate", &ask("0")).await;
    router.shard.hold(Gate::Steps);
    let old = router.begin("/generate", &slow);
    let prompt = tokens("old");
    let added = |seen: &Seen| {
        seen.added().find(|new| new.tokens == prompt).map(|new| new.members.first().map(|member| member.slot))
    };
    let old_slot = router.shard.saw(added).await;
    let weights = folder.path().join("0/adapter_model.safetensors");
    for change in 1..=10 {
        // Rewritten, and replaced, by files of the same size.
        let bytes = vec![change; 1000];
        if change % 2 == 0 {
            fs::write(&weights, bytes).unwrap();
        } else {
            fs::write(weights.with_extension("new"), bytes).unwrap();
            fs::rename(weights.with_extension("new"), &weights).unwrap();
        }
        router.shard.hold(Gate::Steps);
        let new = router.begin("/generate", &ask("0"));
        let staged = usize::from(change) + 1;
        router.shard.saw(|seen| (seen.staged.len() == staged).then_some(())).await;
        router.shard.release(&Gate::Steps);
        assert_eq!(timeout(PATIENCE, new).await.unwrap().unwrap().status(), 200, "change {change}");
        let slot = router
            .shard
            .saw(|seen| seen.added().last().map(|new| new.members.first().map(|member| member.slot)))
            .await;
        if change == 1 {
            assert_ne!(slot, old_slot);
        }
    }
    assert_eq!(timeout(PATIENCE, old).await.unwrap().unwrap().status(), 200);
    let contents = router.shard.saw(|seen| {
        Some(seen.staged.iter().map(|asked| asked.content.clone()).collect::<std::collections::BTreeSet<_>>())
    });
    assert_eq!(contents.await.len(), 11);
    at_rest(&router).await;
}

#[tokio::test]
async fn nothing_is_left_of_a_thousand_requests_whoever_leaves() {
    const REQUESTS: usize = 1000;
    let folder = folder(12);
    fs::remove_file(folder.path().join("11/adapter_config.json")).unwrap();
    let mut script = saying_a();
    script.info.num_slots = 3;
    let router = router(script, folder.path(), 5).await;
    let mut random = StdRng::seed_from_u64(15);
    let mut running = Vec::new();
    let mut answered = 0;
    for number in 0..REQUESTS {
        // The last two of these cannot be had.
        let adapter = random.random_range(0..13).to_string();
        let request = router.begin("/generate", &ask(&adapter));
        running.push((adapter.parse::<u32>().unwrap() < 11, request));
        if number % 40 == 39 {
            for (good, request) in running.drain(..) {
                if random.random_bool(0.4) {
                    request.abort();
                } else {
                    let status = timeout(PATIENCE, request).await.unwrap().unwrap().status();
                    assert_eq!(status == 200, good, "{status}");
                    answered += 1;
                }
            }
        }
        // Some get on before the next one comes.
        for _ in 0..random.random_range(0..20) {
            yield_now().await;
        }
        if number == REQUESTS / 2 {
            at_rest_but(&router, running.len()).await;
        }
    }
    assert!(answered > REQUESTS / 3, "{answered}");
    drop(running);
    at_rest(&router).await;
    router.holds(0).await;
}

/// Waits until no more than so many asks are under way.
async fn at_rest_but(router: &Router, most: usize) {
    until(router, "few asks", |samples| {
        let asks = ["waiting", "leased"]
            .map(|state| of(samples, &format!("lorax_adapter_asks{{state=\"{state}\"}}")));
        asks.iter().sum::<f64>() <= most as f64
    })
    .await;
}

#[tokio::test]
async fn a_recorded_run_is_decided_in_the_same_way_when_it_is_played_again() {
    let (folder, traces) = (folder(10), tempfile::tempdir().unwrap());
    let path = traces.path().join("trace");
    let mut script = saying_a();
    script.info.num_slots = 3;
    let router = Router::start_with(script, |config: &mut Config| {
        config.shard.adapter_dir = Some(folder.path().into());
        config.shard.adapter_host_memory = 4 * 1100;
        config.router.max_adapter_size = Some(1100);
        config.router.adapter_trace = Some(path.clone());
    })
    .await;
    let names: Vec<String> = (0..12).map(|number| number.to_string()).collect();
    let bodies: Vec<Value> = (0..60).map(|number| ask(&names[number * 7 % 12])).collect();
    join_all(bodies.iter().map(|body| router.post("/generate", body))).await;
    let token = json!({"inputs": "x", "parameters": {"adapter_id": "1", "api_token": "hf_secret"}});
    router.ok("/generate", &token).await;
    router.shard.break_stream();
    router.shard.saw(|seen| (seen.sessions.len() == 2).then_some(())).await;
    router.health(200, "").await;
    router.ok("/generate", &ask("2")).await;
    at_rest(&router).await;
    // The last line may be under way.
    let trace = crate::router::poll(async || {
        let trace = fs::read_to_string(&path).unwrap();
        trace.contains("attached").then_some(trace)
    });
    let trace = timeout(PATIENCE, trace).await.unwrap();
    let whole = trace.rfind('\n').map_or("", |end| &trace[..=end]);
    let last_input = whole.rfind("\n>").map_or(0, |start| start + 1);
    let replayed = exchange::trace::replay(&whole[..last_input]).unwrap();
    replayed.check();
    assert!(whole.lines().count() > 200, "{} lines", whole.lines().count());
    for words in ["ask", "stage", "unstage", "evict", "detached", "release", "not_found"] {
        assert!(words == "evict" || whole.contains(&format!(" {words}")), "{words}");
    }
    assert!(!whole.contains("hf_secret") && !whole.contains(folder.path().to_str().unwrap()));
}
