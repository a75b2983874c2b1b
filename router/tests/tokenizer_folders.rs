//! Tokenizers from every kind of file that transformers reads, beside configurations of many shapes, against what it
//! makes of the same folders.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use lorax_router::tokenizer::{ModelTokenizer, TokenizerError};
use proptest::{
    prelude::any,
    strategy::{Strategy, ValueTree},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use serde::Deserialize;
use serde_json::{Value, json};

/// Files that are tried of each kind.
const MUTATIONS: usize = 60;
/// Files that are tried with a map of characters, in which the library looks up without checks.
const MUTATED_MAPS: usize = 1500;

#[derive(Deserialize)]
struct Fixture {
    many: Vec<String>,
    few: Vec<String>,
    cases: Vec<Case>,
    /// What each text becomes; null for folders that transformers refuses.
    outcomes: Vec<Option<Vec<Encoded>>>,
}

/// The ids of a text, their text, and the text of those that are not special. 0 stands for a text that is the same as
/// the one before it.
type Encoded = (Vec<u32>, Value, Value);

/// Files with the fixtures that they are copies of, tokenizer_config.json, and a part of the refusal.
type Refused<'a> = (&'a [(&'a str, &'a str)], Value, &'a str);

/// A folder.
#[derive(Deserialize)]
struct Case {
    name: String,
    /// Files by name, each with the fixture that it is a copy of.
    copies: BTreeMap<String, String>,
    /// JSON files by name.
    written: BTreeMap<String, Value>,
    /// Whether the case is of the many texts or of the few.
    many: bool,
    /// Special tokens by name.
    named: Option<BTreeMap<String, String>>,
    /// Which outcome the case has.
    encoded: usize,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/tokenizer/folders")
}

/// A folder with copies of fixtures and JSON files.
fn folder(copies: &[(&str, &str)], written: &[(&str, &Value)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, source) in copies {
        fs::copy(fixtures().join(source), folder.path().join(name)).unwrap();
    }
    for (name, content) in written {
        fs::write(folder.path().join(name), content.to_string()).unwrap();
    }
    folder
}

/// Text that may be told to be the same as another.
fn or<'a>(text: &'a Value, same: &'a str) -> &'a str {
    text.as_str().unwrap_or(same)
}

#[test]
fn folders_give_the_tokenizers_of_transformers() {
    let fixture: Fixture = serde_json::from_slice(&fs::read(fixtures().join("cases.json")).unwrap()).unwrap();
    assert!(fixture.cases.len() > 120, "{}", fixture.cases.len());
    let mut wrong = Vec::new();
    for case in &fixture.cases {
        let copies: Vec<_> =
            case.copies.iter().map(|(name, source)| (name.as_str(), source.as_str())).collect();
        let written: Vec<_> = case.written.iter().map(|(name, content)| (name.as_str(), content)).collect();
        let folder = folder(&copies, &written);
        let loaded = ModelTokenizer::load(folder.path(), None);
        let (tokenizer, expected) = match (loaded, &fixture.outcomes[case.encoded]) {
            (Ok(tokenizer), Some(expected)) => (tokenizer, expected),
            (Err(_), None) => continue,
            (Ok(_), None) => {
                wrong.push(format!("{}: loads", case.name));
                continue;
            }
            (Err(error), Some(_)) => {
                wrong.push(format!("{}: {error}", case.name));
                continue;
            }
        };
        if Some(&tokenizer.special_tokens) != case.named.as_ref() {
            let (expected, got) = (&case.named, &tokenizer.special_tokens);
            wrong.push(format!("{}\n  transformers: {expected:?}\n  here:         {got:?}", case.name));
        }
        let texts = if case.many { &fixture.many } else { &fixture.few };
        for (text, (ids, decoded, skipped)) in texts.iter().zip(expected) {
            let decoded = or(decoded, text);
            let expected = (ids.clone(), decoded.to_owned(), or(skipped, decoded).to_owned());
            let got = tokenizer.encode(text, true).unwrap();
            let got = (got, tokenizer.decode(ids, false), tokenizer.decode(ids, true));
            if got != expected {
                let name = &case.name;
                wrong.push(format!("{name} {text:?}\n  transformers: {expected:?}\n  here:         {got:?}"));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} differ, the first of them:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(40)].join("\n")
    );
}

/// Of some of these folders transformers makes a tokenizer that is not the model's.
#[test]
fn what_cannot_be_built_is_refused_by_name() {
    let class = |name: &str| json!({"tokenizer_class": name});
    let (llama, fast) = (class("LlamaTokenizer"), class("PreTrainedTokenizerFast"));
    let cases: Vec<Refused> = vec![
        (&[], llama.clone(), "neither a tokenizer.json nor tokenizer.model for a LlamaTokenizer"),
        (&[], json!({}), "neither a tokenizer.json nor tokenizer.model for a TokenizersBackend"),
        (&[], class("GPT2TokenizerFast"), "nor vocab.json and merges.txt for a GPT2Tokenizer"),
        (
            &[("vocab.json", "vocab.json")],
            class("Qwen2Tokenizer"),
            "nor vocab.json and merges.txt for a Qwen2Tokenizer",
        ),
        (
            &[("merges.txt", "merges.txt")],
            class("GPTNeoXTokenizer"),
            "nor vocab.json and merges.txt for a GPTNeoXTokenizer",
        ),
        (&[("vocab.json", "vocab.json")], class("BertTokenizer"), "nor vocab.txt for a BertTokenizer"),
        (&[("tekken.json", "vocab.json")], fast.clone(), "nor tokenizer.model for a TokenizersBackend"),
        (&[("qwen.tiktoken", "ranks.model")], class("QWenTokenizer"), "tokenizer_class \"QWenTokenizer\""),
        (&[("tokenizer.model", "unigram.model")], class("T5Tokenizer"), "tokenizer_class \"T5Tokenizer\""),
        (
            &[("tokenizer.model", "unigram.model")],
            llama.clone(),
            "tokenizer.model: no LlamaTokenizer can be built",
        ),
        (
            &[("tokenizer.model", "unigram.model")],
            class("GemmaTokenizer"),
            "tokenizer.model: no GemmaTokenizer",
        ),
        (&[("tokenizer.model", "whole.model")], class("GPT2Tokenizer"), "tokenizer.model: no GPT2Tokenizer"),
        (&[("tokenizer.json", "words.json")], llama.clone(), "tokenizer.json: no LlamaTokenizer"),
        (&[("tokenizer.json", "bytes.json")], class("BertTokenizer"), "tokenizer.json: no BertTokenizer"),
        (&[("tokenizer.model", "word.model")], fast.clone(), "tokenizer.model: model_type 3"),
        (&[("tokenizer.model", "char.model")], llama.clone(), "tokenizer.model: model_type 4"),
        (
            &[("tokenizer.model", "suffix.model")],
            fast.clone(),
            "tokenizer.model: treat_whitespace_as_suffix true",
        ),
        (&[("tokenizer.model", "vocab.txt")], llama.clone(), "tokenizer.model: "),
        (
            &[("vocab.json", "words.json"), ("merges.txt", "merges.txt")],
            class("GPT2Tokenizer"),
            "vocab.json: ",
        ),
        (
            &[("vocab.json", "vocab.json"), ("merges.txt", "vocab.txt")],
            class("GPT2Tokenizer"),
            "vocab.json: ",
        ),
    ];
    for (copies, config, expected) in cases {
        let folder = folder(copies, &[("tokenizer_config.json", &config)]);
        let error =
            ModelTokenizer::load(folder.path(), None).err().unwrap_or_else(|| panic!("{copies:?} {config}"));
        assert!(error.to_string().contains(expected), "{error}");
    }
}

/// Whatever the bytes of a file are, it is refused, or texts have ids.
#[test]
fn files_with_bytes_changed_are_refused_or_read() {
    let class = |name: &str| json!({"tokenizer_class": name});
    let (llama, fast) = (class("LlamaTokenizer"), class("PreTrainedTokenizerFast"));
    let merges: &[(&str, &str)] = &[("merges.txt", "merges.txt"), ("vocab.json", "vocab.json")];
    let cases: [(&[(&str, &str)], Value); 9] = [
        (&[("tokenizer.model", "whole.model")], llama),
        (&[("tokenizer.model", "whole.model")], fast.clone()),
        (&[("tokenizer.model", "unigram_bytes.model")], fast.clone()),
        (&[("tokenizer.model", "rules.model")], fast.clone()),
        (&[("tokenizer.model", "unigram.model")], fast.clone()),
        (&[("tokenizer.model", "ranks.model")], fast),
        (merges, class("GPT2Tokenizer")),
        (&[merges[1], merges[0]], class("Qwen2Tokenizer")),
        (&[("vocab.txt", "vocab.txt")], class("BertTokenizer")),
    ];
    let mut runner =
        TestRunner::new_with_rng(Config::default(), TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let mut read = 0;
    for (copies, config) in &cases {
        let folder = folder(copies, &[("tokenizer_config.json", config)]);
        let (file, source) = copies[0];
        let whole = fs::read(fixtures().join(source)).unwrap();
        let changes = proptest::collection::vec((0..whole.len(), any::<u8>()), 1..4);
        let mutations = if source == "rules.model" { MUTATED_MAPS } else { MUTATIONS };
        for _ in 0..mutations {
            let mut bytes = whole.clone();
            for (at, byte) in changes.new_tree(&mut runner).unwrap().current() {
                bytes[at] = byte;
            }
            fs::write(folder.path().join(file), bytes).unwrap();
            let Ok(tokenizer) = ModelTokenizer::load(folder.path(), None) else { continue };
            read += 1;
            for text in ["", "  the quick brown fox\n", "É…Ａ 日本語 🙂", "<s> [INST] x</s>\u{0}"] {
                // A vocabulary without the token for what is unknown has no ids for some texts.
                let ids = tokenizer.encode(text, true).unwrap_or_default();
                tokenizer.decode(&ids, false);
            }
        }
    }
    assert!((1..MUTATIONS * (cases.len() - 1) + MUTATED_MAPS).contains(&read), "{read} were read");
}

/// A map of characters: the first units of its trie, of which all others are zero, their number, and the texts.
fn map(units: &[(usize, u32)], count: usize, texts: &[u8]) -> Vec<u8> {
    let mut trie = vec![0u32; count];
    for (at, unit) in units {
        trie[*at] = *unit;
    }
    let size = (4 * count as u32).to_le_bytes();
    [&size[..], &trie.iter().flat_map(|unit| unit.to_le_bytes()).collect::<Vec<u8>>(), texts].concat()
}

#[test]
fn a_broken_map_of_characters_is_refused_in_every_file() {
    const LEAF: u32 = 1 << 8;
    let offset = |by: u32| by << 10;
    let a = u32::from(b'a');
    let (at_a, leaf_of_a) = (usize::from(b'a'), usize::from(b'a') ^ 1);
    let to_a = |offset_of_leaf: u32| (at_a, a | LEAF | offset(offset_of_leaf));
    let texts = "é\0b\0".as_bytes();
    let cases = [
        (map(&[], 256, b""), true),
        (map(&[to_a(1)], 256, texts), true),
        (map(&[to_a(1), (leaf_of_a, 3)], 256, texts), true),
        (map(&[to_a(1), (leaf_of_a, 5)], 256, texts), true),
        (map(&[], 0, b""), false),
        (map(&[], 255, b""), false),
        (map(&[(0, offset(256))], 256, b""), false),
        (map(&[(0, offset(1 << 20))], 512, b""), false),
        (map(&[to_a(1), (leaf_of_a, 1)], 256, texts), false),
        (map(&[to_a(1), (leaf_of_a, 6)], 256, texts), false),
        (map(&[to_a(1), (leaf_of_a, 1 << 30)], 256, texts), false),
        (map(&[to_a(256)], 256, texts), false),
        (map(&[(at_a, a | offset(300))], 256, texts), false),
        (map(&[(at_a, a | 1 << 9 | offset(1))], 256, texts), false),
        (map(&[], 256, b"\xff"), false),
        (map(&[], 256, b"")[..900].to_vec(), false),
        (vec![3, 0, 0, 0, 1, 2, 3], false),
        (vec![1, 0], false),
    ];
    let mut definition: Value =
        serde_json::from_slice(&fs::read(fixtures().join("bytes.json")).unwrap()).unwrap();
    for (index, (map, is_sound)) in cases.iter().enumerate() {
        let step = json!({"type": "Precompiled", "precompiled_charsmap": STANDARD.encode(map)});
        for normalizer in [step.clone(), json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, step]})]
        {
            definition["normalizer"] = normalizer;
            let folder = folder(&[], &[("tokenizer.json", &definition)]);
            let loaded = ModelTokenizer::load(folder.path(), None);
            assert_eq!(loaded.is_ok(), *is_sound, "case {index}: {:?}", loaded.err());
            let Ok(tokenizer) = loaded else { continue };
            tokenizer.encode("a bé aa", true).unwrap();
        }
    }
}

