//! Requests, adapters and models that cannot be served are refused with a cause, while other requests are served.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs::{self, File},
    io::Read,
    path::Path,
};

use integration_tests::{
    adapters::{DEMO, TINY},
    server::{Server, demo_model, fixtures},
};
use serde_json::{Value, json};

fn tiny() -> std::path::PathBuf {
    fixtures().join("tiny/model")
}

/// Runs a stream of the base model while `refuse` is refused; the stream must come to its end.
async fn beside_a_stream(server: &Server, refuse: impl Future<Output = ()>) {
    let body = json!({"inputs": "The", "parameters": {"max_new_tokens": 100, "ignore_eos_token": true}});
    let stream = server.post("/generate_stream", &body).await.unwrap();
    refuse.await;
    let text = stream.text().await.unwrap();
    assert!(text.contains("\"generated_text\":\""), "{text}");
}

/// Sends a body, and checks status, shape and cause.
async fn refused(server: &Server, path: &str, body: &Value, status: u16, cause: &str) {
    let response = server.post(path, body).await.unwrap();
    let (got, body): (_, Value) = (response.status().as_u16(), response.json().await.unwrap());
    assert_eq!(got, status, "{body}");
    let (message, kind) = match path {
        "/generate" => (&body["error"], &body["error_type"]),
        _ => (&body["error"]["message"], &body["error"]["code"]),
    };
    assert!(message.as_str().unwrap().contains(cause), "{cause:?} in {body}");
    let folders = std::env::temp_dir();
    assert!(!message.as_str().unwrap().contains(folders.to_str().unwrap()), "{body} says where files are");
    assert!(kind.is_string(), "{body}");
}

#[tokio::test]
async fn requests() {
    let adapters = fixtures().join("adapters");
    let flags = ["--max-total-tokens", "128", "--max-body-size", "64KiB"];
    let server = &Server::start_with(&tiny(), &adapters, &flags).unwrap();
    let generate = |parameters: Value| json!({"inputs": "Hello", "parameters": parameters});
    let cases = [
        (json!({"inputs": ""}), 422, "cannot be empty"),
        (json!({"inputs": "word ".repeat(300)}), 422, "at most 127 tokens"),
        (json!({"inputs": 7}), 422, "invalid type"),
        (generate(json!({"max_new_tokens": -1})), 422, "invalid value"),
        (generate(json!({"max_new_tokens": 5000})), 422, "must be <= 128"),
        (generate(json!({"temperature": -1.0})), 422, "`temperature` must be non-negative"),
        (generate(json!({"seed": -1})), 422, "invalid value"),
        (generate(json!({"stop": ["x".repeat(100_000)]})), 413, "larger than 65536 bytes"),
        (generate(json!({"adapter_id": "no-such"})), 404, "does not exist"),
        (generate(json!({"adapter_id": ".."})), 422, "parent folder"),
        (generate(json!({"adapter_id": "../adapters/sql"})), 422, "parent folder"),
        (generate(json!({"adapter_id": "sql/../sql"})), 422, "parent folder"),
        (generate(json!({"adapter_id": "s\u{7}ql"})), 422, "control characters"),
        (generate(json!({"adapter_id": "sql\u{0}"})), 422, "control characters"),
        (generate(json!({"adapter_id": "x".repeat(5000)})), 422, ""),
        (generate(json!({"adapter_id": "/etc"})), 424, "outside"),
        (generate(json!({"adapter_id": "sql", "adapter_source": "ftp"})), 422, "only local, hub"),
    ];
    beside_a_stream(server, async {
        for (body, status, cause) in cases {
            refused(server, "/generate", &body, status, cause).await;
        }
        let nested = [&b"{\"x\":"[..], &[b'['; 5000]].concat();
        for raw in [&b"{\"inputs\": \"x"[..], b"\xff\xfe", b"", &nested] {
            let request = server.client.post(format!("{}/generate", server.url)).body(raw.to_vec());
            let response = request.send().await.unwrap();
            assert_eq!(response.status().as_u16(), 400);
            assert_eq!(response.json::<Value>().await.unwrap()["error_type"], "malformed");
        }
        let absent = json!({"model": "nope", "prompt": "x"});
        refused(server, "/v1/completions", &absent, 404, "does not exist").await;
    })
    .await;
}

#[tokio::test]
async fn ten_megabytes_of_stop_strings() {
    let stops = json!(vec!["x".repeat(2_500_000); 4]);
    let body = json!({"inputs": "Hello", "parameters": {"stop": stops, "max_new_tokens": 20}});
    let server = &Server::start_with(&tiny(), &fixtures(), &[]).unwrap();
    beside_a_stream(server, refused(server, "/generate", &body, 413, "larger than 2097152 bytes")).await;
    // Where they are allowed they cost no more than their bytes.
    let server = Server::start_with(&tiny(), &fixtures(), &["--max-body-size", "16MiB"]).unwrap();
    assert_eq!(server.post("/generate", &body).await.unwrap().status().as_u16(), 200);
}

type Spoil = fn(&Path);

