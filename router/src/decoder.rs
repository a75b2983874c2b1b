//! From tokens to text as they come: never half a character, and no text that may turn out to be a stop string.

use std::sync::Arc;

use crate::tokenizer::ModelTokenizer;

/// What a byte-level decoder writes for bytes that are no character (yet).
const REPLACEMENT: char = '\u{fffd}';
/// Most tokens that an incomplete character lies in: it has three bytes at most, and a token one at least. Bytes before
/// those are no character for good.
const INCOMPLETE: usize = 3;

/// Tokens to text, one at a time; special tokens have none.
///
/// The text of a token depends on the ones before it, so each piece is the difference of decoding a few tokens with and
/// without the new ones. A character's bytes may come in several tokens: until it is whole there is no text.
pub(crate) struct Detokenizer {
    tokenizer: Arc<ModelTokenizer>,
    /// The context, then tokens whose text has not been given out.
    ids: Vec<u32>,
    /// Tokens of the context.
    context: usize,
    /// The context's text.
    before: String,
}

impl Detokenizer {
    /// Begins behind a prompt: sentencepiece's decoders leave out the space that a text begins with.
    pub(crate) fn new(tokenizer: Arc<ModelTokenizer>, prompt: &[u32]) -> Detokenizer {
        let last = prompt.iter().rev().filter(|id| !tokenizer.is_special(**id)).take(INCOMPLETE + 1);
        let mut ids: Vec<u32> = last.copied().collect();
        ids.reverse();
        let end = ids.len();
        let mut detokenizer = Detokenizer { tokenizer, ids, context: 0, before: String::new() };
        detokenizer.give_out(end);
        detokenizer
    }

    /// The text that a token adds; empty while a character is incomplete.
    pub(crate) fn push(&mut self, id: u32) -> String {
        // A special token would be the next one's context, and is none.
        if self.tokenizer.is_special(id) {
            return String::new();
        }
        self.ids.push(id);
        self.take(false)
    }

    /// What is left when no more tokens come: incomplete characters as replacement characters.
    pub(crate) fn finish(&mut self) -> String {
        self.take(true)
    }

    fn take(&mut self, last: bool) -> String {
        let decode = |end: usize| self.tokenizer.decode(&self.ids[..end], true);
        let mut end = self.ids.len();
        let mut after = decode(end);
        if !last && after.ends_with(REPLACEMENT) {
            end = end.saturating_sub(INCOMPLETE);
            if end <= self.context {
                return String::new();
            }
            after = decode(end);
        }
        let new = added(&self.before, &after).to_owned();
        self.give_out(end);
        new
    }

    /// Makes a context of the tokens before `end`: the fewest that do not begin within a character.
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

/// What `after` has beyond `before`. A prompt of tokens may end within a character, which is then another one.
fn added<'a>(before: &str, after: &'a str) -> &'a str {
    let same = before.char_indices().zip(after.chars()).find(|((_, old), new)| old != new);
    after.get(same.map_or(before.len(), |((at, _), _)| at)..).unwrap_or_default()
}

/// Looks for stop strings in text that comes in pieces.
#[derive(Debug, Clone)]
pub(crate) struct StopStrings {
    stops: Vec<String>,
    /// Text that could be the beginning of a stop string.
    held: String,
}

/// What is known after a piece of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scanned {
    /// Text that belongs to the answer for certain.
    pub(crate) text: String,
    /// The stop string that was found; the answer ends before it.
    pub(crate) stop: Option<String>,
}

impl StopStrings {
    pub(crate) fn new(stops: Vec<String>) -> StopStrings {
        StopStrings { stops, held: String::new() }
    }

    /// Takes a piece of text.
    pub(crate) fn push(&mut self, piece: &str) -> Scanned {
        if self.stops.is_empty() {
            return Scanned { text: piece.to_owned(), stop: None };
        }
        self.held.push_str(piece);
        let found = self
            .stops
            .iter()
            // Preparing to look for a long string takes as long as the string.
            .filter(|stop| stop.len() <= self.held.len())
            .filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)))
            .min_by_key(|(at, _)| *at);
        if let Some((at, stop)) = found {
            let stop = stop.clone();
            let text = self.held[..at].to_owned();
            self.held.clear();
            return Scanned { text, stop: Some(stop) };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let text = self.held.drain(..self.held.len() - keep).collect();
        Scanned { text, stop: None }
    }

    /// What was held back, when no more text comes.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that are the beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest)
        .rev()
        .find(|&len| {
            text.is_char_boundary(text.len() - len)
                && stop.as_bytes().starts_with(&text.as_bytes()[text.len() - len..])
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;

    /// Texts, each taken apart at every token: what comes behind the prompt is what it adds to the prompt's text.
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
                    let mut told: String = answer.iter().map(|id| detokenizer.push(*id)).collect();
                    told += &detokenizer.finish();
                    assert_eq!(Some(&*told), whole.strip_prefix(&before), "{text:?} behind {at} tokens");
                }
            }
        }
    }

    /// Text given out and the stop string found, for text that comes in pieces.
    fn scan(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut scanner = StopStrings::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut text = String::new();
        for piece in pieces {
            let scanned = scanner.push(piece);
            text += &scanned.text;
            if scanned.stop.is_some() {
                return (text, scanned.stop);
            }
        }
        (text + &scanner.finish(), None)
    }

    #[test]
    fn stop_strings_are_found_across_pieces() {
        for (stops, pieces, text, stop) in [
            (&["END"][..], &["a E", "N", "D b"][..], "a ", Some("END")),
            (&["END"], &["a E", "N", "X b"], "a ENX b", None),
            (&["aab"], &["a", "a", "a", "b"], "a", Some("aab")),
            (&["b", "ab"], &["xab"], "x", Some("ab")),
            (&["é!"], &["caf", "é", "!"], "caf", Some("é!")),
            (&["é!"], &["caf", "é", "?"], "café?", None),
            (&["\n\n"], &["one\n", "two\n"], "one\ntwo\n", None),
            (&[], &["any", "thing"], "anything", None),
        ] {
            assert_eq!(
                scan(stops, pieces),
                (text.to_owned(), stop.map(str::to_owned)),
                "{stops:?} in {pieces:?}"
            );
        }
    }
}