/// A tokenizer.json of a few words, with these steps.
fn with_steps(steps: &Value) -> Result<ModelTokenizer, TokenizerError> {
    let mut definition = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"},
    });
    for (step, value) in steps.as_object().unwrap() {
        definition[step] = value.clone();
    }
    ModelTokenizer::load(folder(&[], &[("tokenizer.json", &definition)]).path(), None)
}

/// Six replacements of a letter by sixty make 60^6 of it.
#[test]
fn steps_that_make_much_of_little_are_refused() {
    let begun = Instant::now();
    let replace =
        |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    let letters = |count: usize| replace(json!({"String": "a"}), &"a".repeat(count));
    let sequence = |kind: &str, steps: Vec<Value>| json!({"type": "Sequence", kind: steps});
    let bytes =
        || json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let kept = ["a*", "(?=a)", "a|", r"\b"].map(|regex| replace(json!({"Regex": regex}), &"b".repeat(2000)));
    let template = |single: Vec<Value>, ids: usize| {
        json!({"type": "TemplateProcessing", "single": single, "pair": [],
            "special_tokens": {"?": {"id": "?", "ids": vec![1; ids], "tokens": vec!["?"; ids]}}})
    };
    let text = || json!({"Sequence": {"id": "A", "type_id": 0}});
    let token = || json!({"SpecialToken": {"id": "?", "type_id": 0}});
    let mut refused = vec![
        ("normalizer", sequence("normalizers", vec![letters(60); 6])),
        ("normalizer", sequence("normalizers", vec![sequence("normalizers", vec![letters(60)]); 6])),
        ("normalizer", letters(2000)),
        ("normalizer", replace(json!({"String": ""}), &"b".repeat(2000))),
        ("normalizer", json!({"type": "Prepend", "prepend": "a".repeat(2000)})),
        ("normalizer", sequence("normalizers", vec![json!({"type": "ByteLevel"}); 30])),
        (
            "normalizer",
            sequence(
                "normalizers",
                vec![
                    sequence(
                        "normalizers",
                        vec![json!({"type": "NFKC"}), replace(json!({"String": "a"}), "\u{fdfa}")]
                    );
                    4
                ],
            ),
        ),
        ("pre_tokenizer", sequence("pretokenizers", vec![bytes(); 30])),
        ("decoder", sequence("decoders", vec![letters(60); 6])),
        ("decoder", sequence("decoders", vec![bytes(); 6])),
        ("post_processor", template(vec![text(), text()], 1)),
        ("post_processor", sequence("processors", vec![template(vec![text(); 60], 1); 6])),
        ("post_processor", template(vec![text(), token()], 5000)),
    ];
    refused.extend(kept.map(|step| ("normalizer", step)));
    for (step, value) in refused {
        let error = with_steps(&json!({step: value})).map(drop).unwrap_err();
        assert!(matches!(error, TokenizerError::Growth { .. }), "{value}: {error}");
    }
    // The added tokens are changed by the normalizer when the tokenizer is loaded.
    let added = json!([{"id": 2, "content": "a".repeat(1 << 20), "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": true, "special": false}]);
    let steps = json!({"added_tokens": added, "normalizer": letters(1000)});
    let error = with_steps(&steps).map(drop).unwrap_err().to_string();
    assert!(error.contains("added_tokens"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[test]
fn texts_are_as_long_as_the_steps_of_a_tokenizer_allow() {
    let marks = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u{2581}"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
    ]});
    // What published tokenizers do: sentencepiece's marks, Unicode's forms with an expression, and bytes as letters.
    for (steps, most) in [
        (json!({}), 32 << 20),
        (json!({"normalizer": marks}), (32 << 20) / 12),
        (
            json!({"normalizer": {"type": "Sequence", "normalizers": [
                {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ]}, "pre_tokenizer": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true}}),
            (32 << 20) / 44,
        ),
        (
            json!({"normalizer": {"type": "NFC"}, "pre_tokenizer":
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}}),
            (32 << 20) / 6,
        ),
        (
            json!({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(1000)}}),
            33_554,
        ),
    ] {
        let tokenizer = with_steps(&steps).unwrap();
        let error = tokenizer.encode(&"a".repeat(most + 1), false).unwrap_err();
        assert!(
            matches!(error, TokenizerError::TooLong { bytes, most: told } if bytes == most + 1 && told == most),
            "{error}"
        );
        assert!(tokenizer.encode_whole(&"a".repeat(most + 1), Some(4)).is_err());
        tokenizer.encode(&"a".repeat(1000), false).unwrap();
    }
    let longest = with_steps(
        &json!({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(1000)}}),
    );
    longest.unwrap().encode(&"a".repeat(2_000), false).unwrap();
}
