//! Ensembles: what the shards are told of several adapters in one request, and which requests are refused.

use proto::Member;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    router::{Router, tokens, write_adapter},
    shard::Script,
};

/// A router for adapters "a" to "e".
async fn router() -> (Router, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    ["a", "b", "c", "d", "e"].iter().for_each(|name| write_adapter(folder.path(), name, 1000));
    let path = folder.path().to_owned();
    let in_folder = move |config: &mut config::Config| {
        config.shard.adapter_dir = Some(path);
        config.shard.adapter_host_memory = 100_000;
    };
    (Router::start_with(Script::saying(tokens("a")), in_folder).await, folder)
}

/// The adapters of the sequence that was added last, with their weights.
async fn last_members(router: &Router) -> Vec<(String, f32)> {
    let members = router.shard.saw(|seen| seen.added().last().map(|new| new.members.clone())).await;
    let slots = router.shard.slots();
    members.iter().map(|&Member { slot, weight }| (slots[&slot].clone(), weight)).collect()
}

#[tokio::test]
async fn shards_are_told_the_members_and_their_weights() {
    let (router, _folder) = router().await;
    let cases: [(Value, &[(&str, f32)]); 11] = [
        (json!({"ids": ["a"]}), &[("a", 1.0)]),
        (json!({"ids": ["a"], "weights": [0.5]}), &[("a", 0.5)]),
        (json!({"ids": ["a", "b"]}), &[("a", 1.0), ("b", 1.0)]),
        (json!({"ids": ["b", "a"], "weights": null}), &[("b", 1.0), ("a", 1.0)]),
        (json!({"ids": ["a", "b"], "weights": [0.25, -2]}), &[("a", 0.25), ("b", -2.0)]),
        (json!({"ids": ["c", "a"], "weights": [0, 1e-3]}), &[("c", 0.0), ("a", 0.001)]),
        (json!({"ids": ["a", "b", "c"], "weights": [1, 2, 3]}), &[("a", 1.0), ("b", 2.0), ("c", 3.0)]),
        (json!({"ids": ["d", "c", "b", "a"]}), &[("d", 1.0), ("c", 1.0), ("b", 1.0), ("a", 1.0)]),
        (json!({"ids": ["a", "a"], "weights": [0.5, 0.25]}), &[("a", 0.75)]),
        (json!({"ids": ["a", "b", "a"], "weights": [2, 1, -1]}), &[("a", 1.0), ("b", 1.0)]),
        (json!({"ids": ["e", "e"], "weights": [0.5, 0.5]}), &[("e", 1.0)]),
    ];
    for (ensemble, expected) in cases {
        let expected: Vec<_> = expected.iter().map(|&(name, weight)| (name.to_owned(), weight)).collect();
        let parameters = json!({"ensemble": ensemble, "max_new_tokens": 1});
        router.ok("/generate", &json!({"inputs": "x", "parameters": parameters})).await;
        assert_eq!(last_members(&router).await, expected, "{ensemble}");
        let body = json!({"model": "", "prompt": "x", "max_tokens": 1, "ensemble": ensemble});
        router.ok("/v1/completions", &body).await;
        assert_eq!(last_members(&router).await, expected, "{ensemble}");
    }
    assert_eq!(*router.failures.lock().unwrap(), []);
}