fn edit(folder: &Path, change: fn(&mut Vec<u8>)) {
    let file = folder.join("adapter_model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    change(&mut bytes);
    fs::write(file, bytes).unwrap();
}

fn configure(folder: &Path, field: &str, value: Value) {
    let file = folder.join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    config[field] = value;
    fs::write(file, config.to_string()).unwrap();
}

const BROKEN: [(&str, Spoil, &str); 13] = [
    ("cut", |folder| edit(folder, |bytes| bytes.truncate(bytes.len() / 2)), "truncated"),
    ("cut-header", |folder| edit(folder, |bytes| bytes.truncate(20)), "truncated or corrupt"),
    ("empty", |folder| edit(folder, Vec::clear), "truncated: 0 bytes"),
    ("corrupt", |folder| edit(folder, |bytes| bytes[8..40].fill(0xff)), "corrupt header"),
    (
        "nan",
        |folder| edit(folder, |bytes| bytes.splice(bytes.len() - 4.., f32::NAN.to_le_bytes()).for_each(drop)),
        "has NaN or infinite values",
    ),
    (
        "inf",
        |folder| {
            edit(folder, |bytes| bytes.splice(bytes.len() - 4.., f32::INFINITY.to_le_bytes()).for_each(drop))
        },
        "has NaN or infinite values",
    ),
    ("shapes", |folder| configure(folder, "r", json!(8)), "has the shape [4, 64], expected [8, 64]"),
    (
        "incomplete",
        |folder| configure(folder, "target_modules", json!(["q_proj", "v_proj", "o_proj"])),
        "self_attn.o_proj.lora_A.weight is missing",
    ),
    (
        "no-config",
        |folder| fs::remove_file(folder.join("adapter_config.json")).unwrap(),
        "has no adapter_config.json",
    ),
    (
        "no-weights",
        |folder| fs::remove_file(folder.join("adapter_model.safetensors")).unwrap(),
        "has neither adapter_model.safetensors",
    ),
    (
        "no-json",
        |folder| fs::write(folder.join("adapter_config.json"), [0xff, 0xfe]).unwrap(),
        "adapter_config.json",
    ),
    ("negative", |folder| configure(folder, "r", json!(-4)), "invalid value"),
    (
        "other-model",
        |folder| DEMO.write_adapter(folder, 1, &["q_proj"], 1).unwrap(),
        "belongs to no targeted module of this model",
    ),
];

#[tokio::test]
async fn adapters() {
    let folder = tempfile::tempdir().unwrap();
    for (name, spoil, _) in BROKEN {
        let adapter = folder.path().join(name);
        TINY.write_adapter(&adapter, 4, &["q_proj", "v_proj"], 1).unwrap();
        spoil(&adapter);
    }
    TINY.write_adapter(&folder.path().join("good"), 4, &["q_proj", "v_proj"], 1).unwrap();
    let server = &Server::start_with(&tiny(), folder.path(), &[]).unwrap();
    beside_a_stream(server, async {
        for (name, _, cause) in BROKEN {
            let native = json!({"inputs": "x", "parameters": {"adapter_id": name}});
            refused(server, "/generate", &native, 422, cause).await;
            let openai = json!({"model": name, "prompt": "x"});
            refused(server, "/v1/completions", &openai, 400, cause).await;
            assert_eq!(server.tokens(Some("good"), "x", 2).await.unwrap().len(), 2, "after {name}");
        }
    })
    .await;
}

#[test]
fn models() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut head = Vec::new();
    File::open(demo_model().unwrap()).unwrap().take(4 << 20).read_to_end(&mut head).unwrap();
    fs::write(at("cut.gguf"), &head).unwrap();
    fs::write(at("garbage.gguf"), [b"GGUF".as_slice(), &[0xff; 500]].concat()).unwrap();
    for name in ["cut", "without"] {
        fs::create_dir(at(name)).unwrap();
        for file in fs::read_dir(tiny()).unwrap().map(|file| file.unwrap().path()) {
            fs::copy(&file, at(name).join(file.file_name().unwrap())).unwrap();
        }
    }
    let weights = fs::read(at("cut/model.safetensors")).unwrap();
    fs::write(at("cut/model.safetensors"), &weights[..weights.len() - 100]).unwrap();
    let mut renamed = weights;
    let name = b"model.norm.weight";
    let found = renamed.windows(name.len()).position(|bytes| bytes == name).unwrap();
    renamed[found..][..5].copy_from_slice(b"moxel");
    fs::write(at("without/model.safetensors"), renamed).unwrap();
    for (name, cause) in [
        ("cut.gguf", "cut.gguf"),
        ("garbage.gguf", "garbage.gguf"),
        ("cut", "truncated"),
        ("without", "model.norm.weight is missing"),
    ] {
        let refusal = Server::start_with(&at(name), folder.path(), &[]).err().unwrap().to_string();
        let error = refusal.lines().find(|line| line.contains("error: ")).unwrap_or_default();
        assert!(error.contains(cause), "{name}: {refusal}");
        // Router and shard both read a GGUF file: whichever is first ends the start.
        assert!(refusal.contains("could not start (exit status: 1)"), "{refusal}");
    }
}
