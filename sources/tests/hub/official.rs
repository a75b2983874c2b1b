//! The hub of these tests is known to be one because the hub's own client gets along with it.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use crate::{
    fake::{Repository, Server, sha256},
    world::{CONFIG, ID, get, of, reference, repository, weights},
};

/// What `huggingface_hub` makes of some calls, with a cache in `home`.
pub(crate) fn client(server: &Server, home: &Path, calls: &Value) -> Vec<Value> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut python = Command::new(folder.join("../.venv/bin/python"))
        .arg(folder.join("tests/hub_client.py"))
        .env("HF_ENDPOINT", &server.url)
        .env("HF_HOME", home)
        .env("HF_HUB_DISABLE_XET", "1")
        .env("HF_HUB_DISABLE_TELEMETRY", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("`make venv` makes the environment of this test");
    python.stdin.take().unwrap().write_all(calls.to_string().as_bytes()).unwrap();
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success());
    serde_json::from_slice(&output.stdout).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_official_client_takes_it_for_a_hub() {
    let server = Server::with(ID, repository().with("v2", &[("adapter_config.json", b"of v2")]));
    server.put("org/private", Repository::new(&[("a.json", b"p")]).readable_by(&["mine"]));
    server.put("org/gated", repository().readable_by(&["mine"]).gated());
    server.know("other");
    let home = tempfile::tempdir().unwrap();
    let (weights, sha) = (weights(), server.commit(ID, "main"));
    let large = [json!(weights.len()), json!(sha256(&weights))];
    let files = json!({"adapter_config.json": [CONFIG.len(), null], "adapter_model.safetensors": large,
                       "README.md": [10, null], "optimizer.pt": [17, null]});
    let info = json!({"sha": sha, "files": files});
    let cases = [
        (json!(["info", ID]), info.clone()),
        (json!(["info", ID, "main"]), info.clone()),
        (json!(["info", ID, sha]), info),
        (json!(["file", ID, "adapter_config.json"]), json!(hex(CONFIG))),
        (json!(["file", ID, "adapter_config.json", "v2"]), json!(hex(b"of v2"))),
        (json!(["file", ID, "adapter_model.safetensors"]), json!(hex(&weights))),
        (json!(["file", ID, "nothing.json"]), json!("RemoteEntryNotFoundError")),
        (json!(["file", ID, "adapter_config.json", "v3"]), json!("RevisionNotFoundError")),
        (json!(["info", ID, "v3"]), json!("RevisionNotFoundError")),
        (json!(["info", "org/nothing"]), json!("RepositoryNotFoundError")),
        (json!(["info", "org/nothing", null, "other"]), json!("RepositoryNotFoundError")),
        (json!(["file", "org/nothing", "a.json"]), json!("RepositoryNotFoundError")),
        (json!(["info", "org/private"]), json!("RepositoryNotFoundError")),
        (json!(["info", "org/private", null, "other"]), json!("RepositoryNotFoundError")),
        (json!(["file", "org/private", "a.json", null, "mine"]), json!(hex(b"p"))),
        (json!(["info", ID, null, "unknown"]), json!("HfHubHTTPError")),
        (json!(["file", "org/gated", "adapter_config.json"]), json!("GatedRepoError")),
        (json!(["file", "org/gated", "adapter_config.json", null, "other"]), json!("GatedRepoError")),
        (json!(["file", "org/gated", "adapter_config.json", null, "mine"]), json!(hex(CONFIG))),
    ];
    let calls: Vec<_> = cases.iter().map(|(call, _)| call).collect();
    let answers = client(&server, home.path(), &json!(calls));
    for ((call, expected), answer) in cases.iter().zip(answers) {
        assert!(answer == *expected, "{call}: {answer:.300}");
    }
}

#[tokio::test]
async fn what_the_official_client_uploads_is_fetched() {
    let server = Server::start();
    server.know("mine");
    let adapter = tempfile::tempdir().unwrap();
    for (name, bytes) in [("adapter_config.json", CONFIG), ("adapter_model.safetensors", &weights())] {
        fs::write(adapter.path().join(name), bytes).unwrap();
    }
    let home = tempfile::tempdir().unwrap();
    let upload = json!([["upload", ID, adapter.path(), "mine"]]);
    let sha = client(&server, home.path(), &upload).remove(0);
    assert_eq!(sha, server.commit(ID, "main"));
    let sources = of(&server);
    let fetched = get(&sources, ID, "").await.unwrap();
    assert_eq!(fetched.read("adapter_model.safetensors"), weights());
    // Another upload is another version.
    let before = sources.lookup(&reference(ID), None).await.unwrap();
    fs::write(adapter.path().join("adapter_model.safetensors"), "new").unwrap();
    client(&server, home.path(), &upload);
    let after = sources.lookup(&reference(ID), None).await.unwrap();
    assert_ne!(after.version, before.version);
    assert_eq!(get(&sources, ID, "").await.unwrap().read("adapter_model.safetensors"), b"new");
}
