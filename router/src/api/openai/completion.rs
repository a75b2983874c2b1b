//! Choices of `/v1/completions`.

use std::mem;

use serde::Serialize;

use super::{
    Choice,
    logprobs::{CompletionLogprobs, finish_reason},
};
use crate::{
    api::fold::Fold,
    text::{Echo, Piece, TextEvent, TokenText},
};

/// A choice, or what an event adds to it.
#[derive(Debug, Default, Serialize)]
pub(super) struct CompletionChoice {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<&'static str>,
}

impl Choice for CompletionChoice {
    fn at(self, index: usize) -> Self {
        Self { index, ..self }
    }
}

/// Tells a sequence as a choice of a completion.
pub(super) struct CompletionFold {
    index: usize,
    logprobs: bool,
    /// Characters of the returned text that belong to tokens which have been told.
    offset: usize,
    /// Settled tokens that have not been told.
    untold: Vec<TokenText>,
}

impl CompletionFold {
    pub(super) fn new(index: usize, logprobs: bool) -> CompletionFold {
        CompletionFold { index, logprobs, offset: 0, untold: Vec::new() }
    }

    fn choice(&mut self, text: String, finish_reason: Option<&'static str>) -> CompletionChoice {
        let untold = mem::take(&mut self.untold);
        let tells = self.logprobs && !untold.is_empty();
        let logprobs = tells.then(|| CompletionLogprobs::new(untold, &mut self.offset));
        CompletionChoice { index: self.index, text, logprobs, finish_reason }
    }

    fn echo(&mut self, echo: Echo) -> CompletionChoice {
        self.untold.extend(echo.tokens);
        let end = echo.text.chars().count();
        let choice = self.choice(echo.text, None);
        self.offset = end;
        choice
    }
}

impl Fold for CompletionFold {
    type Delta = CompletionChoice;
    type Whole = CompletionChoice;

    fn push(&mut self, event: TextEvent) -> Vec<CompletionChoice> {
        let Piece { text, settled, end, .. } = match event {
            TextEvent::Prompt(echo) => return vec![self.echo(echo)],
            TextEvent::Piece(piece) => piece,
        };
        self.untold.extend(settled);
        // Tokens without text wait for the next text.
        if text.is_empty() && end.is_none() {
            return Vec::new();
        }
        vec![self.choice(text, end.as_ref().map(finish_reason))]
    }

    fn empty(&self) -> CompletionChoice {
        let logprobs = self.logprobs.then(CompletionLogprobs::default);
        CompletionChoice { index: self.index, logprobs, ..CompletionChoice::default() }
    }

    fn add(whole: &mut CompletionChoice, delta: CompletionChoice) {
        whole.text += &delta.text;
        if let (Some(whole), Some(delta)) = (&mut whole.logprobs, delta.logprobs) {
            whole.extend(delta);
        }
        whole.finish_reason = delta.finish_reason.or(whole.finish_reason);
    }
}
