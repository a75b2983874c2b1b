//! Seeded models that embed or classify behind a whole server: what sentence-transformers and transformers' pipelines make
//! of the same texts, and LoRAX's own client.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use integration_tests::server::{Server, fixtures};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Most that a score, or an element of a vector, may differ.
const BAR: f64 = 1e-4;

#[derive(Deserialize)]
struct Vectors {
    vectors: Vec<Vector>,
}

#[derive(Deserialize)]
struct Vector {
    text: String,
    vector: Vec<f64>,
}

#[derive(Deserialize)]
struct Classified {
    cases: Vec<Case>,
}

/// A text, and what a pipeline has found in it.
#[derive(Deserialize)]
struct Case {
    text: String,
    found: Vec<Value>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn fixture(name: &str) -> PathBuf {
    fixtures().join("encoders/served").join(name)
}

/// Runs a script with the Python packages of the tests.
fn python(script: &str, args: &[&OsStr]) {
    let python = root().join("../.venv/bin/python");
    assert!(python.exists(), "{} is missing: make venv", python.display());
    let status = Command::new(python).arg(root().join(script)).args(args).status();
    assert!(status.unwrap().success(), "{script}");
}

/// A server of a fixture, whose weights are made by formula, and the folder of its model.
fn start(name: &str) -> (Server, TempDir) {
    let made = tempfile::tempdir().unwrap();
    let from = fixture(name);
    python("fixtures/families/seeded.py", &[from.join("model.json").as_ref(), made.path().as_ref()]);
    copy(&from, made.path());
    (Server::start_with(made.path(), &fixtures().join("adapters"), &["--dtype", "float32"]).unwrap(), made)
}

/// Copies what lies beside the manifest.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to),
            false if ["model.json", "goldens.json"].contains(&entry.file_name().to_str().unwrap()) => {}
            false => drop(fs::copy(entry.path(), to).unwrap()),
        }
    }
}

fn goldens<T: for<'a> Deserialize<'a>>(name: &str) -> T {
    serde_json::from_slice(&fs::read(fixture(name).join("goldens.json")).unwrap()).unwrap()
}

async fn ok(server: &Server, path: &str, body: &Value) -> Value {
    let response = server.post(path, body).await.unwrap();
    let (status, answer) = (response.status(), response.json::<Value>().await.unwrap());
    assert_eq!(status, 200, "{path}: {answer}");
    answer
}

fn check(text: &str, got: &Value, expected: &[f64]) {
    let got: Vec<f64> = serde_json::from_value(got.clone()).unwrap();
    assert_eq!(got.len(), expected.len(), "{text:?}");
    let most = got.iter().zip(expected).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
    assert!(most <= BAR, "{text:?} is off by {most}");
}

/// A decoder that pools its last token, with a prompt and normalized, and one that pools the mean.
#[tokio::test]
async fn decoders_embed_as_their_files_say() {
    for name in ["qwen3-last", "mistral-mean"] {
        let (server, _model) = start(name);
        let Vectors { vectors } = goldens(name);
        assert!(vectors.len() >= 10);
        let texts: Vec<&str> = vectors.iter().map(|case| case.text.as_str()).collect();
        let all = ok(&server, "/v1/embeddings", &json!({"input": texts})).await;
        for (i, Vector { text, vector }) in vectors.iter().enumerate() {
            check(text, &all["data"][i]["embedding"], vector);
            check(text, &ok(&server, "/embed", &json!({"inputs": text})).await["embeddings"], vector);
        }
        for (path, body, words) in [
            ("/generate", json!({"inputs": "a"}), "Embedding models don't support text generation"),
            ("/classify", json!({"inputs": "a"}), "does not support classification"),
        ] {
            let response = server.post(path, &body).await.unwrap();
            assert_eq!(response.status(), 422, "{path}");
            let answer = response.text().await.unwrap();
            assert!(answer.contains(words), "{path}: {answer}");
        }
    }
}

/// The entities of transformers' pipeline: their classes, places and words.
#[tokio::test]
async fn entities_are_those_of_transformers() {
    let (server, _model) = start("bert-entities");
    let Classified { cases } = goldens("bert-entities");
    assert!(cases.len() >= 10);
    let texts: Vec<&str> = cases.iter().map(|case| case.text.as_str()).collect();
    let all = ok(&server, "/classify_batch", &json!({"inputs": texts})).await;
    for (i, Case { text, found }) in cases.iter().enumerate() {
        let got = ok(&server, "/classify", &json!({"inputs": text})).await;
        assert_eq!(got, all[i], "{text:?}");
        assert_eq!(got.as_array().unwrap().len(), found.len(), "{text:?}: {got}");
        for (got, expected) in got.as_array().unwrap().iter().zip(found) {
            for field in ["entity_group", "word", "start", "end"] {
                assert_eq!(got[field], expected[field], "{text:?}: {got} {expected}");
            }
            let [score, of_transformers] = [got, expected].map(|one| one["score"].as_f64().unwrap());
            assert!((score - of_transformers).abs() < BAR, "{text:?}: {got} {expected}");
        }
    }
    let all = cases.iter().flat_map(|case| &case.found);
    let longest = all.map(|entity| entity["end"].as_u64().unwrap() - entity["start"].as_u64().unwrap()).max();
    assert!(longest > Some(8), "entities of several tokens are among them");
}

/// The classes of whole texts, the most probable first.
#[tokio::test]
async fn classes_are_those_of_transformers() {
    let (server, _model) = start("bert-classes");
    for Case { text, found } in goldens::<Classified>("bert-classes").cases {
        let got = ok(&server, "/classify", &json!({"inputs": text})).await;
        for (got, expected) in got.as_array().unwrap().iter().zip(&found) {
            assert_eq!((&got["entity_group"], &got["word"]), (&expected["label"], &json!(text)));
            let [score, of_transformers] = [got, expected].map(|one| one["score"].as_f64().unwrap());
            assert!((score - of_transformers).abs() < BAR, "{text:?}: {got} {expected}");
        }
        assert_eq!(got.as_array().unwrap().len(), found.len(), "{text:?}");
    }
}

/// Every method of LoRAX's own client that embeds or classifies.
#[test]
fn loraxs_own_client_gets_vectors_and_entities() {
    for (task, name) in [("embed", "qwen3-last"), ("classify", "bert-entities")] {
        let (server, _model) = start(name);
        let golden = fixture(name).join("goldens.json");
        python("python/lorax_pooling_client.py", &[task.as_ref(), server.url.as_ref(), golden.as_ref()]);
    }
}
