//! Answers to real JSON schemas, drawn at temperature 1, are valid.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{path::Path, process::Command};

use integration_tests::server::{Server, fixtures};

/// Every tenth schema, or all of them with `LORAX_SCHEMAS=all`.
#[test]
fn answers_keep_to_their_schemas() {
    let model = fixtures().join("tiny/model");
    let server = Server::start_with(&model, &fixtures().join("tiny/adapters"), &[]).unwrap();
    let step = if std::env::var("LORAX_SCHEMAS").is_ok_and(|which| which == "all") { "1" } else { "10" };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = folder.join("../.venv/bin/python");
    assert!(python.exists(), "{} is missing: make venv", python.display());
    let script = folder.join("python/structured.py");
    let schemas = fixtures().join("schemas/schemas.jsonl");
    let status = Command::new(python).arg(script).arg(&server.url).arg(model).arg(schemas).arg(step).status();
    assert!(status.unwrap().success());
}
