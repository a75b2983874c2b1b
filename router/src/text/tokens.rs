//! Groups tokens whose texts become complete together, and says which of them each part of the text belongs to.

use std::{mem, sync::Arc};

use super::{
    Alternative, Ending, TokenText,
    detokenizer::{Decoded, Detokenizer, REPLACEMENT},
};
use crate::{generation::Scored, tokenizer::ModelTokenizer};

/// A token before it has a text.
#[derive(Debug, Clone)]
pub(super) struct NewToken {
    pub(super) id: u32,
    pub(super) logprob: Option<f32>,
    pub(super) top: Vec<Scored>,
}

/// Tokens that make up complete characters together: nearly always one token. A special token is a unit by itself.
#[derive(Debug)]
pub(super) struct Unit {
    pub(super) text: String,
    /// Whether the text is not part of the answer.
    pub(super) hidden: bool,
    pub(super) tokens: Vec<Placed>,
}

/// Whether a token is special, which decides how it is reported.
enum Kind {
    Ordinary,
    Special { visible: bool },
}

/// A token with its place in the text of its unit, in bytes.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    pub(super) token: TokenText,
    /// Position at which its bytes begin.
    pub(super) start: usize,
    /// Position at which its text ends: before a character of which it has only a part.
    pub(super) text_end: usize,
    /// Position at which the last character ends of which it has a byte.
    pub(super) end: usize,
}

impl Placed {
    /// Moves the place from the unit's text into a longer one.
    pub(super) fn shift(mut self, by: usize) -> Placed {
        self.start += by;
        self.text_end += by;
        self.end += by;
        self
    }

    /// The token without what lies behind `at`, a border between characters. Nothing may be left.
    pub(super) fn cut(mut self, at: usize) -> TokenText {
        if self.end > at {
            let surplus = self.text_end.saturating_sub(at).min(self.token.text.len());
            self.token.text.truncate(self.token.text.len() - surplus);
            self.token.bytes.truncate(at.saturating_sub(self.start));
        }
        self.token
    }
}

/// Makes units of tokens as they come.
pub(super) struct Tokens {
    tokenizer: Arc<ModelTokenizer>,
    detokenizer: Detokenizer,
    /// Tokens whose text is not complete.
    pending: Vec<NewToken>,
    /// Whether special tokens are text.
    show_special: bool,
    /// Special tokens that are text in any case.
    marks: Vec<u32>,
}

impl Tokens {
    /// Continues a prompt.
    pub(super) fn new(tokenizer: Arc<ModelTokenizer>, prompt: &[u32], ending: &Ending) -> Tokens {
        let detokenizer = Detokenizer::new(tokenizer.clone(), prompt);
        let (show_special, marks) = (ending.show_special, ending.marks.clone());
        Tokens { detokenizer, tokenizer, pending: Vec::new(), show_special, marks }
    }

    /// Takes a token and returns the units that are complete with it. A special token ends the character before it.
    pub(super) fn push(&mut self, token: NewToken) -> Vec<Unit> {
        if self.tokenizer.is_special(token.id) {
            let visible = self.show_special || self.marks.contains(&token.id);
            return self.push_special(token, visible);
        }
        let decoded = self.detokenizer.push(token.id);
        self.pending.push(token);
        self.unit(decoded).into_iter().collect()
    }

    /// The same for a token that ends the sequence, and whose text is not part of the answer.
    pub(super) fn push_hidden(&mut self, token: NewToken) -> Vec<Unit> {
        self.push_special(token, false)
    }

    fn push_special(&mut self, token: NewToken, visible: bool) -> Vec<Unit> {
        let special = self.special(token, visible);
        self.finish().into_iter().chain([special]).collect()
    }

    /// The unit of all that is left, when no more tokens come.
    pub(super) fn finish(&mut self) -> Option<Unit> {
        let decoded = self.detokenizer.finish();
        self.unit(decoded)
    }

    fn unit(&mut self, decoded: Decoded) -> Option<Unit> {
        let rest = self.pending.split_off(decoded.tokens);
        let tokens = mem::replace(&mut self.pending, rest);
        if tokens.is_empty() {
            return None;
        }
        let bytes = self.bytes(&tokens, &decoded.text);
        let exact = bytes.concat() == decoded.text.as_bytes();
        let mut placed = Vec::new();
        let mut start = 0;
        let mut told = 0;
        let count = tokens.len();
        for (i, (token, bytes)) in tokens.into_iter().zip(bytes).enumerate() {
            // Bytes that are no characters cannot be told apart: their text belongs to the last token.
            let (behind, last) = (start + bytes.len(), i + 1 == count);
            let (text_end, end) = match exact {
                true => (floor_char(&decoded.text, behind), ceil_char(&decoded.text, behind)),
                false if last => (decoded.text.len(), decoded.text.len()),
                false => (0, decoded.text.len()),
            };
            let text = decoded.text[told..text_end].to_owned();
            let token = self.report(token, text, bytes, Kind::Ordinary);
            placed.push(Placed { token, start: if exact { start } else { 0 }, text_end, end });
            (start, told) = (behind, text_end);
        }
        Some(Unit { text: decoded.text, hidden: false, tokens: placed })
    }

    /// The bytes of each token. Those of a token that is text by itself are the text's: what a token adds may differ
    /// from what it is alone, by the space that a text begins with.
    fn bytes(&self, tokens: &[NewToken], text: &str) -> Vec<Vec<u8>> {
        if tokens.len() == 1 && !text.contains(REPLACEMENT) {
            return vec![text.as_bytes().to_vec()];
        }
        tokens.iter().map(|token| self.tokenizer.token_bytes(token.id)).collect()
    }

    fn special(&self, token: NewToken, visible: bool) -> Unit {
        let text = self.tokenizer.token_text(token.id);
        let bytes = text.as_bytes().to_vec();
        let (start, end) = (0, text.len());
        let token = self.report(token, text.clone(), bytes, Kind::Special { visible });
        Unit { text, hidden: !visible, tokens: vec![Placed { token, start, text_end: end, end }] }
    }

    fn report(&self, token: NewToken, text: String, bytes: Vec<u8>, kind: Kind) -> TokenText {
        let NewToken { id, logprob, top } = token;
        let (special, visible) = match kind {
            Kind::Ordinary => (false, true),
            Kind::Special { visible } => (true, visible),
        };
        let mut token = TokenText { id, text, bytes, logprob, special, visible, alternatives: Vec::new() };
        token.alternatives = alternatives(&self.tokenizer, top, &token);
        token
    }
}

/// The most probable tokens with their texts. The chosen one is called as it is called itself, which depends on the
/// tokens before it.
pub(super) fn alternatives(
    tokenizer: &ModelTokenizer,
    top: Vec<Scored>,
    chosen: &TokenText,
) -> Vec<Alternative> {
    let alternative = |Scored { id, logprob }| {
        let (text, bytes) = match id == chosen.id {
            true => (chosen.text.clone(), chosen.bytes.clone()),
            false => (tokenizer.token_text(id), tokenizer.token_bytes(id)),
        };
        Alternative { id, text, bytes, logprob }
    };
    top.into_iter().map(alternative).collect()
}

/// The last border of a character at or before a byte.
fn floor_char(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

/// The first border of a character at or behind a byte.
fn ceil_char(text: &str, at: usize) -> usize {
    (at..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len())
}
