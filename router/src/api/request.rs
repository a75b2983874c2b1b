//! The request for one sequence, whichever dialect it came in, and the limits that it must keep.

use std::{fmt, sync::Arc};

use sampling::SamplingParams;

use super::error::ApiError;
use crate::{chat_events::AnswerSpec, grammar::Grammar, text::Ending, text_side::TextSide};

/// Largest number of alternatives that is reported for a token.
const MAX_TOP: u32 = 20;
/// Tokens that end a sequence, beside those of the model.
const MAX_STOP_TOKENS: usize = 128;
/// Entries of a logit bias.
const MAX_BIAS: usize = 1024;

/// Text, or what it was tokenized to.
#[derive(Debug, Clone)]
pub(crate) enum Prompt {
    Text(String),
    /// Text that contains its special tokens.
    Rendered(String),
    Tokens(Vec<u32>),
    /// A chat, which becomes text when it is known whose template renders it.
    Chat(Arc<dyn Chat>),
}

/// A chat that is not rendered.
pub(crate) trait Chat: fmt::Debug + Send + Sync {
    /// Renders it, which may take its time.
    fn render(&self, side: &TextSide) -> Result<RenderedChat, ApiError>;
}

/// A chat as its template has it.
#[derive(Debug)]
pub(crate) struct RenderedChat {
    pub(crate) prompt: Prompt,
    /// The grammar of calls that must be made.
    pub(crate) grammar: Option<Grammar>,
    /// Special tokens by which the answer is taken apart.
    pub(crate) marks: Vec<u32>,
    /// The form of the answer, if it has parts.
    pub(crate) answer: Option<AnswerSpec>,
}

/// A dialect's names of the fields whose names differ between dialects.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FieldNames {
    pub(crate) prompt: &'static str,
    pub(crate) max_new_tokens: &'static str,
    pub(crate) num_top: &'static str,
}

/// The values to report beside the text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// The text of the prompt.
    pub(crate) echo: bool,
    /// The tokens of the prompt with their log-probabilities.
    pub(crate) prompt: bool,
    /// The tokens of the answer's certain text with their log-probabilities.
    pub(crate) tokens: bool,
}

/// One sequence to generate.
#[derive(Debug, Clone)]
pub(crate) struct SequenceRequest {
    pub(crate) names: FieldNames,
    pub(crate) prompt: Prompt,
    /// `None` generates as many as the limits leave, and 0 generates nothing.
    pub(crate) max_new_tokens: Option<u32>,
    pub(crate) stop: Vec<String>,
    pub(crate) ignore_eos: bool,
    pub(crate) ending: Ending,
    pub(crate) sampling: SamplingParams,
    pub(crate) report: Report,
    /// Keep this many tokens from the end of the prompt, of which the first is the one that the tokenizer begins texts
    /// with, if it has one.
    pub(crate) truncate: Option<usize>,
    /// What the answer must be.
    pub(crate) grammar: Option<Grammar>,
}

/// Limits that the configuration and the model set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RequestLimits {
    pub(crate) max_stop_sequences: usize,
    pub(crate) max_input_length: usize,
    pub(crate) max_total_tokens: usize,
    pub(crate) vocab_size: u32,
}

impl SequenceRequest {
    /// Renders the prompt, if it is a chat. Returns the form of its answer.
    pub(crate) fn render(&mut self, side: &TextSide) -> Result<Option<AnswerSpec>, ApiError> {
        let Prompt::Chat(chat) = &self.prompt else { return Ok(None) };
        let RenderedChat { prompt, grammar, marks, answer } = chat.render(side)?;
        if let (Some(own), Some(calls)) = (&self.grammar, &grammar) {
            let problem = format!("cannot be used together with `{}`", calls.field);
            return Err(ApiError::invalid(own.field, problem));
        }
        self.grammar = self.grammar.take().or(grammar);
        self.ending.marks = marks;
        self.prompt = prompt;
        Ok(answer)
    }

    /// Refuses values that make no sense, before anything is spent on the request.
    pub(crate) fn check(&self, limits: &RequestLimits) -> Result<(), ApiError> {
        let s = &self.sampling;
        s.check().map_err(|error| ApiError::invalid(error.name, error.problem()))?;
        let (max_stop, vocab) = (limits.max_stop_sequences, limits.vocab_size);
        let stops = self.stop.len();
        let bias_in_range = s.logit_bias.iter().all(|(id, bias)| *id < vocab && bias.abs() <= 100.0);
        for (holds, param, problem) in [
            (
                s.num_top <= MAX_TOP,
                self.names.num_top,
                format!(
                    "must be at most {MAX_TOP}: at most {MAX_TOP} alternatives can be reported. Given: {}",
                    s.num_top
                ),
            ),
            (stops <= max_stop, "stop", format!("supports up to {max_stop} stop sequences. Given: {stops}")),
            (self.stop.iter().all(|stop| !stop.is_empty()), "stop", "sequences must not be empty".into()),
            (s.logit_bias.len() <= MAX_BIAS, "logit_bias", format!("supports up to {MAX_BIAS} tokens")),
            (
                bias_in_range,
                "logit_bias",
                format!("must map token ids below {vocab} to numbers between -100 and 100"),
            ),
            (
                self.ending.stop_token_ids.len() <= MAX_STOP_TOKENS,
                "stop_token_ids",
                format!("supports up to {MAX_STOP_TOKENS} tokens"),
            ),
            (
                self.ending.stop_token_ids.iter().all(|id| *id < vocab),
                "stop_token_ids",
                format!("must be less than {vocab}"),
            ),
            (
                self.truncate.is_none_or(|keep| (1..=limits.max_input_length).contains(&keep)),
                "truncate",
                format!(
                    "must be strictly positive and at most {}. Given: {}",
                    limits.max_input_length,
                    self.truncate.unwrap_or_default()
                ),
            ),
        ] {
            if !holds {
                return Err(ApiError::invalid(param, problem));
            }
        }
        Ok(())
    }

    /// Fits prompt and output into the limits, and returns the number of tokens to generate at most. `bos` is how many
    /// tokens the tokenizer has put in front of the text.
    pub(crate) fn fit(
        &self,
        prompt: &mut Vec<u32>,
        bos: usize,
        limits: &RequestLimits,
    ) -> Result<u32, ApiError> {
        if let Some(keep) = self.truncate {
            let surplus = prompt.len().saturating_sub(keep.max(bos));
            prompt.drain(bos..bos + surplus);
        }
        if prompt.is_empty() {
            return Err(ApiError::invalid(self.names.prompt, "cannot be empty"));
        }
        let room = limits.max_total_tokens.saturating_sub(prompt.len()) as u32;
        let new = self.max_new_tokens.unwrap_or(room.max(1));
        if self.ending.min_tokens > new {
            let problem = format!("must be at most `{}`, which is {new}", self.names.max_new_tokens);
            return Err(ApiError::invalid("min_tokens", problem));
        }
        if prompt.len() > limits.max_input_length || new > room {
            return Err(ApiError::ContextLength {
                names: self.names,
                prompt: prompt.len(),
                new,
                max_prompt: limits.max_input_length,
                max_total: limits.max_total_tokens,
            });
        }
        Ok(new)
    }
}
