//! Configurations that transformers has read and saved again say the same in other words.

use std::{fs, path::Path};

use model::testing::seeded::Manifest;
use serde::Deserialize;
use serde_json::Value;

use crate::read;

/// See `integration-tests/fixtures/make_saved_configs.py`.
#[derive(Deserialize)]
struct Saved {
    fixture: String,
    config: Value,
}

#[test]
fn a_configuration_that_was_saved_again_says_the_same() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures");
    let text = fs::read(fixtures.join("config/saved.json")).unwrap();
    let all: Vec<Saved> = serde_json::from_slice(&text).unwrap();
    assert!(all.len() > 20);
    for Saved { fixture, config } in all {
        let manifest = Manifest::read(&fixtures.join("families").join(&fixture).join("model.json")).unwrap();
        let saved = read(&config).unwrap_or_else(|refusal| panic!("{fixture}: {refusal}"));
        assert_eq!(saved, read(&manifest.config).unwrap(), "{fixture}");
    }
}
