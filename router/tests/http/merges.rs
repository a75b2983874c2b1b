//! Merges of adapters: what the shards are told, and which requests are refused.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::symlink,
    path::Path,
};

use config::Config;
use proto::{
    Merge, StageRequest,
    merge::{MajoritySign, Strategy},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::timeout;
use tonic::Status;

use crate::{
    metrics::until,
    router::{PATIENCE, Router, tokens, write_adapter},
    shard::{Gate, Script, Seen},
};

/// A folder with adapters "a" to "h".
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    ["a", "b", "c", "d", "e", "f", "g", "h"].iter().for_each(|name| write_adapter(folder.path(), name, 1000));
    folder
}

async fn router(folder: &Path, change: impl FnOnce(&mut Script)) -> Router {
    let mut script = Script::saying(tokens("a"));
    change(&mut script);
    let in_folder = |config: &mut Config| {
        config.shard.adapter_dir = Some(folder.into());
        config.shard.adapter_host_memory = 100_000;
    };
    Router::start_with(script, in_folder).await
}

fn ask(merged: Value) -> Value {
    json!({"inputs": "x", "parameters": {"merged_adapters": merged, "max_new_tokens": 1}})
}

/// The last stage that a shard has seen.
async fn last_stage(router: &Router) -> StageRequest {
    router.shard.saw(|seen| seen.staged.last().cloned()).await
}

async fn stages(router: &Router) -> usize {
    router.shard.saw(|seen| Some(seen.staged.len())).await
}

/// Waits until nobody has or wants a lease.
async fn at_rest(router: &Router) {
    until(router, "no asks", |samples: &BTreeMap<String, f64>| {
        let asks = |state: &str| samples.get(&format!("lorax_adapter_asks{{state=\"{state}\"}}")).copied();
        asks("waiting") == Some(0.0) && asks("leased") == Some(0.0)
    })
    .await;
    assert_eq!(*router.failures.lock().unwrap(), []);
}

fn merge(strategy: Strategy, density: Option<f64>) -> Merge {
    Merge { strategy: strategy.into(), density, ..Merge::default() }
}

/// What a request says, and the weights and the recipe that the shards are told.
fn recipes() -> Vec<(Value, Vec<f64>, Merge)> {
    vec![
        (json!({"ids": ["a", "b"]}), vec![1.0, 1.0], merge(Strategy::Linear, None)),
        (json!({"ids": ["a", "b"], "weights": [0.7, -0.3]}), vec![0.7, -0.3], merge(Strategy::Linear, None)),
        (
            json!({"ids": ["a", "b", "c"], "weights": [1, 2, 0], "merge_strategy": "ties", "density": 0.2}),
            vec![1.0, 2.0, 0.0],
            merge(Strategy::Ties, Some(0.2)),
        ),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "ties", "density": 1, "majority_sign_method": "frequency"}),
            vec![1.0, 1.0],
            Merge { majority_sign: MajoritySign::Frequency.into(), ..merge(Strategy::Ties, Some(1.0)) },
        ),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "dare_linear", "density": 0.7}),
            vec![1.0, 1.0],
            merge(Strategy::DareLinear, Some(0.7)),
        ),
        (
            json!({"ids": ["b", "a"], "merge_strategy": "dare_ties", "density": 0.7, "seed": u64::MAX}),
            vec![1.0, 1.0],
            Merge { seed: u64::MAX, ..merge(Strategy::DareTies, Some(0.7)) },
        ),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "magnitude_prune", "density": 1e-3}),
            vec![1.0, 1.0],
            merge(Strategy::MagnitudePrune, Some(1e-3)),
        ),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "cat", "weights": null, "density": null, "seed": null}),
            vec![1.0, 1.0],
            merge(Strategy::Cat, None),
        ),
        (json!({"ids": ["c", "c"], "merge_strategy": "cat"}), vec![1.0, 1.0], merge(Strategy::Cat, None)),
        (json!({"ids": ["c"], "weights": [-2]}), vec![-2.0], merge(Strategy::Linear, None)),
    ]
}

