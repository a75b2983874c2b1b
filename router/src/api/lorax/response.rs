//! Bodies of responses. Fields are in LoRAX's order.

use schemars::JsonSchema;
use serde::Serialize;

use super::request::Shape;
use crate::{
    api::{fold::Fold, group::Generation},
    text::{Alternative, EndReason, Piece, TextEvent, TokenText},
};

/// A whole answer.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct GenerateResponse {
    generated_text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
}

/// All that is told of an answer.
#[derive(Debug, Serialize, JsonSchema)]
struct Details {
    finish_reason: &'static str,
    prompt_tokens: usize,
    generated_tokens: usize,
    skipped_tokens: usize,
    /// Null if the most probable tokens were taken.
    seed: Option<u64>,
    prefill: Vec<ScoredToken>,
    tokens: Vec<Token>,
    /// The other answers, if several were asked for, from which this is the best.
    #[serde(skip_serializing_if = "Option::is_none")]
    best_of_sequences: Option<Vec<Other>>,
}

/// An answer that is not the best.
#[derive(Debug, Serialize, JsonSchema)]
struct Other {
    generated_text: String,
    finish_reason: &'static str,
    generated_tokens: usize,
    seed: Option<u64>,
    prefill: Vec<ScoredToken>,
    tokens: Vec<Token>,
}

/// An event of a stream.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct StreamEvent {
    token: Token,
    /// Set in the last event.
    generated_text: Option<String>,
    /// Set in the last event, if it is wanted.
    details: Option<StreamDetails>,
}

/// Details of an answer, which the last event carries.
#[derive(Debug, Clone, Serialize, JsonSchema)]
struct StreamDetails {
    finish_reason: &'static str,
    prompt_tokens: usize,
    generated_tokens: usize,
    seed: Option<u64>,
}

/// A generated token.
#[derive(Debug, Serialize, JsonSchema)]
struct Token {
    id: u32,
    text: String,
    logprob: Option<f32>,
    special: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    alternative_tokens: Vec<ScoredToken>,
    /// Never: that is for tokens that were guessed.
    skipped: bool,
}

/// A token of the prompt, or one that could have been chosen.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct ScoredToken {
    id: u32,
    text: String,
    logprob: Option<f32>,
}

impl From<Alternative> for ScoredToken {
    fn from(token: Alternative) -> ScoredToken {
        ScoredToken { id: token.id, text: token.text, logprob: Some(token.logprob) }
    }
}

impl From<TokenText> for ScoredToken {
    fn from(token: TokenText) -> ScoredToken {
        ScoredToken { id: token.id, text: token.text, logprob: token.logprob }
    }
}

impl From<TokenText> for Token {
    fn from(token: TokenText) -> Token {
        let TokenText { id, text, logprob, special, alternatives, .. } = token;
        let alternative_tokens = alternatives.into_iter().map(ScoredToken::from).collect();
        Token { id, text, logprob, special, alternative_tokens, skipped: false }
    }
}

/// `finish_reason` as LoRAX spells it.
fn finish_reason(end: &EndReason) -> &'static str {
    match end {
        EndReason::Length => "length",
        EndReason::EndToken => "eos_token",
        EndReason::StopString { .. } => "stop_sequence",
    }
}

/// Tells a sequence as LoRAX does.
pub(super) struct GenerateFold {
    shape: Shape,
    prompt_tokens: usize,
    seed: Option<u64>,
    /// The answer so far.
    text: String,
    generated_tokens: usize,
}

impl GenerateFold {
    pub(super) fn new(generation: &Generation, shape: Shape) -> GenerateFold {
        let (prompt_tokens, seed) = (generation.tokens.prompt, generation.seed);
        GenerateFold { shape, prompt_tokens, seed, text: String::new(), generated_tokens: 0 }
    }

    /// The generated text contains the stop string that ended it.
    fn generated_text(&self, end: &EndReason) -> String {
        let stop = if let EndReason::StopString { text } = end { text.as_str() } else { "" };
        let prompt = self.shape.full_text.as_deref().unwrap_or_default();
        format!("{prompt}{}{stop}", self.text)
    }

    fn details(&self, end: &EndReason) -> StreamDetails {
        StreamDetails {
            finish_reason: finish_reason(end),
            prompt_tokens: self.prompt_tokens,
            generated_tokens: self.generated_tokens,
            seed: self.seed,
        }
    }
}

/// One event of a stream.
pub(super) enum Delta {
    /// The tokens of the prompt.
    Prefill(Vec<ScoredToken>),
    Token(StreamEvent),
}

/// The sum of all deltas: the whole answer.
#[derive(Default)]
pub(super) struct Generated {
    prefill: Vec<ScoredToken>,
    tokens: Vec<Token>,
    text: String,
    end: Option<StreamDetails>,
}

impl Fold for GenerateFold {
    type Delta = Delta;
    type Whole = Generated;

    fn push(&mut self, event: TextEvent) -> Vec<Delta> {
        let piece = match event {
            TextEvent::Prompt(echo) => {
                return vec![Delta::Prefill(echo.tokens.into_iter().map(ScoredToken::from).collect())];
            }
            TextEvent::Piece(piece) => piece,
        };
        let Piece { token: Some(token), text, end, .. } = piece else { return Vec::new() };
        self.text += &text;
        self.generated_tokens += 1;
        vec![Delta::Token(StreamEvent {
            token: token.into(),
            generated_text: end.as_ref().map(|end| self.generated_text(end)),
            details: end.as_ref().filter(|_| self.shape.details).map(|end| self.details(end)),
        })]
    }

    fn empty(&self) -> Generated {
        Generated::default()
    }

    fn add(whole: &mut Generated, delta: Delta) {
        match delta {
            Delta::Prefill(tokens) => whole.prefill.extend(tokens),
            Delta::Token(StreamEvent { token, generated_text, details }) => {
                whole.tokens.push(token);
                whole.text += &generated_text.unwrap_or_default();
                whole.end = details;
            }
        }
    }
}

impl Generated {
    /// The response, of which this is the best answer.
    pub(super) fn into_response(self, others: impl Iterator<Item = Generated>) -> GenerateResponse {
        let Generated { prefill, tokens, text, end } = self;
        let details = end.map(|end| {
            let others: Vec<Other> = others.filter_map(Generated::into_other).collect();
            Details {
                finish_reason: end.finish_reason,
                prompt_tokens: end.prompt_tokens,
                generated_tokens: end.generated_tokens,
                skipped_tokens: 0,
                seed: end.seed,
                prefill,
                tokens,
                best_of_sequences: Some(others).filter(|others| !others.is_empty()),
            }
        });
        GenerateResponse { generated_text: text, details }
    }

    /// The answer beside a better one; `None` if no details are wanted.
    fn into_other(self) -> Option<Other> {
        let StreamDetails { finish_reason, generated_tokens, seed, .. } = self.end?;
        let Generated { prefill, tokens, text, .. } = self;
        Some(Other { generated_text: text, finish_reason, generated_tokens, seed, prefill, tokens })
    }
}
