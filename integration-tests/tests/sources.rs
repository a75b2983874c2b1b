//! Adapters that the official clients have uploaded to a hub and to a bucket, served by name.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../sources/tests/fake/mod.rs"]
mod fake;
#[path = "../../sources/tests/fake/s3.rs"]
mod s3;

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use fake::{Fault, On, Server as Hub};
use futures::future::join_all;
use integration_tests::server::{Server, demo_model, fixtures};
use s3::S3;
use serde_json::{Value, json};

const PROMPT: &str = "<|im_start|>user\nShow the name of all ships.<|im_end|>\n<|im_start|>assistant\n";

fn python(script: &str) -> Command {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut python = Command::new(folder.join("../.venv/bin/python"));
    python.arg(folder.join("../sources/tests").join(script)).stdin(Stdio::piped()).stdout(Stdio::piped());
    python
}

/// Has `huggingface_hub` upload an adapter of the fixtures to a hub.
fn upload_to_hub(hub: &Hub, id: &str, adapter: &str) {
    let home = tempfile::tempdir().unwrap();
    let mut client = python("hub_client.py")
        .env("HF_ENDPOINT", &hub.url)
        .env("HF_HOME", home.path())
        .env("HF_HUB_DISABLE_XET", "1")
        .spawn()
        .expect("`make venv` makes the environment of this test");
    let calls = json!([["upload", id, fixtures().join("adapters").join(adapter), "mine"]]);
    client.stdin.take().unwrap().write_all(calls.to_string().as_bytes()).unwrap();
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), json!([hub.commit(id, "main")]));
}

/// A server to which AWS's client has put an adapter of the fixtures.
fn s3_with(bucket: &str, adapter: &str) -> S3 {
    let folder = fixtures().join("adapters").join(adapter);
    let config = std::fs::read(folder.join("adapter_config.json")).unwrap();
    let weights = folder.join("adapter_model.safetensors");
    let mut s3 = S3::start();
    s3.put(bucket, &[(&format!("{adapter}/adapter_config.json"), &config)]);
    let upload = json!(["upload", bucket, format!("{adapter}/adapter_model.safetensors"), weights]);
    assert_eq!(s3.call(&upload), Value::Null);
    s3
}

/// The status of a request, and its tokens or its error.
async fn ask(server: &Server, adapter: &str, source: &str, token: &str) -> (u16, Value) {
    let mut parameters =
        json!({"adapter_id": adapter, "adapter_source": source, "max_new_tokens": 16, "details": true});
    if !token.is_empty() {
        parameters["api_token"] = json!(token);
    }
    let answer =
        server.post("/generate", &json!({"inputs": PROMPT, "parameters": parameters})).await.unwrap();
    let status = answer.status().as_u16();
    let body: Value = answer.json().await.unwrap();
    if status == 200 { (status, body["details"]["tokens"].clone()) } else { (status, body) }
}

/// A server that reads from both, with its caches in a folder.
fn server(hub: &Hub, s3: &S3, cache: &Path) -> Server {
    let folder = cache.to_str().unwrap();
    let flags = ["--adapter-buckets", "s3://demo", "--adapter-cache", folder];
    let variables = [
        ("HF_ENDPOINT", &*hub.url),
        ("HF_TOKEN", "mine"),
        ("HF_HOME", folder),
        ("S3_ENDPOINT_URL", &s3.url),
        ("AWS_ACCESS_KEY_ID", "secret-id"),
        ("AWS_SECRET_ACCESS_KEY", "secret-key"),
    ];
    Server::start_in(&demo_model().unwrap(), &fixtures().join("adapters"), &flags, &variables).unwrap()
}

#[tokio::test]
async fn what_official_clients_upload_is_served_by_name() {
    let hub = Hub::start();
    hub.know("mine");
    hub.know("other");
    upload_to_hub(&hub, "demo/sql", "sql");
    upload_to_hub(&hub, "demo/private", "pirate");
    hub.restrict("demo/private", &["mine"]);
    let s3 = s3_with("demo", "pirate");
    let cache = tempfile::tempdir().unwrap();
    let server = server(&hub, &s3, cache.path());
    let (sql, pirate) = (ask(&server, "sql", "local", "").await, ask(&server, "pirate", "local", "").await);
    assert!(sql.0 == 200 && pirate.0 == 200 && sql.1 != pirate.1, "{sql:?} {pirate:?}");
    let sha = hub.commit("demo/sql", "main");
    let at_commit = format!("demo/sql@{sha}");
    for (adapter, source, token, expected) in [
        ("demo/sql", "hub", "", &sql),
        ("demo/sql", "hub", "other", &sql),
        ("hf://demo/sql@main", "local", "", &sql),
        (&at_commit, "hub", "", &sql),
        ("demo/private", "hub", "mine", &pirate),
        ("s3://demo/pirate", "s3", "", &pirate),
        ("s3://demo/pirate", "local", "ignored", &pirate),
    ] {
        assert_eq!(ask(&server, adapter, source, token).await, *expected, "{adapter} {token}");
    }
    // Whatever is cached: who may not read it is refused, at the same time as others are served.
    let mixed = ["mine", "other", "", "unknown", "mine", "other", "", "unknown"];
    let answers = join_all(mixed.map(|token| ask(&server, "demo/private", "hub", token))).await;
    for (token, answer) in mixed.iter().zip(answers) {
        if *token == "mine" {
            assert_eq!(answer, pirate);
        } else {
            // LoRAX answers 424 where an adapter may not be read.
            let refusal = (424, "the hub does not know it");
            let (status, cause) = if *token == "unknown" { refusal } else { (404, "does not exist") };
            let error = answer.1["error"].as_str().unwrap();
            assert_eq!(answer.0, status, "{token}: {error}");
            assert!(error.contains(cause) && !error.contains("unknown"), "{token}: {error}");
        }
    }
    for (adapter, source) in [
        ("s3://other/pirate", "s3"),
        ("s3://demo/nothing", "s3"),
        ("gs://demo/pirate", "gs"),
        ("demo/nothing", "hub"),
        ("demo/sql@nothing", "hub"),
        ("repo/1", "pbase"),
    ] {
        let (status, body) = ask(&server, adapter, source, "").await;
        assert!((400..500).contains(&status), "{adapter}: {status} {body}");
        assert!(!body.to_string().contains("secret-"), "{adapter}: {body}");
    }
    // A hub in trouble is no concern of those who do not name it.
    hub.fail(On::Api, Fault::Status(503), 1000);
    let (broken, healthy) = tokio::join!(
        ask(&server, "demo/sql@v9", "hub", ""),
        join_all((0..4).map(|_| ask(&server, "s3://demo/pirate", "s3", ""))),
    );
    assert_eq!(broken.0, 424, "{broken:?}");
    assert!(healthy.iter().all(|answer| *answer == pirate), "{healthy:?}");
}
