//! The tokenizer that is built from a GGUF file, against transformers' for the same file.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "tokenizer/mutations.rs"]
mod mutations;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use lorax_router::tokenizer::{ModelTokenizer, TokenizerError};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    /// The text of the ids.
    decoded: String,
}

fn fixture(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/tokenizer").join(file)
}

fn cases(file: &str) -> Vec<Case> {
    serde_json::from_slice(&std::fs::read(fixture(file)).unwrap()).unwrap()
}

/// A byte-level vocabulary, and the ids of texts with each way to split them.
#[derive(Deserialize)]
struct ByteLevel {
    tokens: Vec<String>,
    merges: Vec<[String; 2]>,
    /// Number of tokens at the beginning that are special.
    special: usize,
    cases: Vec<SplitCase>,
}

#[derive(Deserialize)]
struct SplitCase {
    text: String,
    /// The ids for each way to split, or for several ways with a space between their names.
    ids: BTreeMap<String, Vec<u32>>,
}

impl SplitCase {
    fn ids(&self, pre: &str) -> &[u32] {
        let ids = self.ids.iter().find(|(ways, _)| ways.split(' ').any(|way| way == pre));
        ids.map(|(_, ids)| &**ids).unwrap()
    }
}

impl ByteLevel {
    /// A tokenizer of the vocabulary that splits texts in this way.
    fn tokenizer(&self, pre: &str) -> Result<ModelTokenizer, TokenizerError> {
        let types = (0..self.tokens.len()).map(|id| if id < self.special { CONTROL } else { 1 });
        let text = |text: &String| Metadata::text(text);
        Metadata::default()
            .with("model", 8, &Metadata::text("gpt2"))
            .with("pre", 8, &Metadata::text(pre))
            .with_array("tokens", 8, self.tokens.iter().map(text).collect())
            .with_array("token_type", 5, types.map(|ty| ty.to_le_bytes().to_vec()).collect())
            .with_array("merges", 8, self.merges.iter().map(|pair| text(&pair.join(" "))).collect())
            .try_load(None)
    }
}

#[test]
fn byte_level_ids_are_those_of_the_library_with_each_split() {
    let fixture: ByteLevel = serde_json::from_slice(&fs::read(fixture("byte_level.json")).unwrap()).unwrap();
    assert!(fixture.cases.len() > 250);
    for (way, others) in [
        ("gpt-2", &["phi-2", "a.x-4.0", "gigachat", "mellum", "trillion"][..]),
        ("smollm", &["command-r", "mellum2", "minerva-7b", "refact", "starcoder"]),
        ("llama-bpe", &["llama3", "llama-v3", "falcon3", "midm-2.0", "pixtral"]),
        ("dbrx", &["smaug-bpe"]),
        ("qwen2", &["deepseek-r1-qwen", "kormo", "megrez"]),
        ("tekken", &[]),
        ("gpt-4o", &["kanana2", "llama4"]),
    ] {
        for pre in others.iter().chain([&way]) {
            let tokenizer = fixture.tokenizer(pre).unwrap();
            for case in &fixture.cases {
                let ids = tokenizer.encode(&case.text, false).unwrap();
                assert_eq!(ids, case.ids(way), "{pre} {:?}", case.text);
                // All bytes are in the vocabulary, so nothing gets lost.
                assert_eq!(tokenizer.decode(&ids, false), case.text, "{pre}");
            }
        }
    }
}

/// llama.cpp's other names, and some that it does not know.
const OTHER_WAYS: &str = "\
    default minicpm5 falcon-h1 lfm2 jina-v5-nano deepseek-llm deepseek-coder deepseek-v3 spark2_5 youtu \
    falcon mpt jina-es jina-de jina-v2-es jina-v2-de modern-bert jais-2 gemma4 sarvam-moe jina-v1-en \
    jina-v2-code roberta-bpe whitespace f2llmv2 qwen35 stablelm2 olmo poro-chat glm4 chatglm-bpe viking \
    jais codeshell bloom gpt3-finnish exaone exaone4 exaone-moe chameleon talkie granite-embed-multi-97m \
    tiny_aya cohere2moe superbpe granite-docling bailingmoe bailingmoe2 llada-moe seed-coder hunyuan \
    hunyuan-dense hy_v4 joyai-llm kimi-k2 ufakzeka grok-2 afmoe laguna minimax-m2 solar-open gpt-5 QWEN2";

