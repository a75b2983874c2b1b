//! What a request asks for, whichever dialect it came in, and the rules that it must keep.

use sampling::SamplingParams;
use serde_json::{Map, Value};

use super::error::ApiError;
use crate::adapter::AdapterRef;

/// Largest number of alternatives that is reported for a token.
const MAX_TOP: u32 = 20;
/// Entries of a logit bias.
const MAX_BIAS: usize = 1024;
/// Text, or what it was tokenized to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Prompt {
    Text(String),
    /// Text of a chat template, which has its special tokens in it.
    Rendered(String),
    Tokens(Vec<u32>),
}

/// Fields of a body that no other field of its type took.
pub(crate) type Rest = Map<String, Value>;

/// Refuses fields that we make nothing of, by name. A null and an empty list ask for nothing.
pub(crate) fn refuse(rest: &Rest, harmless: impl Fn(&str, &Value) -> bool) -> Result<(), ApiError> {
    let nothing = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
    match rest.iter().find(|(name, value)| !nothing(value) && !harmless(name, value)) {
        Some((name, _)) => Err(ApiError::unsupported(name)),
        None => Ok(()),
    }
}

/// One sequence to generate.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub(crate) prompt: Prompt,
    pub(crate) max_new_tokens: Option<u32>,
    pub(crate) stop: Vec<String>,
    pub(crate) ignore_eos: bool,
    pub(crate) adapter: Option<AdapterRef>,
    pub(crate) sampling: SamplingParams,
    /// Report the prompt's log-probabilities.
    pub(crate) prompt_logprobs: bool,
    /// Keep so many tokens from the end of the prompt.
    pub(crate) truncate: Option<usize>,
}

/// Limits that the configuration sets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) max_stop_sequences: usize,
    pub(crate) max_input_length: usize,
    pub(crate) max_total_tokens: usize,
    pub(crate) vocab_size: u32,
}

impl Ask {
    /// Refuses values that make no sense, before anything is spent on the request.
    pub(crate) fn check(&self, rules: &Rules) -> Result<(), ApiError> {
        let ensure =
            |holds: bool, message: String| if holds { Ok(()) } else { Err(ApiError::Validation(message)) };
        let s = &self.sampling;
        s.check().map_err(|error| ApiError::Validation(format!("`{}` {}", error.name, error.problem())))?;
        let max_stop = rules.max_stop_sequences;
        let stops = self.stop.len();
        for (holds, message) in [
            (
                s.num_top <= MAX_TOP,
                format!("at most {MAX_TOP} alternatives can be reported. Given: {}", s.num_top),
            ),
            (self.max_new_tokens != Some(0), "`max_new_tokens` must be strictly positive".into()),
            (stops <= max_stop, format!("`stop` supports up to {max_stop} stop sequences. Given: {stops}")),
            (self.stop.iter().all(|stop| !stop.is_empty()), "`stop` sequences must not be empty".into()),
            (s.logit_bias.len() <= MAX_BIAS, format!("`logit_bias` supports up to {MAX_BIAS} tokens")),
            (
                s.logit_bias.iter().all(|(token, bias)| *token < rules.vocab_size && bias.abs() <= 100.0),
                "`logit_bias` must map token ids to numbers between -100 and 100".into(),
            ),
            (self.truncate != Some(0), "`truncate` must be strictly positive".into()),
        ] {
            ensure(holds, message)?;
        }
        if let Prompt::Tokens(tokens) = &self.prompt {
            let known = tokens.iter().all(|token| *token < rules.vocab_size);
            ensure(known, format!("token ids must be less than {}", rules.vocab_size))?;
        }
        Ok(())
    }

    /// Fits prompt and output into the limits; returns the number of tokens to generate at most.
    pub(crate) fn fit(&self, prompt: &mut Vec<u32>, rules: &Rules) -> Result<u32, ApiError> {
        if let Some(keep) = self.truncate {
            prompt.drain(..prompt.len().saturating_sub(keep));
        }
        let (tokens, most, total) = (prompt.len(), rules.max_input_length, rules.max_total_tokens);
        if tokens == 0 {
            return Err(ApiError::invalid("`inputs` cannot be empty"));
        }
        if tokens > most {
            return Err(ApiError::invalid(format!(
                "`inputs` must have at most {most} tokens. Given: {tokens}"
            )));
        }
        let room = total.saturating_sub(tokens) as u32;
        let new = self.max_new_tokens.unwrap_or(room);
        if new > room || new == 0 {
            return Err(ApiError::invalid(format!(
                "`inputs` tokens + `max_new_tokens` must be <= {total}. Given: {tokens} `inputs` tokens and {new} `max_new_tokens`"
            )));
        }
        Ok(new)
    }
}
