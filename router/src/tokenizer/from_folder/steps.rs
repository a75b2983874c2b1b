//! The steps that a class puts around the model of its tokenizer: normalizer, pre-tokenizer and decoder.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokenizers::{
    ModelWrapper, Tokenizer,
    models::{bpe::Vocab, wordpiece::WordPiece},
};

use super::{
    super::{TokenizerError, splits},
    class::Class,
    is_true,
};

/// The character that sentencepiece writes in place of a space.
pub(super) const SPACE: &str = "\u{2581}";

/// A class's tokenizer for this vocabulary and these merges, without added tokens.
pub(super) fn around(class: Class, model: ModelWrapper, config: &Value) -> Result<Tokenizer, TokenizerError> {
    let mut tokenizer = Tokenizer::new(configured(class, model, config)?);
    let flag = |key: &str, default: bool| config.get(key).map_or(default, is_true);
    let prefix = flag("add_prefix_space", false);
    let (normalizer, pre_tokenizer, decoder) = match class {
        Class::Llama => {
            let prefix = config.get("add_prefix_space").is_none_or(|flag| flag.is_null() || is_true(flag));
            let legacy = flag("legacy", false);
            (
                Value::Null,
                metaspace(prefix.then_some(if legacy { "always" } else { "first" })),
                pieces(prefix),
            )
        }
        Class::CodeLlama => {
            let prefix = config.get("add_prefix_space").is_none_or(|flag| flag.is_null() || is_true(flag));
            (Value::Null, metaspace(prefix.then_some("first")), pieces(true))
        }
        Class::Gemma => (
            json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE}),
            json!({
                "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false,
            }),
            pieces(false),
        ),
        Class::Qwen2 => {
            (json!({"type": "NFC"}), splits::by_regex(splits::QWEN2, prefix), splits::bytes_decoder())
        }
        Class::Gpt2 => (Value::Null, splits::gpt2(prefix), splits::bytes_decoder()),
        Class::GptNeoX => (json!({"type": "NFC"}), splits::gpt2(prefix), splits::bytes_decoder()),
        Class::Bert => (
            json!({
                "type": "BertNormalizer", "clean_text": true,
                "handle_chinese_chars": flag("tokenize_chinese_chars", true),
                "strip_accents": config.get("strip_accents").filter(|flag| !flag.is_null()).map(is_true),
                "lowercase": flag("do_lower_case", true),
            }),
            json!({"type": "BertPreTokenizer"}),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        ),
        Class::Backend | Class::Other => (Value::Null, Value::Null, Value::Null),
    };
    put(&mut tokenizer, normalizer, pre_tokenizer, decoder)?;
    Ok(tokenizer)
}

/// Puts steps around a tokenizer's model; null is none.
pub(super) fn put(
    tokenizer: &mut Tokenizer,
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
) -> Result<(), TokenizerError> {
    tokenizer.with_normalizer(step::<tokenizers::NormalizerWrapper>(normalizer)?);
    tokenizer.with_pre_tokenizer(step::<tokenizers::PreTokenizerWrapper>(pre_tokenizer)?);
    tokenizer.with_decoder(step::<tokenizers::DecoderWrapper>(decoder)?);
    Ok(())
}

/// One step; null is none.
pub(super) fn step<T: DeserializeOwned>(definition: Value) -> Result<Option<T>, TokenizerError> {
    serde_json::from_value(definition).map_err(|error| TokenizerError::Definition(error.into()))
}

/// The model with the settings that the class gives it.
fn configured(class: Class, model: ModelWrapper, config: &Value) -> Result<ModelWrapper, TokenizerError> {
    let unknown = |default: &str| {
        let token = config.get("unk_token").and_then(|token| token.as_str().or(token["content"].as_str()));
        token.unwrap_or(default).to_owned()
    };
    match model {
        ModelWrapper::BPE(mut bpe) => {
            let is_bytes = matches!(class, Class::Qwen2 | Class::Gpt2 | Class::GptNeoX);
            bpe.dropout = None;
            bpe.ignore_merges = false;
            bpe.continuing_subword_prefix = None;
            bpe.end_of_word_suffix = None;
            (bpe.fuse_unk, bpe.byte_fallback) = (!is_bytes, !is_bytes);
            bpe.unk_token = matches!(class, Class::CodeLlama | Class::Gemma).then(|| unknown("<unk>"));
            Ok(bpe.into())
        }
        ModelWrapper::WordPiece(words) => {
            let vocab = tokenizers::Model::get_vocab(&words).into_iter().collect::<Vocab>();
            let words = WordPiece::builder().vocab(vocab).unk_token(unknown("[UNK]")).build();
            Ok(words.map_err(TokenizerError::Definition)?.into())
        }
        model => Ok(model),
    }
}

/// Writes spaces as sentencepiece does, with one more in front of a text, of each text between added tokens, or
/// nowhere.
pub(super) fn metaspace(prepend: Option<&str>) -> Value {
    let prepend = prepend.unwrap_or("never");
    json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": prepend, "split": false})
}

/// Makes text of pieces and bytes. `strip` takes the text's first space away.
fn pieces(strip: bool) -> Value {
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if strip {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": decoders})
}