#[tokio::test]
async fn ensembles_that_cannot_be_are_refused_by_name() {
    let (router, _folder) = router().await;
    for (ensemble, words) in [
        (json!({"ids": []}), "`ensemble.ids` must have 1 to 4 elements. Given: 0"),
        (json!({"ids": ["a", "b", "c", "d", "e"]}), "`ensemble.ids` must have 1 to 4 elements. Given: 5"),
        (json!({"ids": ["a"], "weights": []}), "`ensemble.weights` must have as many elements as `ids`, 1"),
        (json!({"ids": ["a"], "weights": [1, 2]}), "`ensemble.weights` must have as many elements"),
        (json!({"ids": ["a", "b"], "weights": [1]}), "`ensemble.weights` must have as many elements"),
        (json!({"ids": ["a", "b"], "weights": [1, 1e39]}), "`ensemble.weights` must have a sum"),
        (json!({"ids": ["a", "b"], "weights": [-1e300, 1]}), "`ensemble.weights` must have a sum"),
        // Each of them fits, and their sum does not.
        (json!({"ids": ["a", "a"], "weights": [3e38, 3e38]}), "`ensemble.weights` must have a sum"),
        (json!({"ids": ["a", "a"], "weights": [-3e38, -3e38]}), "`ensemble.weights` must have a sum"),
        (json!({"ids": ["a", "b"], "weights": [1.7e308, 1.7e308]}), "`ensemble.weights` must have a sum"),
        (json!({"ids": ["a", "b"], "weights": [1, "NaN"]}), "ensemble.weights"),
        (json!({"ids": ["a", "b"], "weights": [1, null]}), "ensemble.weights"),
        (json!({"ids": ["a", ""]}), "`ensemble.ids` has \"\""),
        (json!({"ids": ["__base_model__"]}), "`ensemble.ids` has \"__base_model__\""),
        (json!({"ids": ["a", "b"], "merge_strategy": "cat"}), "ensemble.merge_strategy"),
        (json!({"ids": ["a", "b"], "density": 0.5}), "ensemble.density"),
        (json!({"weights": [1]}), "ids"),
        (json!(["a", "b"]), "ensemble"),
    ] {
        let parameters = json!({"ensemble": ensemble, "max_new_tokens": 1});
        let (status, body) =
            router.post("/generate", &json!({"inputs": "x", "parameters": parameters})).await;
        let error = body["error"].as_str().unwrap_or_default();
        assert!(status.is_client_error() && error.contains(words), "{ensemble}: {status} {error}");
        let body = json!({"model": "", "prompt": "x", "max_tokens": 1, "ensemble": ensemble});
        let (status, body) = router.post("/v1/completions", &body).await;
        let error = body["error"]["message"].as_str().unwrap_or_default();
        assert!(status.is_client_error() && error.contains(words), "{ensemble}: {status} {error}");
    }
    let two = json!({"ids": ["a", "b"]});
    for (field, value) in [("adapter_id", json!("c")), ("merged_adapters", two.clone())] {
        let mut parameters = json!({"ensemble": two, "max_new_tokens": 1});
        parameters[field] = value;
        let (status, body) =
            router.post("/generate", &json!({"inputs": "x", "parameters": parameters})).await;
        let error = body["error"].as_str().unwrap_or_default();
        assert!(status.is_client_error() && error.contains("`ensemble` cannot be given beside"), "{error}");
        assert!(error.contains(field), "{error}");
    }
    let body = json!({"model": "", "prompt": "x", "max_tokens": 1, "ensemble": {"ids": ["a", "nowhere"]}});
    let (status, body) = router.post("/v1/completions", &body).await;
    assert_eq!(status.as_u16(), 404);
    assert!(body["error"]["message"].as_str().unwrap().contains("nowhere"), "{body}");
}

#[tokio::test]
async fn a_member_may_have_the_name_of_its_registration() {
    let (router, _folder) = router().await;
    for (id, adapter) in [("first", "a"), ("b", "c"), ("team/é", "d")] {
        router.ok("/v1/adapters", &json!({"id": id, "adapter_id": adapter})).await;
    }
    for (ids, expected) in [
        (json!(["first", "e"]), &[("a", 1.0), ("e", 1.0)][..]),
        (json!(["e", "first"]), &[("e", 1.0), ("a", 1.0)]),
        // Two names of one adapter.
        (json!(["first", "a"]), &[("a", 2.0)]),
        // A registration goes before a folder of the same name.
        (json!(["b", "e"]), &[("c", 1.0), ("e", 1.0)]),
        (json!(["team/é", "first", "b"]), &[("d", 1.0), ("a", 1.0), ("c", 1.0)]),
    ] {
        let expected: Vec<_> = expected.iter().map(|&(name, weight)| (name.to_owned(), weight)).collect();
        let parameters = json!({"ensemble": {"ids": ids}, "max_new_tokens": 1});
        router.ok("/generate", &json!({"inputs": "x", "parameters": parameters})).await;
        assert_eq!(last_members(&router).await, expected, "{ids}");
    }
    // With a source, it is the name there.
    let parameters = json!({"ensemble": {"ids": ["first", "e"]}, "adapter_source": "local"});
    let (status, body) = router.post("/generate", &json!({"inputs": "x", "parameters": parameters})).await;
    assert_eq!((status.as_u16(), &body["error_type"]), (404, &json!("adapter_not_found")), "{body}");
}
