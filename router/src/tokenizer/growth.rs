//! How much longer the steps of a tokenizer may make a text: their definitions come with adapters and models, whose
//! authors are not trusted, and six replacements of a letter by sixty make 60^6 letters of one.
//!
//! The growth of a step is the most bytes that it makes of one, and that of a tokenizer the product of its steps'. It is
//! found once, when the tokenizer is loaded; a text is then refused by its length alone.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::Value;
use tokenizers::{
    DecoderWrapper, NormalizerWrapper, PostProcessor, PostProcessorWrapper, PreTokenizerWrapper,
    normalizers::Replace,
};

use super::{SharedTokenizer, TokenizerError, from_folder::charsmap, without_panic};

/// Most bytes of a text when it has grown as far as it can.
const MAX_TEXT: usize = 32 << 20;
/// The largest growth of a text that is taken apart. ALBERT's is 484.
const MAX_TEXT_GROWTH: usize = 1024;
/// The largest growth of the text of a token. Sentencepiece's decoders have 3: what is no UTF-8 becomes U+FFFD.
const MAX_TOKEN_GROWTH: usize = 64;
/// Most tokens that are put around a text.
const MAX_ADDED: usize = 1024;

/// The steps of a tokenizer.json around its model, and its added tokens, which some of the steps change when it is
/// loaded.
#[derive(Deserialize)]
struct Steps {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<PostProcessorWrapper>,
    decoder: Option<DecoderWrapper>,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct AddedToken {
    content: String,
}

/// Refuses the definition of a tokenizer whose steps make too much of a text. It is checked before a tokenizer is made
/// of it.
pub(super) fn check(definition: &str) -> Result<(), TokenizerError> {
    // What is no tokenizer at all is refused when one is made of it, with a better reason. The library panics when it
    // reads some of these.
    let steps = without_panic(|| Ok(serde_json::from_str::<Steps>(definition)?));
    let Ok(steps) = steps else { return Ok(()) };
    let growth = growth(steps.normalizer.as_ref(), steps.pre_tokenizer.as_ref());
    let added: usize = steps.added_tokens.iter().map(|token| token.content.len()).sum();
    let copies = steps.post_processor.as_ref().map_or(1, copies);
    let around = steps.post_processor.as_ref().map_or(0, |processor| processor.added_tokens(false));
    let of_token = steps.decoder.as_ref().map_or(1, decoded);
    let refused = [
        ("normalizer and pre_tokenizer", growth, MAX_TEXT_GROWTH),
        ("added_tokens with the normalizer", added.saturating_mul(growth), MAX_TEXT),
        ("post_processor", copies, 1),
        ("post_processor", around, MAX_ADDED),
        ("decoder", of_token, MAX_TOKEN_GROWTH),
    ];
    match refused.into_iter().find(|(_, growth, most)| growth > most) {
        Some((step, growth, most)) => Err(TokenizerError::Growth { step, growth, most }),
        None => Ok(()),
    }
}

/// The most bytes of a text that a tokenizer takes.
pub(super) fn longest_text(tokenizer: &SharedTokenizer) -> usize {
    MAX_TEXT / growth(tokenizer.get_normalizer(), tokenizer.get_pre_tokenizer())
}

fn growth(normalizer: Option<&NormalizerWrapper>, pre_tokenizer: Option<&PreTokenizerWrapper>) -> usize {
    let normalized = normalizer.map_or(1, |step| normalized(step, &mut 1));
    normalized.saturating_mul(pre_tokenizer.map_or(1, pre_tokenized)).max(1)
}

/// Unicode's forms and cases that follow each other find little left to change: of these, `unicode` is the growth that
/// is counted already.
fn normalized(step: &NormalizerWrapper, unicode: &mut usize) -> usize {
    let growth = match step {
        NormalizerWrapper::Sequence(steps) => {
            let steps = steps.as_ref().iter().map(|step| normalized(step, unicode));
            return steps.fold(1, usize::saturating_mul);
        }
        NormalizerWrapper::StripNormalizer(_)
        | NormalizerWrapper::StripAccents(_)
        | NormalizerWrapper::Nmt(_) => 1,
        // U+0390, of two bytes, becomes six.
        NormalizerWrapper::NFC(_) | NormalizerWrapper::NFD(_) => return further(3, unicode),
        // U+FDFA, of three bytes, becomes 33.
        NormalizerWrapper::NFKC(_) | NormalizerWrapper::NFKD(_) => return further(11, unicode),
        // U+0130, of two bytes, becomes three.
        NormalizerWrapper::Lowercase(_) => return further(2, unicode),
        // Both, and a space on each side of an ideograph.
        NormalizerWrapper::BertNormalizer(_) => return further(6, unicode),
        NormalizerWrapper::Precompiled(map) => {
            let map = serde_json::to_value(map).unwrap_or_default();
            let map = map["precompiled_charsmap"].as_str().and_then(|map| STANDARD.decode(map).ok());
            map.and_then(|map| charsmap::growth(&map)).unwrap_or(usize::MAX)
        }
        NormalizerWrapper::Replace(step) => replaced(step),
        // It stands before every part of a text that is no added token, so perhaps before every byte.
        NormalizerWrapper::Prepend(step) => step.prepend.len().saturating_add(1),
        NormalizerWrapper::ByteLevel(_) => 2,
    };
    if growth > 1 {
        *unicode = 1;
    }
    growth
}

/// The growth by one of Unicode's forms or cases, as far as it is not counted yet.
fn further(growth: usize, counted: &mut usize) -> usize {
    let further = growth.div_ceil(*counted);
    *counted = growth.max(*counted);
    further
}

fn replaced(step: &Replace) -> usize {
    let definition = serde_json::to_value(step).unwrap_or_default();
    let shortest = match (&definition["pattern"]["String"], &definition["pattern"]["Regex"]) {
        (Value::String(text), _) => text.len(),
        (_, Value::String(regex)) => shortest_match(regex),
        _ => 0,
    };
    // What is found where nothing is stands between any two bytes.
    if shortest == 0 {
        step.content.len().saturating_add(1)
    } else {
        step.content.len().div_ceil(shortest).max(1)
    }
}

/// The fewest bytes that a regular expression finds, as far as is known.
fn shortest_match(regex: &str) -> usize {
    // What looks around or back, the library of Rust does not read; it may find nothing.
    regex_syntax::parse(regex).ok().and_then(|regex| regex.properties().minimum_len()).unwrap_or(0)
}

fn pre_tokenized(step: &PreTokenizerWrapper) -> usize {
    match step {
        PreTokenizerWrapper::Sequence(steps) => {
            steps.as_ref().iter().map(pre_tokenized).fold(1, usize::saturating_mul)
        }
        PreTokenizerWrapper::ByteLevel(_) => 2,
        // It replaces spaces, and may stand before every part of a text, too.
        PreTokenizerWrapper::Metaspace(step) => step.get_replacement().len_utf8() + 1,
        PreTokenizerWrapper::BertPreTokenizer(_)
        | PreTokenizerWrapper::Delimiter(_)
        | PreTokenizerWrapper::Whitespace(_)
        | PreTokenizerWrapper::Split(_)
        | PreTokenizerWrapper::Punctuation(_)
        | PreTokenizerWrapper::WhitespaceSplit(_)
        | PreTokenizerWrapper::Digits(_)
        | PreTokenizerWrapper::UnicodeScripts(_)
        | PreTokenizerWrapper::FixedLength(_) => 1,
    }
}

fn decoded(step: &DecoderWrapper) -> usize {
    match step {
        DecoderWrapper::Sequence(steps) => {
            steps.get_decoders().iter().map(decoded).fold(1, usize::saturating_mul)
        }
        DecoderWrapper::Replace(step) => replaced(step),
        // A byte that is no UTF-8 becomes U+FFFD.
        DecoderWrapper::ByteLevel(_) => 3,
        // What they replace by a space may be empty.
        DecoderWrapper::BPE(_) | DecoderWrapper::WordPiece(_) | DecoderWrapper::CTC(_) => 2,
        DecoderWrapper::Metaspace(_)
        | DecoderWrapper::Fuse(_)
        | DecoderWrapper::Strip(_)
        | DecoderWrapper::ByteFallback(_) => 1,
    }
}

/// How often a text stands in what a post-processor makes of it.
fn copies(step: &PostProcessorWrapper) -> usize {
    match step {
        PostProcessorWrapper::Sequence(steps) => {
            steps.as_ref().iter().map(copies).fold(1, usize::saturating_mul)
        }
        PostProcessorWrapper::Template(step) => {
            let definition = serde_json::to_value(step).unwrap_or_default();
            let pieces = definition["single"].as_array().into_iter().flatten();
            pieces.filter(|piece| piece.get("Sequence").is_some()).count()
        }
        PostProcessorWrapper::Roberta(_)
        | PostProcessorWrapper::Bert(_)
        | PostProcessorWrapper::ByteLevel(_) => 1,
    }
}
