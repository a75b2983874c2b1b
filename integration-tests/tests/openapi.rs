//! The document of all routes, and answers to requests that are drawn from it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{path::Path, process::Command};

use integration_tests::server::{Server, fixtures};

#[test]
fn answers_are_those_of_the_document() {
    let tiny = fixtures().join("tiny").canonicalize().unwrap();
    let (model, adapters) = (tiny.join("model"), tiny.join("adapters"));
    let server = Server::start_with(&model, &adapters, &["--kv-memory", "16MiB"]).unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = folder.join("../.venv/bin/python");
    assert!(python.exists(), "{} is missing: make venv", python.display());
    let script = folder.join("python/openapi_check.py");
    let output = Command::new(python)
        .arg(script)
        .arg(&server.url)
        .current_dir(env!("CARGO_TARGET_TMPDIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