/// The same of strategies that end with a singular value decomposition.
fn svd_recipes() -> Vec<(Value, Vec<f64>, Merge)> {
    vec![
        (json!({"ids": ["a", "b"], "merge_strategy": "svd"}), vec![1.0, 1.0], merge(Strategy::Svd, None)),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "svd", "svd_rank": 4}),
            vec![1.0, 1.0],
            Merge { svd_rank: 4, ..merge(Strategy::Svd, None) },
        ),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "ties_svd", "density": 0.4, "seed": 3,
                "majority_sign_method": "frequency"}),
            vec![1.0, 1.0],
            Merge { majority_sign: MajoritySign::Frequency.into(), ..merge(Strategy::TiesSvd, Some(0.4)) },
        ),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "dare_linear_svd", "density": 0.4, "seed": 3}),
            vec![1.0, 1.0],
            Merge { seed: 3, ..merge(Strategy::DareLinearSvd, Some(0.4)) },
        ),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "dare_ties_svd", "density": 0.4, "svd_rank": 2}),
            vec![1.0, 1.0],
            Merge { svd_rank: 2, ..merge(Strategy::DareTiesSvd, Some(0.4)) },
        ),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "magnitude_prune_svd", "density": 0.4, "svd_rank": 2}),
            vec![1.0, 1.0],
            Merge { svd_rank: 2, ..merge(Strategy::MagnitudePruneSvd, Some(0.4)) },
        ),
    ]
}

#[tokio::test]
async fn shards_are_told_of_what_and_how_an_adapter_is_merged() {
    let folder = folder();
    let router = router(folder.path(), |_| {}).await;
    let mut contents = BTreeSet::new();
    for (merged, weights, expected) in recipes().into_iter().chain(svd_recipes()) {
        assert_eq!(router.ok("/generate", &ask(merged.clone())).await["generated_text"], "a", "{merged}");
        let staged = last_stage(&router).await;
        let names: Vec<&str> = staged.parts.iter().map(|part| &*part.name).collect();
        let ids: Vec<&str> =
            merged["ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap()).collect();
        assert_eq!((&names, &staged.name), (&ids, &ids.join(", ")));
        assert_eq!(staged.parts.iter().map(|part| part.weight).collect::<Vec<_>>(), weights);
        assert_eq!(staged.merge, Some(expected), "{merged}");
        for part in &staged.parts {
            assert_eq!(Path::new(&part.folder), folder.path().canonicalize().unwrap().join(&part.name));
            let files: Vec<&str> = part.files.iter().map(|file| &*file.name).collect();
            assert_eq!(files, ["adapter_config.json", "adapter_model.safetensors"]);
            assert!(part.files.iter().all(|file| file.stamp.is_some()));
        }
        assert!(contents.insert(staged.content), "{merged} is like another one");
    }
    at_rest(&router).await;
}

#[tokio::test]
async fn every_route_merges() {
    let folder = folder();
    let router = router(folder.path(), |_| {}).await;
    let merged = json!({"ids": ["a", "b"], "weights": [0.5, 0.5]});
    let message = json!([{"role": "user", "content": "x"}]);
    let parameters = json!({"merged_adapters": merged, "adapter_id": null, "max_new_tokens": 1});
    let bodies = [
        ("/generate", json!({"inputs": "x", "parameters": parameters})),
        ("/generate_stream", json!({"inputs": "x", "parameters": parameters})),
        ("/", json!({"inputs": "x", "parameters": parameters})),
        ("/v1/completions", json!({"prompt": "x", "max_tokens": 1, "merged_adapters": merged})),
        (
            "/v1/completions",
            json!({"model": "", "prompt": ["x", "y"], "max_tokens": 1, "merged_adapters": merged}),
        ),
        (
            "/v1/completions",
            json!({"prompt": "x", "stream": true, "max_tokens": 1, "merged_adapters": merged}),
        ),
        ("/v1/chat/completions", json!({"messages": message, "max_tokens": 1, "merged_adapters": merged})),
    ];
    for (route, body) in bodies {
        let response = timeout(PATIENCE, router.send(route, &body)).await.unwrap();
        assert_eq!(response.status(), 200, "{route}");
        if route.starts_with("/generate") {
            assert_eq!(response.headers()["x-adapter-id"], "a,b");
            assert_eq!(response.headers()["x-adapter-source"], "local");
        }
        response.bytes().await.unwrap();
        assert_eq!(router.shard.last_adapter().await.unwrap(), "a, b");
    }
    // Its size was not known before. It was merged once.
    assert_eq!(stages(&router).await, 2);
    at_rest(&router).await;
}

#[tokio::test]
async fn equal_merges_are_one_whatever_names_led_there() {
    let folder = folder();
    symlink(folder.path().join("a"), folder.path().join("alias")).unwrap();
    for (copy, of) in [("copy", "a"), ("another", "b")] {
        fs::create_dir(folder.path().join(copy)).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(folder.path().join(of).join(file), folder.path().join(copy).join(file)).unwrap();
        }
    }
    let router = router(folder.path(), |_| {}).await;
    router.ok("/generate", &ask(json!({"ids": ["a", "b"]}))).await;
    let (first, count) = (last_stage(&router).await.content, stages(&router).await);
    for same in [
        json!({"ids": ["alias", "b"]}),
        json!({"ids": ["copy", "b"]}),
        json!({"ids": ["a", "another"], "weights": [1.0, 1.0]}),
        json!({"ids": ["copy", "another"], "merge_strategy": "linear"}),
        json!({"ids": ["a", "b"], "density": 0.0}),
        json!({"ids": ["a", "b"], "density": 0.5, "majority_sign_method": "frequency", "seed": 3, "svd_rank": 9}),
    ] {
        router.ok("/generate", &ask(same.clone())).await;
        assert_eq!(stages(&router).await, count, "{same}");
    }
    for other in [
        json!({"ids": ["b", "a"]}),
        json!({"ids": ["a", "b"], "weights": [1.0, 1.0001]}),
        json!({"ids": ["a", "b"], "merge_strategy": "cat"}),
    ] {
        router.ok("/generate", &ask(other.clone())).await;
        assert_ne!(last_stage(&router).await.content, first, "{other}");
    }
    // A part that changes makes another merge.
    write_adapter(folder.path(), "b", 999);
    router.ok("/generate", &ask(json!({"ids": ["a", "b"]}))).await;
    assert_ne!(last_stage(&router).await.content, first);
    at_rest(&router).await;
}

