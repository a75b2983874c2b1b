//! Adapters that are merged: into the model's weights at the start, and with each other for a request.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use integration_tests::server::{Server, demo_model, fixtures};
use serde_json::{Value, json};

const PROMPTS: [&str; 3] = [
    "<|im_start|>user\nShow the name of all ships.<|im_end|>\n<|im_start|>assistant\n",
    "Review: The laptop was wonderful.",
    "Once upon a time",
];

fn start(flags: &[&str]) -> Server {
    let own = ["--kv-memory", "64MiB", "--dtype", "float32"];
    let (model, adapters) = (demo_model().unwrap(), fixtures().join("adapters").canonicalize().unwrap());
    Server::start_with(&model, &adapters, &[&own[..], flags].concat()).unwrap()
}

async fn answers(server: &Server, adapter: Option<&str>) -> Vec<Vec<u64>> {
    let mut all = Vec::new();
    for prompt in PROMPTS {
        all.push(server.tokens(adapter, prompt, 12).await.unwrap());
    }
    all
}

/// The model's file is quantized: its blocks are dequantized before the delta is added.
#[tokio::test]
async fn an_adapter_in_the_weights_answers_as_it_does_beside_them() {
    let plain = start(&[]);
    let (base, sql, pirate) = (
        answers(&plain, None).await,
        answers(&plain, Some("sql")).await,
        answers(&plain, Some("pirate")).await,
    );
    assert!(base != sql && base != pirate && sql != pirate);
    drop(plain);
    for more in [&[][..], &["--num-shard", "3"]] {
        let flags = [&["--adapter-id", "sql", "--merge-adapter-weights"], more].concat();
        let merged = start(&flags);
        assert_eq!(answers(&merged, None).await, sql, "{flags:?}");
        // The merged adapter's name, and that of the base model, are the model itself.
        for name in ["sql", "__base_model__", ""] {
            assert_eq!(answers(&merged, Some(name)).await, sql, "{flags:?} {name:?}");
        }
        // Others are loaded as ever, and are added to the merged model.
        let both = answers(&merged, Some("pirate")).await;
        assert!(both != pirate && both != sql, "{flags:?}");
        for (field, words) in [
            ("merged_adapters", "cannot be merged with adapters"),
            ("ensemble", "the base model is part of every ensemble"),
        ] {
            let body = json!({"inputs": "a", "parameters": {field: {"ids": ["sql", "pirate"]}}});
            let refused = merged.post("/generate", &body).await.unwrap();
            assert_eq!(refused.status(), 422);
            let said = refused.text().await.unwrap();
            assert!(said.contains(words), "{said}");
        }
    }
}

/// The tokens of a request that merges adapters.
async fn of_merge(server: &Server, merge: &Value, prompt: &str) -> Vec<u64> {
    let parameters =
        json!({"merged_adapters": merge, "max_new_tokens": 12, "details": true, "ignore_eos_token": true});
    let answer =
        server.post("/generate", &json!({"inputs": prompt, "parameters": parameters})).await.unwrap();
    let status = answer.status();
    let body: Value = answer.json().await.unwrap();
    assert_eq!(status, 200, "{merge}: {body}");
    let tokens = body["details"]["tokens"].as_array().unwrap();
    tokens.iter().map(|token| token["id"].as_u64().unwrap()).collect()
}

/// Merges whose sum is an adapter that is there, by strategies that keep sums exact.
#[tokio::test]
async fn a_merge_for_a_request_is_the_adapter_that_it_sums_to() {
    for more in [&[][..], &["--num-shard", "3"]] {
        let server = start(more);
        let expected = [answers(&server, Some("sql")).await, answers(&server, Some("pirate")).await];
        for (merge, of) in [
            (json!({"ids": ["sql", "sql"], "weights": [0.25, 0.75], "merge_strategy": "cat"}), 0),
            (json!({"ids": ["sql", "pirate"], "weights": [1.0, 0.0], "merge_strategy": "cat"}), 0),
            (
                json!({"ids": ["sql", "pirate", "sql"], "weights": [2.0, 1.0, -2.0], "merge_strategy": "cat"}),
                1,
            ),
            // The square roots of the weights are in A and in B: a half and a half.
            (json!({"ids": ["pirate", "pirate"], "weights": [0.25, 0.25], "merge_strategy": "linear"}), 1),
            (json!({"ids": ["pirate"], "weights": [1.0]}), 1),
            (json!({"ids": ["sql", "sql"], "weights": [1.5, -0.5], "merge_strategy": "svd"}), 0),
        ] {
            for (prompt, expected) in PROMPTS.iter().zip(&expected[of]) {
                assert_eq!(of_merge(&server, &merge, prompt).await, *expected, "{merge} {more:?}");
            }
        }
    }
}
