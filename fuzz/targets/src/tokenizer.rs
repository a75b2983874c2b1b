//! The files of a folder that a tokenizer is built from.

use std::fs;

use lorax_router::tokenizer::ModelTokenizer;

use crate::{Outcome, must};

/// Begins the line in front of each file, and is followed by the file's name.
const HEAD: &[u8] = b"=== ";
/// The files that an input may have.
const NAMES: [&str; 11] = [
    "added_tokens.json",
    "chat_template.json",
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];
/// Texts that are taken apart.
const TEXTS: [&str; 5] = [
    "",
    "Hello, world! It's 12345 o'clock.\n\n",
    "<s>\u{e9}e\u{301} \u{4f60}\u{597d}\t</s>",
    "  a\r\nB ",
    "aaaaaaaaaaaaaaaa",
];
/// Tokens of a vocabulary that are put together.
const IDS: u32 = 64;

/// Builds the tokenizer of a folder, and takes texts apart with it. An input has lines that begin with `=== ` and name
/// a file, each in front of the content of the file.
pub fn run(bytes: &[u8]) -> Outcome {
    let folder = must(tempfile::tempdir());
    for (name, content) in files(bytes) {
        must(fs::write(folder.path().join(name), content));
    }
    let loaded = ModelTokenizer::load(folder.path(), None);
    if let Ok(model) = &loaded {
        exercise(model);
    }
    Outcome::of(loaded)
}

/// Calls all that a request calls.
pub(crate) fn exercise(model: &ModelTokenizer) {
    for text in TEXTS {
        for add_special in [false, true] {
            if let Ok(ids) = model.encode(text, add_special) {
                model.decode(&ids, add_special);
            }
        }
        let _ = model.encode_whole(text, Some(4));
    }
    for id in (0..IDS).chain([u32::MAX]) {
        let _ = (model.token_text(id), model.token_bytes(id), model.is_special(id));
    }
}

/// Names and contents of the files that an input has.
fn files(bytes: &[u8]) -> Vec<(&'static str, &[u8])> {
    let mut found = Vec::new();
    let mut rest = bytes;
    while let Some((name, behind)) = head(rest) {
        let lines = behind.windows(HEAD.len() + 1);
        let end = lines
            .enumerate()
            .find(|(at, line)| line[0] == b'\n' && line[1..] == *HEAD && head(&behind[at + 1..]).is_some());
        let end = end.map_or(behind.len(), |(at, _)| at);
        found.push((name, &behind[..end]));
        rest = behind.get(end + 1..).unwrap_or_default();
    }
    found
}

/// The name in a head, and what is behind its line.
fn head(bytes: &[u8]) -> Option<(&'static str, &[u8])> {
    let rest = bytes.strip_prefix(HEAD)?;
    NAMES.iter().find_map(|name| Some((*name, rest.strip_prefix(name.as_bytes())?.strip_prefix(b"\n")?)))
}