/// What a request says, and words of the refusal.
#[tokio::test]
async fn a_part_may_have_the_name_of_its_registration() {
    let folder = folder();
    let router = router(folder.path(), |_| {}).await;
    for (id, adapter) in [("first", "a"), ("b", "c"), ("team/é", "d")] {
        router.ok("/v1/adapters", &json!({"id": id, "adapter_id": adapter})).await;
    }
    for (ids, of) in [
        (json!(["first", "e"]), json!(["a", "e"])),
        (json!(["e", "first"]), json!(["e", "a"])),
        (json!(["first", "first"]), json!(["a", "a"])),
        // A registration goes before a folder of the same name.
        (json!(["b", "e"]), json!(["c", "e"])),
        (json!(["team/é", "first", "b"]), json!(["d", "a", "c"])),
    ] {
        router.ok("/generate", &ask(json!({"ids": of}))).await;
        let before = stages(&router).await;
        router.ok("/generate", &ask(json!({"ids": ids}))).await;
        assert_eq!(stages(&router).await, before, "{ids} is the merge of {of}");
    }
    // With a source, it is the name there.
    let mut asked = ask(json!({"ids": ["first", "e"]}));
    asked["parameters"]["adapter_source"] = json!("local");
    let (status, body) = router.post("/generate", &asked).await;
    assert_eq!((status.as_u16(), &body["error_type"]), (404, &json!("adapter_not_found")), "{body}");
    at_rest(&router).await;
}

