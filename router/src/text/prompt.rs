//! A prompt as it is echoed and reported.

use std::sync::Arc;

use super::{
    Echo, Ending, TokenText,
    tokens::{NewToken, Tokens, alternatives},
};
use crate::{generation::PromptToken, tokenizer::ModelTokenizer};

/// The text of a prompt with its tokens. The visible texts of the tokens, joined, are the text, as far as the tokenizer
/// keeps texts as they are.
#[derive(Clone)]
pub(crate) struct PromptText {
    tokenizer: Arc<ModelTokenizer>,
    text: String,
    /// The tokens. Their log-probabilities are missing until they are reported.
    tokens: Vec<TokenText>,
    /// Tokens that have been scored, the first of which nothing predicts.
    scored: usize,
}

impl PromptText {
    /// The text of a prompt is the text that it was written as, which does not show the tokens that the tokenizer puts
    /// around it; that of a prompt of token ids shows all of them.
    pub(crate) fn new(tokenizer: Arc<ModelTokenizer>, ids: &[u32], written: Option<&str>) -> PromptText {
        let mut tokens = Vec::new();
        let mut units = Tokens::new(tokenizer.clone(), &[], &Ending::default());
        for &id in ids {
            let unit = units.push(NewToken { id, logprob: None, top: Vec::new() });
            tokens.extend(unit.into_iter().flat_map(|unit| unit.tokens));
        }
        tokens.extend(units.finish().into_iter().flat_map(|unit| unit.tokens));
        let mut tokens: Vec<TokenText> = tokens.into_iter().map(|placed| placed.token).collect();
        match written {
            Some(written) => hide_added(written, &mut tokens),
            None => tokens.iter_mut().for_each(|token| token.visible = true),
        }
        let shown = || tokens.iter().map(|token| token.text.as_str()).collect();
        let text = written.map_or_else(shown, str::to_owned);
        PromptText { tokenizer, text, tokens, scored: 1 }
    }

    /// Adds log-probabilities of the tokens that follow the ones that have them.
    pub(crate) fn score(&mut self, scores: Vec<PromptToken>) {
        let tokens = self.tokens.iter_mut().skip(self.scored);
        self.scored += scores.len();
        for (token, PromptToken { token: score, top }) in tokens.zip(scores) {
            token.logprob = Some(score.logprob);
            token.alternatives = alternatives(&self.tokenizer, top, token);
        }
    }

    /// The prompt as it is told.
    pub(crate) fn into_echo(self, with_tokens: bool) -> Echo {
        Echo { text: self.text, tokens: if with_tokens { self.tokens } else { Vec::new() } }
    }
}

/// Tells the special tokens that a text shows from those that the tokenizer has added to it.
fn hide_added(written: &str, tokens: &mut [TokenText]) {
    let mut rest = written;
    for token in tokens {
        let shown = rest.strip_prefix(token.text.as_str());
        // Ordinary text may differ in its form: a tokenizer may, for instance, lower its case.
        token.visible = !token.special || shown.is_some();
        if token.visible {
            let end = rest.char_indices().nth(token.text.chars().count()).map_or(rest.len(), |(at, _)| at);
            rest = shown.unwrap_or(&rest[end..]);
        }
    }
}
