//! The bytes that a vocabulary entry stands for.
//!
//! A token may be a part of a character, for which there is no text; its bytes can still be reported. Vocabularies
//! write bytes in one of two ways: byte-level BPE maps each byte to a printable character (the table of GPT-2),
//! sentencepiece has entries `<0x00>` to `<0xFF>` and writes a space as `▁`. Which one a vocabulary uses is known
//! from its decoder.

use std::collections::HashMap;

use super::SharedTokenizer;
use serde_json::Value;

/// One step of the decoder, applied to a single entry.
enum Step {
    /// Each character stands for one byte.
    ByteLevel(HashMap<char, u8>),
    /// `<0x41>` stands for one byte.
    ByteFallback,
    /// One string is written for another.
    Replace { from: String, to: String },
    /// The suffix that ends a word becomes a space.
    Suffix(String),
    /// A word begins with a space unless it has the prefix, which is dropped.
    Continuation(String),
}

/// Turns vocabulary entries into bytes.
pub(super) struct TokenBytes(Vec<Step>);

impl TokenBytes {
    /// Reads the steps from the tokenizer's decoder.
    pub(super) fn new(tokenizer: &SharedTokenizer) -> TokenBytes {
        let mut steps = Vec::new();
        if let Some(decoder) = tokenizer.get_decoder() {
            // The library keeps most of a decoder's settings private, but writes all of them as JSON.
            collect(&serde_json::to_value(decoder).unwrap_or_default(), &mut steps);
        }
        TokenBytes(steps)
    }

    /// The bytes of an entry. Added tokens are kept as they are by byte-level vocabularies, whose alphabet they do not
    /// use, and special tokens by all.
    pub(super) fn of(&self, entry: String, added: bool, special: bool) -> Vec<u8> {
        if special {
            return entry.into_bytes();
        }
        let mut text = entry;
        for step in &self.0 {
            match step {
                Step::ByteLevel(_) if added => {}
                Step::ByteLevel(alphabet) => {
                    // An entry with other characters is literal text: the library decodes it so, too.
                    if let Some(bytes) = text.chars().map(|letter| alphabet.get(&letter).copied()).collect() {
                        return bytes;
                    }
                }
                Step::ByteFallback => {
                    if let Some(byte) = fallback_byte(&text) {
                        return vec![byte];
                    }
                }
                Step::Replace { from, to } => text = text.replace(from, to),
                Step::Suffix(suffix) => text = text.replace(suffix, " "),
                Step::Continuation(prefix) => {
                    text = match text.strip_prefix(prefix) {
                        Some(rest) => rest.to_owned(),
                        None => format!(" {text}"),
                    }
                }
            }
        }
        text.into_bytes()
    }
}

/// The steps of a decoder in order, those of a sequence one after the other. Steps that depend on neighbours, such as
/// stripping the text's first space, say nothing about a single entry.
fn collect(decoder: &Value, steps: &mut Vec<Step>) {
    let text = |key: &str| decoder[key].as_str().unwrap_or_default().to_owned();
    match decoder["type"].as_str().unwrap_or_default() {
        "Sequence" => {
            decoder["decoders"].as_array().into_iter().flatten().for_each(|one| collect(one, steps))
        }
        "ByteLevel" => steps.push(Step::ByteLevel(byte_level_alphabet())),
        "ByteFallback" => steps.push(Step::ByteFallback),
        "Metaspace" => steps.push(Step::Replace { from: text("replacement"), to: " ".into() }),
        "Replace" => {
            if let Some(from) = decoder["pattern"]["String"].as_str() {
                steps.push(Step::Replace { from: from.to_owned(), to: text("content") });
            }
        }
        "BPEDecoder" => steps.push(Step::Suffix(text("suffix"))),
        "WordPiece" => steps.push(Step::Continuation(text("prefix"))),
        _ => {}
    }
}

/// The byte that each character stands for.
fn byte_level_alphabet() -> HashMap<char, u8> {
    byte_level_letters().into_iter().zip(0..=u8::MAX).collect()
}

/// GPT-2's table, the character of each byte: printable bytes of Latin-1 stand for themselves, the others for the
/// characters from U+0100 on.
pub(super) fn byte_level_letters() -> [char; 256] {
    let mut more = '\u{100}'..;
    std::array::from_fn(|byte| match u8::try_from(byte) {
        Ok(byte @ (b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)) => char::from(byte),
        _ => more.next().unwrap_or_default(),
    })
}

/// The byte of an entry such as `<0xE2>`.
fn fallback_byte(entry: &str) -> Option<u8> {
    let digits = entry.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_byte = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_byte.then(|| u8::from_str_radix(digits, 16).ok())?
}
