//! The tokenizer that is built from a GGUF file, against transformers' for the same file.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use lorax_router::tokenizer::{ModelTokenizer, TokenizerError};
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

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/tiny/model")
}

#[test]
fn a_folder_gives_its_tokenizer_and_template() {
    let tokenizer = ModelTokenizer::load(&tiny(), None).unwrap();
    let ids = tokenizer.encode("<|user|>Licensor</s>", false).unwrap();
    assert_eq!((ids[0], *ids.last().unwrap()), (2, 1), "special tokens are found in text");
    assert_eq!(tokenizer.eos_token.as_deref(), Some("</s>"));
    assert!(tokenizer.chat_template.unwrap().contains("add_generation_prompt"));
}

#[test]
fn a_given_configuration_goes_before_all_of_the_models() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path();
    fs::copy(tiny().join("tokenizer.json"), model.join("tokenizer.json")).unwrap();
    let write = |name: &str, text: &str| fs::write(model.join(name), text).unwrap();
    let given = model.join("given.json");
    let template =
        |model: &Path, given: Option<&Path>| ModelTokenizer::load(model, given).unwrap().chat_template;
    write("given.json", r#"{"chat_template": "given", "eos_token": "<given>"}"#);
    assert_eq!(template(model, None), None);
    write("tokenizer_config.json", r#"{"chat_template": "own", "bos_token": "<own>"}"#);
    assert_eq!(template(model, None).as_deref(), Some("own"));
    write("chat_template.jinja", "file");
    assert_eq!(template(model, None).as_deref(), Some("file"));
    assert_eq!(template(model, Some(&given)).as_deref(), Some("given"));
    let tokens = ModelTokenizer::load(model, Some(&given)).unwrap();
    assert_eq!(
        (tokens.bos_token, tokens.eos_token.as_deref()),
        (None, Some("<given>")),
        "it replaces the own"
    );
    assert_eq!(template(&demo_model(), Some(&given)).as_deref(), Some("given"));
    write("given.json", r#"{"chat_template": [{"name": "default", "template": "named"}]}"#);
    assert_eq!(template(model, Some(&given)).as_deref(), Some("named"));
    write("given.json", "{}");
    assert_eq!(template(model, Some(&given)).as_deref(), Some("file"));
}

#[test]
fn files_that_cannot_be_read_are_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path();
    fs::copy(tiny().join("tokenizer.json"), model.join("tokenizer.json")).unwrap();
    let refusal = |given: Option<&Path>| ModelTokenizer::load(model, given).err().unwrap();
    let error = refusal(Some(&model.join("absent.json")));
    assert!(matches!(error, TokenizerError::Given(_)));
    assert!(error.to_string().contains("absent.json: No such file"), "{error}");
    fs::write(model.join("broken.json"), "{").unwrap();
    let error = refusal(Some(&model.join("broken.json")));
    assert!(error.to_string().contains("broken.json: EOF"), "{error}");
    fs::write(model.join("chat_template.jinja"), [0xff, 0xfe]).unwrap();
    let error = refusal(None);
    assert!(error.to_string().contains("chat_template.jinja: stream did not contain valid UTF-8"), "{error}");
}
