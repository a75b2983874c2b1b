//! The tokenizer that is built from a GGUF file, against transformers' for the same file.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use lorax_router::tokenizer::ModelTokenizer;
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
}

fn demo_model() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache"));
    cache.join("lorax/models/SmolLM2-135M-Instruct.Q4_1.gguf")
}

fn cases(file: &str) -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/tokenizer");
    serde_json::from_slice(&std::fs::read(folder.join(file)).unwrap()).unwrap()
}

#[test]
fn ids_are_those_of_transformers() {
    let tokenizer = ModelTokenizer::load(&demo_model(), None).unwrap();
    let cases: Vec<Case> = cases("cases.json").into_iter().chain(cases("chat.json")).collect();
    assert!(cases.len() > 700);
    for case in cases {
        assert_eq!(tokenizer.encode(&case.text, false).unwrap(), case.ids, "{:?}", case.text);
    }
}

#[test]
fn text_survives_the_way_there_and_back() {
    let tokenizer = ModelTokenizer::load(&demo_model(), None).unwrap();
    for text in
        ["Hello, world!", " def f(x):\n\treturn x", "日本語 🙂 مرحبا", "1234 56", "<|im_start|>user\n"]
    {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false), text);
    }
}

#[test]
fn a_folder_gives_its_tokenizer_and_template() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/tiny/model");
    let tokenizer = ModelTokenizer::load(&folder, None).unwrap();
    let ids = tokenizer.encode("<|user|>Licensor</s>", false).unwrap();
    assert_eq!((ids[0], *ids.last().unwrap()), (2, 1), "special tokens are found in text");
    assert_eq!(tokenizer.eos_token.as_deref(), Some("</s>"));
    assert!(tokenizer.chat_template.unwrap().contains("add_generation_prompt"));
}