fn nonsense() -> Vec<(Value, &'static str)> {
    let many: Vec<&str> = ["a"; 33].into();
    vec![
        (json!({}), "missing field `merged_adapters.ids`"),
        (json!([]), "`merged_adapters`: "),
        (json!("a,b"), "`merged_adapters`: "),
        (json!({"ids": []}), "`merged_adapters.ids` must have 1 to 32 elements. Given: 0"),
        (json!({"ids": many}), "`merged_adapters.ids` must have 1 to 32 elements. Given: 33"),
        (json!({"ids": "a"}), "`merged_adapters.ids`: invalid type: string \"a\", expected a list"),
        (json!({"ids": ["a", 1]}), "`merged_adapters.ids[1]`: invalid type: "),
        (json!({"ids": ["a", ""]}), "`merged_adapters.ids` has \"\": the base model cannot"),
        (json!({"ids": ["__base_model__", "a"]}), "`merged_adapters.ids` has \"__base_model__\""),
        (
            json!({"ids": ["a", "b"], "weights": [1]}),
            "`merged_adapters.weights` must have as many elements as `ids`",
        ),
        (
            json!({"ids": ["a"], "weights": [1, 2]}),
            "`merged_adapters.weights` must have as many elements as `ids`",
        ),
        (json!({"ids": ["a"], "weights": ["1"]}), "`merged_adapters.weights[0]`: invalid type: string"),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "svd_ties"}),
            "`merged_adapters.merge_strategy`: unknown",
        ),
        (json!({"ids": ["a", "b"], "merge_strategy": "TIES"}), "`merged_adapters.merge_strategy`: unknown"),
        (json!({"ids": ["a", "b"], "merge_strategy": ""}), "`merged_adapters.merge_strategy`: unknown"),
        (
            json!({"ids": ["a", "b"], "majority_sign_method": "most"}),
            "`merged_adapters.majority_sign_method`: unknown variant `most`",
        ),
    ]
}

/// The same, of numbers.
fn bad_numbers() -> Vec<(Value, &'static str)> {
    vec![
        (json!({"ids": ["a", "b"], "merge_strategy": "ties"}), "`merged_adapters.density` must be given"),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "dare_linear", "density": null}),
            "`merged_adapters.density` must be given",
        ),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "ties", "density": 0}),
            "`merged_adapters.density` must be above 0 and at most 1. Given: 0",
        ),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "dare_ties", "density": 0.0}),
            "`merged_adapters.density` must be above 0",
        ),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "dare_ties", "density": -0.5}),
            "`merged_adapters.density` must be above 0",
        ),
        (
            json!({"ids": ["a", "b"], "merge_strategy": "ties", "density": 1.0000001}),
            "`merged_adapters.density` must be above 0 and at most 1. Given: 1.0000001",
        ),
        (
            json!({"ids": ["a", "b"], "density": 20}),
            "`merged_adapters.density` must be above 0 and at most 1",
        ),
        (
            json!({"ids": ["a", "b"], "density": "half"}),
            "`merged_adapters.density`: invalid type: string \"half\", \
          expected a number",
        ),
        (json!({"ids": ["a", "b"], "svd_rank": 0}), "`merged_adapters.svd_rank` must be at least 1"),
        (
            json!({"ids": ["a", "b"], "svd_rank": 65537}),
            "`merged_adapters.svd_rank` must be at least 1 and at most",
        ),
        (json!({"ids": ["a", "b"], "svd_rank": -1}), "`merged_adapters.svd_rank`: invalid value"),
        (json!({"ids": ["a", "b"], "seed": -1}), "`merged_adapters.seed`: invalid value"),
        (json!({"ids": ["a", "b"], "svd_clamp": 0.9}), "`merged_adapters.svd_clamp` is not supported"),
    ]
}

#[tokio::test]
async fn recipes_that_make_no_sense_are_refused_by_their_field() {
    let folder = folder();
    let router = router(folder.path(), |_| {}).await;
    for (merged, words) in nonsense().into_iter().chain(bad_numbers()) {
        let (status, body) = router.post("/generate", &ask(merged.clone())).await;
        let error = body["error"].as_str().unwrap();
        assert_eq!(status.as_u16(), 422, "{merged}: {error}");
        assert!(error.contains(words), "{merged}: {words} in {error}");
        let body = json!({"prompt": "x", "max_tokens": 1, "merged_adapters": merged});
        let (status, body) = router.post("/v1/completions", &body).await;
        let error = body["error"]["message"].as_str().unwrap();
        assert_eq!(status.as_u16(), 400, "{merged}: {error}");
        assert!(error.contains(words), "{merged}: {words} in {error}");
    }
    assert_eq!(stages(&router).await, 0);
}

