//! Names of a request's fields, for those of the chat that it becomes: errors speak of what the client has sent.

use crate::api::{error::ApiError, request::FieldNames};

/// Fields of chats, and those of responses that become them. The longer of two that begin alike is the first.
const FIELDS: [(&str, &str); 5] = [
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("max_completion_tokens", "max_output_tokens"),
    ("reasoning_effort", "reasoning.effort"),
    ("messages", "input"),
];

/// For each message of the chat, the field that it comes from.
#[derive(Debug, Default)]
pub(super) struct Names(Vec<String>);

impl Names {
    pub(super) fn push(&mut self, field: String) {
        self.0.push(field);
    }

    /// An error of the chat in the names of the request.
    pub(super) fn own(&self, error: ApiError) -> ApiError {
        match error {
            ApiError::Missing { field } => ApiError::Missing { field: self.name(&field) },
            ApiError::Unsupported { field } => ApiError::Unsupported { field: self.name(&field) },
            ApiError::Type { field, problem } => {
                ApiError::Type { field: self.name(&field), problem: in_words(problem) }
            }
            ApiError::Invalid { field, problem } => {
                ApiError::Invalid { field: self.name(&field).into(), problem: in_words(problem) }
            }
            ApiError::ContextLength { names, prompt, new, max_prompt, max_total } => {
                let names = FieldNames { prompt: "input", max_new_tokens: "max_output_tokens", ..names };
                ApiError::ContextLength { names, prompt, new, max_prompt, max_total }
            }
            other => other,
        }
    }

    fn name(&self, field: &str) -> String {
        if let Some((at, within)) = field.strip_prefix("messages[").and_then(|rest| rest.split_once(']'))
            && let Some(origin) = at.parse().ok().and_then(|at: usize| self.0.get(at))
        {
            return format!("{origin}{within}");
        }
        // The fields of a function are those of its tool.
        if field.starts_with("tools[") {
            return field.replacen(".function", "", 1);
        }
        let known = FIELDS.iter().find_map(|(chat, own)| {
            let within = field.strip_prefix(chat)?;
            let is_whole = within.is_empty() || within.starts_with(['.', '[']);
            is_whole.then(|| format!("{own}{within}"))
        });
        known.unwrap_or_else(|| field.to_owned())
    }
}

/// The names of fields in an error's words.
fn in_words(problem: String) -> String {
    FIELDS.iter().fold(problem, |text, (chat, own)| text.replace(&format!("`{chat}`"), &format!("`{own}`")))
}
