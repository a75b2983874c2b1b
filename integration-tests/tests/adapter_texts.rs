//! Adapters that transformers has saved beside a tokenizer have the tokens and the chats of that tokenizer.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{path::Path, process::Command};

use integration_tests::{
    adapters::{ALL_SITES, TINY},
    server::{Server, fixtures},
};

/// As many as the script has cases.
const ADAPTERS: u64 = 8;

#[test]
fn adapters_have_the_texts_of_their_tokenizers() {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..ADAPTERS {
        let name = folder.path().join(number.to_string());
        TINY.write_adapter(&name, 4, &ALL_SITES, number).unwrap();
    }
    let model = fixtures().join("tiny/model");
    let server = Server::start_with(&model, folder.path(), &[]).unwrap();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = here.join("../.venv/bin/python");
    assert!(python.exists(), "{} is missing: make venv", python.display());
    let script = here.join("python/adapter_texts.py");
    let status = Command::new(python).arg(script).arg(&server.url).arg(model).arg(folder.path()).status();
    assert!(status.unwrap().success());
}