#[tokio::test]
async fn an_adapter_beside_a_merge_is_refused() {
    let folder = folder();
    let router = router(folder.path(), |_| {}).await;
    let merged = json!({"ids": ["a", "b"]});
    let parameters = json!({"merged_adapters": merged, "adapter_id": "c"});
    let (status, body) = router.post("/generate", &json!({"inputs": "x", "parameters": parameters})).await;
    assert_eq!(status.as_u16(), 422);
    assert!(
        body["error"]
            .as_str()
            .unwrap()
            .contains("`merged_adapters` cannot be given beside an adapter in `adapter_id`")
    );
    for (field, words) in [("model", "`model`"), ("adapter_id", "`adapter_id`")] {
        let mut body = json!({"prompt": "x", "merged_adapters": merged});
        body[field] = json!("c");
        let (status, body) = router.post("/v1/completions", &body).await;
        let error = body["error"]["message"].as_str().unwrap();
        assert_eq!(status.as_u16(), 400, "{error}");
        assert!(
            error.contains("`merged_adapters` cannot be given beside") && error.contains(words),
            "{error}"
        );
    }
    for base in ["", "__base_model__"] {
        let parameters = json!({"merged_adapters": merged, "adapter_id": base, "max_new_tokens": 1});
        router.ok("/generate", &json!({"inputs": "x", "parameters": parameters})).await;
        assert_eq!(router.shard.last_adapter().await.unwrap(), "a, b");
    }
}

#[tokio::test]
async fn faults_name_the_part_that_they_are_about() {
    let folder = folder();
    symlink("/", folder.path().join("outside")).unwrap();
    fs::create_dir(folder.path().join("empty")).unwrap();
    let bad = |script: &mut Script| {
        let refused = Status::invalid_argument("adapter a, c: linear merges equal ranks only");
        script.unstageable.insert("a, c", refused);
        script.unstageable.insert("a, d", Status::unavailable("no memory"));
        script.gone.insert("a, e");
    };
    let router = router(folder.path(), bad).await;
    let cases = [
        (json!(["a", "nowhere"]), 404, "nowhere"),
        (json!(["nowhere", "a"]), 404, "nowhere"),
        (json!(["a", "outside/etc"]), 424, "outside/etc"),
        (json!(["a", "empty"]), 422, "empty"),
        (json!(["a", "../a"]), 422, "../a"),
        (json!(["a", "c"]), 422, "adapter a, c: linear merges equal ranks only"),
        (json!(["a", "d"]), 503, "no memory"),
        (json!(["a", "e"]), 424, "adapter \"a,e\""),
    ];
    for (ids, code, words) in cases {
        let (status, body) = router.post("/generate", &ask(json!({"ids": ids}))).await;
        let error = body["error"].as_str().unwrap_or_default();
        assert!(error.contains(words), "{ids}: {words} in {body}");
        assert_eq!(status.as_u16(), code, "{ids}: {body}");
        // The others are none the worse for it.
        router.ok("/generate", &ask(json!({"ids": ["a", "b"]}))).await;
    }
    at_rest(&router).await;
}

#[tokio::test]
async fn nothing_is_left_of_merges_whose_clients_leave() {
    let folder = folder();
    let router = router(folder.path(), |_| {}).await;
    let gate = Gate::Stage("a, b".into());
    for _ in 0..5 {
        router.shard.hold(gate.clone());
        let before = stages(&router).await;
        let leaving = router.begin("/generate", &ask(json!({"ids": ["a", "b"], "weights": [before, 1]})));
        router.shard.saw(|seen: &Seen| (seen.staged.len() > before).then_some(())).await;
        // Others do not wait for it.
        router.ok("/generate", &ask(json!({"ids": ["b", "a"]}))).await;
        leaving.abort();
        assert!(leaving.await.unwrap_err().is_cancelled());
        router.shard.release(&gate);
        at_rest(&router).await;
    }
}

#[tokio::test]
async fn a_merge_outlives_a_session_that_is_lost_while_it_waits() {
    let folder = folder();
    let router = router(folder.path(), |_| {}).await;
    let gate = Gate::Stage("a, b".into());
    router.shard.hold(gate.clone());
    let waiting = router.begin("/generate", &ask(json!({"ids": ["a", "b"]})));
    router.shard.saw(|seen| (!seen.staged.is_empty()).then_some(())).await;
    router.shard.break_stream();
    router.shard.saw(|seen| (seen.sessions.len() == 2 && seen.staged.len() == 2).then_some(())).await;
    router.shard.release(&gate);
    assert_eq!(timeout(PATIENCE, waiting).await.unwrap().unwrap().status(), 200);
    at_rest(&router).await;
}
