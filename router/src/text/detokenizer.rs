//! Turns tokens into text, one token at a time and never half a character.

use std::sync::Arc;

use crate::tokenizer::ModelTokenizer;

/// A byte-level decoder writes this for bytes that are not, or not yet, a character.
pub(super) const REPLACEMENT: char = '\u{fffd}';
/// The most tokens that an incomplete character lies in: it has at most three bytes so far, and a token has at least
/// one. Bytes before those can no longer become part of a character.
const INCOMPLETE: usize = 3;

/// Decodes a sequence one token at a time. Special tokens have no text.
///
/// The text of a token depends on the tokens before it, so each piece is the difference between decoding a few tokens
/// with and without the new ones. The bytes of a character may come in several tokens: there is no text until the
/// character is complete.
pub(crate) struct Detokenizer {
    tokenizer: Arc<ModelTokenizer>,
    /// Tokens of the context, then tokens whose text has not been given out.
    ids: Vec<u32>,
    /// Number of tokens in the context.
    context: usize,
    /// Text of the context.
    before: String,
}

/// Text that has become complete, and the number of tokens that it was made from.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Decoded {
    pub(super) text: String,
    pub(super) tokens: usize,
}

impl Detokenizer {
    /// Continues a prompt: sentencepiece's decoders drop the space that a text begins with, but not that of its
    /// continuation.
    pub(super) fn new(tokenizer: Arc<ModelTokenizer>, prompt: &[u32]) -> Detokenizer {
        let last = prompt.iter().rev().filter(|id| !tokenizer.is_special(**id)).take(INCOMPLETE + 1);
        let mut ids: Vec<u32> = last.copied().collect();
        ids.reverse();
        let end = ids.len();
        let mut detokenizer = Detokenizer { tokenizer, ids, context: 0, before: String::new() };
        detokenizer.give_out(end);
        detokenizer
    }

    /// Takes a token that is not special, and returns the text that has become complete with it.
    pub(super) fn push(&mut self, id: u32) -> Decoded {
        self.ids.push(id);
        self.take(false)
    }

    /// Returns what is left when no more tokens come: incomplete characters as replacement characters.
    pub(super) fn finish(&mut self) -> Decoded {
        self.take(true)
    }

    fn take(&mut self, last: bool) -> Decoded {
        let decode = |end: usize| self.tokenizer.decode(&self.ids[..end], true);
        let mut end = self.ids.len();
        let mut after = decode(end);
        if !last && after.ends_with(REPLACEMENT) {
            end = end.saturating_sub(INCOMPLETE);
            if end <= self.context {
                return Decoded::default();
            }
            after = decode(end);
        }
        let decoded = Decoded { text: added(&self.before, &after).to_owned(), tokens: end - self.context };
        self.give_out(end);
        decoded
    }

    /// Makes the tokens before `end` the context: the fewest that do not begin within a character.
    fn give_out(&mut self, end: usize) {
        let first = end.saturating_sub(INCOMPLETE + 1);
        let context = |from: usize| (from, self.tokenizer.decode(&self.ids[from..end], true));
        let whole = (first..end).rev().map(context).find(|(_, text)| !text.starts_with(REPLACEMENT));
        let (from, before) = whole.unwrap_or_else(|| context(first));
        self.ids.drain(..from);
        self.context = end - from;
        self.before = before;
    }
}

/// The part of `after` that goes beyond `before`, which has been given out.
///
/// A prompt of tokens may end within a character, whose text changes when it is completed. The other way round, the
/// library takes all bytes of a run of byte tokens for no characters if one of them is none, so that characters that
/// have been given out turn into a replacement character for each of their bytes.
fn added<'a>(before: &str, after: &'a str) -> &'a str {
    let mut rest = after;
    for old in before.chars() {
        match rest.strip_prefix(old) {
            Some(behind) => rest = behind,
            None if old == REPLACEMENT => break,
            None => (0..old.len_utf8()).for_each(|_| rest = rest.strip_prefix(REPLACEMENT).unwrap_or(rest)),
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;

    /// Splits texts at every token: the text of the second part is what it adds to the text of the first.
    #[test]
    fn an_answer_is_what_it_adds_to_the_prompt() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures");
        let texts = std::fs::read(fixtures.join("tokenizer/sentencepiece.json")).unwrap();
        let texts: Vec<Value> = serde_json::from_slice(&texts).unwrap();
        let texts = || texts.iter().filter_map(|case| case["text"].as_str());
        for model in ["tokenizer/sentencepiece.gguf", "tiny/model"] {
            let tokenizer = Arc::new(ModelTokenizer::load(&fixtures.join(model), None).unwrap());
            for text in texts().filter(|text| text.len() < 300 && !text.contains(REPLACEMENT)) {
                let ids = tokenizer.encode(text, true).unwrap();
                let whole = tokenizer.decode(&ids, true);
                for at in 1..ids.len() {
                    let (prompt, answer) = ids.split_at(at);
                    let before = tokenizer.decode(prompt, true);
                    if before.ends_with(REPLACEMENT) {
                        continue;
                    }
                    let mut detokenizer = Detokenizer::new(tokenizer.clone(), prompt);
                    let ordinary = answer.iter().filter(|id| !tokenizer.is_special(**id));
                    let mut told: String = ordinary.map(|id| detokenizer.push(*id).text).collect();
                    told += &detokenizer.finish().text;
                    assert_eq!(Some(&*told), whole.strip_prefix(&before), "{text:?} behind {at} tokens");
                }
            }
        }
    }
}