#[test]
fn other_ways_to_split_are_refused_by_name() {
    let fixture: ByteLevel = serde_json::from_slice(&fs::read(fixture("byte_level.json")).unwrap()).unwrap();
    for pre in OTHER_WAYS.split(' ').chain(["", "qwen2 "]) {
        let refusal = fixture.tokenizer(pre).err().expect(pre).to_string();
        assert!(refusal.contains(&format!("tokenizer.ggml.pre {pre:?}")), "{refusal}");
    }
}

#[test]
fn sentencepiece_is_that_of_transformers() {
    for (name, count) in [("sentencepiece", 300), ("sentencepiece_phi3", 90), ("sentencepiece_gemma", 90)] {
        let tokenizer = ModelTokenizer::load(&fixture(&format!("{name}.gguf")), None).unwrap();
        let cases = cases(&format!("{name}.json"));
        assert!(cases.len() > count, "{}", cases.len());
        for case in cases {
            assert_eq!(tokenizer.encode(&case.text, true).unwrap(), case.ids, "{name} {:?}", case.text);
            assert_eq!(tokenizer.decode(&case.ids, false), case.decoded, "{name} {:?}", case.text);
        }
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
    assert_eq!(tokenizer.special_tokens["eos_token"], "</s>");
    assert!(tokenizer.chat_templates["default"].contains("add_generation_prompt"));
}

#[test]
fn a_given_configuration_goes_before_all_of_the_models() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path();
    fs::copy(tiny().join("tokenizer.json"), model.join("tokenizer.json")).unwrap();
    let write = |name: &str, text: &str| fs::write(model.join(name), text).unwrap();
    let given = model.join("given.json");
    let template = |model: &Path, given: Option<&Path>| {
        ModelTokenizer::load(model, given).unwrap().chat_templates.remove("default")
    };
    write("given.json", r#"{"chat_template": "given", "eos_token": "<given>"}"#);
    assert_eq!(template(model, None), None);
    write("tokenizer_config.json", r#"{"chat_template": "own", "bos_token": "<own>"}"#);
    assert_eq!(template(model, None).as_deref(), Some("own"));
    write("chat_template.jinja", "file");
    assert_eq!(template(model, None).as_deref(), Some("file"));
    assert_eq!(template(model, Some(&given)).as_deref(), Some("given"));
    let tokens = ModelTokenizer::load(model, Some(&given)).unwrap();
    assert_eq!(
        tokens.special_tokens.into_iter().collect::<Vec<_>>(),
        [("eos_token".to_owned(), "<given>".to_owned())],
        "it replaces the own"
    );
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

/// `token_type` of a special token.
const CONTROL: i32 = 3;

/// A GGUF file of metadata alone, being put together.
#[derive(Clone, Default)]
struct Metadata {
    pairs: u64,
    bytes: Vec<u8>,
}

impl Metadata {
    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    /// A pair with its type's code and the value's bytes as they are in the file.
    fn with(self, key: &str, code: u32, value: &[u8]) -> Metadata {
        self.with_full(&format!("tokenizer.ggml.{key}"), code, value)
    }

    fn with_full(mut self, key: &str, code: u32, value: &[u8]) -> Metadata {
        self.bytes.extend([&Self::text(key), &code.to_le_bytes()[..], value].concat());
        self.pairs += 1;
        self
    }

    fn with_array(self, key: &str, code: u32, elements: Vec<Vec<u8>>) -> Metadata {
        let head = [&code.to_le_bytes()[..], &(elements.len() as u64).to_le_bytes()].concat();
        self.with(key, 9, &[head, elements.concat()].concat())
    }

    /// The tiny model's vocabulary, to be split in this way, with its end of a sequence.
    fn tiny(pre: &str) -> Metadata {
        Metadata::tiny_with(pre, &[], CONTROL).with("eos_token_id", 4, &1u32.to_le_bytes())
    }

    /// The tiny model's vocabulary and more tokens of one type behind it.
    fn tiny_with(pre: &str, more: &[&str], ty: i32) -> Metadata {
        let definition = fs::read(tiny().join("tokenizer.json")).unwrap();
        let definition: Value = serde_json::from_slice(&definition).unwrap();
        let vocab = definition["model"]["vocab"].as_object().unwrap();
        let mut tokens: Vec<&String> = vocab.keys().collect();
        tokens.sort_by_key(|token| vocab[*token].as_u64());
        let types = (0..tokens.len()).map(|id| if id < 4 { CONTROL } else { 1 });
        let types = types.chain(more.iter().map(|_| ty));
        let merges = definition["model"]["merges"].as_array().unwrap();
        let merge = |merge: &Value| format!("{} {}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap());
        Metadata::default()
            .with("model", 8, &Self::text("gpt2"))
            .with("pre", 8, &Self::text(pre))
            .with_array(
                "tokens",
                8,
                tokens.into_iter().map(String::as_str).chain(more.iter().copied()).map(Self::text).collect(),
            )
            .with_array("token_type", 5, types.map(|ty| ty.to_le_bytes().to_vec()).collect())
            .with_array("merges", 8, merges.iter().map(|pair| Self::text(&merge(pair))).collect())
    }

    fn load(&self) -> ModelTokenizer {
        self.load_with(None)
    }

    fn load_given(&self, config: &Path) -> ModelTokenizer {
        self.load_with(Some(config))
    }

    fn load_with(&self, given: Option<&Path>) -> ModelTokenizer {
        self.try_load(given).unwrap()
    }

    fn try_load(&self, given: Option<&Path>) -> Result<ModelTokenizer, TokenizerError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let head = [&b"GGUF"[..], &3u32.to_le_bytes(), &0u64.to_le_bytes(), &self.pairs.to_le_bytes()];
        fs::write(file.path(), [&head.concat(), &self.bytes[..]].concat()).unwrap();
        ModelTokenizer::load(file.path(), given)
    }
}

#[test]
fn a_file_says_which_tokens_go_around_a_text() {
    let around = |metadata: &Metadata| {
        let tokenizer = metadata.load();
        let bare = tokenizer.encode("Licensor", false).unwrap();
        let whole = tokenizer.encode("Licensor", true).unwrap();
        let at = whole.windows(bare.len()).position(|ids| ids == bare).unwrap();
        (whole[..at].to_vec(), whole[at + bare.len()..].to_vec())
    };
    let flag = |metadata: &Metadata, key: &str, on: bool| metadata.clone().with(key, 7, &[on.into()]);
    for (pre, by_default) in [("llama-bpe", vec![0]), ("gpt-2", vec![])] {
        let nameless = Metadata::tiny(pre);
        let silent = nameless.clone().with("bos_token_id", 4, &0u32.to_le_bytes());
        assert_eq!(around(&silent), (by_default, vec![]), "{pre}");
        assert_eq!(around(&flag(&silent, "add_bos_token", true)), (vec![0], vec![]), "{pre}");
        let without = flag(&silent, "add_bos_token", false);
        assert_eq!(around(&without), (vec![], vec![]), "{pre}");
        assert_eq!(around(&flag(&without, "add_eos_token", true)), (vec![], vec![1]), "{pre}");
        assert_eq!(around(&flag(&nameless, "add_bos_token", true)), (vec![], vec![]), "no such token, {pre}");
    }
}

#[test]
fn a_token_has_the_text_that_it_adds_within_a_text() {
    let tokenizer = ModelTokenizer::load(&tiny(), None).unwrap();
    for text in ["a", " ", "<s>", "or"] {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(ids.len(), 1, "{text}");
        assert_eq!(tokenizer.token_text(ids[0]), text);
    }
}

#[test]
fn tokens_have_their_bytes() {
    let byte_level = ModelTokenizer::load(&tiny(), None).unwrap();
    let sentencepiece = ModelTokenizer::load(&fixture("sentencepiece.gguf"), None).unwrap();
    let texts = [
        "Hello",
        " the License",
        "caf\u{e9}",
        "\u{65e5}\u{672c}\u{8a9e}",
        "\u{1f642}",
        "a\tb\nc",
        "\u{0}\u{7f}\u{80}",
        "\u{a0}\u{ad}\u{100}",
        "<0x41>",
        "1 + 1 = 2",
        "\u{1f469}\u{200d}\u{1f467}",
        "\u{627}\u{644}",
    ];
    for text in texts {
        let bytes = |tokenizer: &ModelTokenizer| -> Vec<u8> {
            let ids = tokenizer.encode(text, false).unwrap();
            ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).collect()
        };
        assert_eq!(bytes(&byte_level), text.as_bytes(), "{text:?}");
        // Sentencepiece begins every text with a space.
        let spaced = if text.starts_with(' ') { text.to_owned() } else { format!(" {text}") };
        assert_eq!(bytes(&sentencepiece), spaced.as_bytes(), "{text:?}");
    }
    let parts = byte_level.encode("\u{1f642}", false).unwrap();
    let parts: Vec<Vec<u8>> = parts.iter().map(|id| byte_level.token_bytes(*id)).collect();
    assert!(parts.len() > 1, "this character is several tokens");
    assert_eq!(parts[0][0], 0xF0);
    for tokenizer in [&byte_level, &sentencepiece] {
        let size = tokenizer.tokenizer.get_vocab_size(true) as u32;
        assert_eq!(tokenizer.token_bytes(size), b"", "no such token");
        for id in 0..size {
            let (text, bytes) = (tokenizer.token_text(id), tokenizer.token_bytes(id));
            if text.contains('\u{fffd}') {
                assert!(std::str::from_utf8(&bytes).is_err(), "{id} {text:?} {bytes:?}");
            } else {
                assert_eq!(bytes, text.as_bytes(), "{id} {text:?}");
            }
        }
    }
    assert_eq!(byte_level.token_bytes(1), b"</s>", "special tokens have the bytes of their names");
}

#[test]
fn a_file_says_at_which_tokens_a_text_ends() {
    // 1 is `</s>`, which every case has.
    let plain = || Metadata::tiny("gpt-2");
    let named = |names: &[&str]| {
        let mut metadata = Metadata::tiny_with("gpt-2", names, CONTROL);
        metadata = metadata.with("eos_token_id", 4, &1u32.to_le_bytes());
        metadata
    };
    let id = |id: u32| id.to_le_bytes();
    let cases = [
        (plain(), vec![1]),
        (plain().with("eot_token_id", 4, &id(3)), vec![1, 3]),
        (plain().with("eom_token_id", 4, &id(2)), vec![1, 2]),
        (plain().with("eot_token_id", 4, &id(3)).with("eom_token_id", 4, &id(2)), vec![1, 2, 3]),
        (plain().with("eot_token_id", 4, &id(1)), vec![1]),
        (plain().with("eot_token_id", 4, &id(99_999)), vec![1]),
        (plain().with("fim_pad_token_id", 4, &id(7)), vec![1, 7]),
        (named(&["<|eot_id|>"]), vec![1, 320]),
        (named(&["<|im_end|>", "x", "<|endoftext|>"]), vec![1, 320, 322]),
        (named(&["<|im_start|>", "<|start_header_id|>"]), vec![1]),
        (named(&["<end_of_turn>", "<start_of_turn>", "<eos>"]), vec![1, 320, 322]),
        (named(&["<|end_of_text|>", "<|eom_id|>"]), vec![1, 320, 321]),
        (named(&["<|end|>"]), vec![1, 320]),
        (named(&["<|end|>", "<|return|>", "<|call|>"]), vec![1, 321, 322]),
        (named(&["<|end|>", "<|calls|>", "<|flush|>"]), vec![1, 321, 322]),
        (named(&["<|tool_response>", "<turn|>"]), vec![320, 321]),
        (named(&["<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>"]), vec![1, 320]),
        (Metadata::tiny_with("gpt-2", &["<|eot_id|>"], 1), vec![1, 320]),
    ];
    for (index, (metadata, ends)) in cases.iter().enumerate() {
        assert_eq!(metadata.load().end_ids(), *ends, "case {index}");
    }
    let folder = tempfile::tempdir().unwrap();
    let given = folder.path().join("given.json");
    fs::write(&given, r#"{"eos_token": "<s>"}"#).unwrap();
    let file = plain().with("eot_token_id", 4, &id(3)).with_full(
        "tokenizer.chat_template",
        8,
        &Metadata::text("own"),
    );
    assert_eq!(file.load_given(&given).end_ids(), [1, 3, 0]);
    assert_eq!(file.load_given(&given).chat_templates["default"], "own");
    fs::write(&given, r#"{"chat_template": "given"}"#).unwrap();
    assert_eq!(file.load_given(&given).chat_templates["default"], "given");
    assert_eq!(file.load_given(&given).end_ids(), [1, 3]);
}

/// A folder with the tiny model's tokenizer and these files.
fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(tiny().join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    for (name, content) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // A template is text, everything else is JSON.
        let text = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
        fs::write(path, text).unwrap();
    }
    folder
}

#[test]
fn special_tokens_are_those_of_transformers() {
    let object = |text: &str| json!({"content": text, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false});
    let mut typed = object("<s>");
    typed["__type"] = "AddedToken".into();
    let decoder = json!({"0": object("<s>")});
    let endoftext = "<|endoftext|>";
    // tokenizer_config.json, special_tokens_map.json, what transformers 5.24 has as `special_tokens_map`.
    let cases = [
        (json!({}), None, json!({})),
        (json!({"bos_token": null, "eos_token": "</s>"}), None, json!({"eos_token": "</s>"})),
        (json!({"bos_token": typed}), None, json!({"bos_token": "<s>"})),
        (json!({"bos_token": object("<s>")}), None, json!({"bos_token": "<s>"})),
        (
            json!({"bos_token": null, "eos_token": "</s>"}),
            Some(json!({"bos_token": "<s>", "eos_token": object("<|user|>")})),
            json!({"bos_token": "<s>", "eos_token": "<|user|>"}),
        ),
        (
            json!({"bos_token": null, "eos_token": "</s>", "added_tokens_decoder": decoder}),
            Some(json!({"bos_token": "<s>"})),
            json!({"eos_token": "</s>"}),
        ),
        (json!({"eos_token": "</s>"}), Some(json!({"eos_token": null})), json!({})),
        (
            json!({"image_token": "<img>", "additional_special_tokens": ["<x>"], "extra_special_tokens": {"boi_token": "<boi>"}}),
            None,
            json!({"image_token": "<img>", "boi_token": "<boi>"}),
        ),
        (
            json!({"add_bos_token": true, "weird_token": "x", "use_token": true}),
            None,
            json!({"weird_token": "x"}),
        ),
        (
            json!({"bos_token": "", "eos_token": "unknown"}),
            None,
            json!({"bos_token": "", "eos_token": "unknown"}),
        ),
        (
            json!({"tokenizer_class": "Qwen2Tokenizer", "pad_token": null}),
            None,
            json!({"eos_token": endoftext, "unk_token": endoftext}),
        ),
        (
            json!({"tokenizer_class": "GPT2TokenizerFast", "bos_token": "<s>"}),
            None,
            json!({"bos_token": "<s>", "eos_token": endoftext, "unk_token": endoftext}),
        ),
        (json!({"tokenizer_class": "LlamaTokenizerFast"}), None, json!({})),
    ];
    for (config, map, expected) in cases {
        let mut files = vec![("tokenizer_config.json", config.clone())];
        files.extend(map.map(|map| ("special_tokens_map.json", map)));
        let tokenizer = ModelTokenizer::load(folder(&files).path(), None).unwrap();
        assert_eq!(json!(tokenizer.special_tokens), expected, "{config}");
    }
    let alone = folder(&[("special_tokens_map.json", json!({"eos_token": "<|user|>"}))]);
    let tokenizer = ModelTokenizer::load(alone.path(), None).unwrap();
    assert_eq!(
        (json!(tokenizer.special_tokens), tokenizer.end_ids()),
        (json!({"eos_token": "<|user|>"}), &[2][..])
    );
}

#[test]
fn templates_come_from_where_transformers_looks() {
    let config = "tokenizer_config.json";
    let named = json!({"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]});
    let processor = ("chat_template.json", json!({"chat_template": "p"}));
    let own = (config, json!({"chat_template": "c"}));
    let file = ("chat_template.jinja", json!("f"));
    let more = ("additional_chat_templates/tool_use.jinja", json!("m"));
    let cases = [
        (vec![], json!({})),
        (vec![own.clone()], json!({"default": "c"})),
        (vec![(config, named.clone())], json!({"default": "d", "tool_use": "t"})),
        (
            vec![(config, json!({"chat_template": {"default": "d", "rag": "r"}}))],
            json!({"default": "d", "rag": "r"}),
        ),
        (vec![(config, json!({"chat_template": null}))], json!({})),
        (vec![(config, json!({"chat_template": []})), processor.clone()], json!({"default": "p"})),
        (vec![processor.clone()], json!({"default": "p"})),
        (vec![processor.clone(), own.clone()], json!({"default": "c"})),
        (vec![file.clone(), own.clone(), processor.clone()], json!({"default": "f"})),
        (vec![file.clone(), more.clone(), (config, named.clone())], json!({"default": "f", "tool_use": "m"})),
        (vec![more.clone(), own.clone()], json!({"tool_use": "m"})),
        (vec![file, ("additional_chat_templates/notes.txt", json!("n"))], json!({"default": "f"})),
    ];
    for (files, expected) in cases {
        let tokenizer = ModelTokenizer::load(folder(&files).path(), None).unwrap();
        assert_eq!(json!(tokenizer.chat_templates), expected, "{files:?}");
    }
    let given = folder(&[("given.json", named)]);
    let tokenizer = ModelTokenizer::load(folder(&[more, own]).path(), Some(&given.path().join("given.json")));
    assert_eq!(json!(tokenizer.unwrap().chat_templates), json!({"default": "d", "tool_use": "t"}));
}

#[test]
fn a_file_has_its_templates_and_special_tokens() {
    let text = |text: &str| Metadata::text(text);
    let metadata = Metadata::tiny("gpt-2")
        .with_full("tokenizer.chat_template", 8, &text("d"))
        .with_full("tokenizer.chat_template.tool_use", 8, &text("t"))
        .with_full("tokenizer.chat_template.mine", 8, &text("m"))
        .with("bos_token_id", 4, &0u32.to_le_bytes())
        .with("padding_token_id", 4, &2u32.to_le_bytes())
        .with("unknown_token_id", 4, &99_999u32.to_le_bytes());
    let tokenizer = metadata.load();
    assert_eq!(json!(tokenizer.chat_templates), json!({"default": "d", "tool_use": "t"}));
    let special = json!({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|user|>"});
    assert_eq!(json!(tokenizer.special_tokens), special);
    let names = [&8u32.to_le_bytes()[..], &1u64.to_le_bytes(), &text("mine")].concat();
    let listed = metadata.with_full("tokenizer.chat_templates", 9, &names).load();
    assert_eq!(json!(listed.chat_templates), json!({"default": "d", "mine": "m", "tool_use": "t"}));
}
