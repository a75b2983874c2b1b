//! The bodies of errors in each dialect.

use axum::http::StatusCode;
use schemars::JsonSchema;
use serde::Serialize;

use super::{ApiError, FieldNames};

/// A dialect of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// LoRAX's.
    Native,
    /// OpenAI's.
    OpenAi,
    /// vLLM's routes for adapters.
    Vllm,
    /// Those of AIBrix.
    Aibrix,
}

/// The JSON of an error.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub(crate) enum ErrorBody {
    Native { error: String, error_type: &'static str },
    OpenAi { error: OpenAiError },
    Vllm { error: VllmError },
    Aibrix(AibrixError),
}

/// vLLM's description of an error.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct VllmError {
    message: String,
    r#type: &'static str,
    param: Option<String>,
    code: u16,
}

/// AIBrix's description of an error.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct AibrixError {
    object: &'static str,
    #[serde(flatten)]
    error: VllmError,
}

/// OpenAI's description of an error.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct OpenAiError {
    message: String,
    r#type: &'static str,
    /// The field that is at fault.
    param: Option<String>,
    code: &'static str,
}

impl ApiError {
    pub(crate) fn body(&self, dialect: Dialect) -> ErrorBody {
        match dialect {
            Dialect::Native => {
                ErrorBody::Native { error: self.native_message(), error_type: self.native_type() }
            }
            Dialect::OpenAi => ErrorBody::OpenAi {
                error: OpenAiError {
                    message: self.openai_message(),
                    r#type: self.openai_type(),
                    param: self.field().map(str::to_owned),
                    code: self.openai_code(),
                },
            },
            Dialect::Vllm => ErrorBody::Vllm { error: self.in_vllm() },
            Dialect::Aibrix => ErrorBody::Aibrix(AibrixError { object: "error", error: self.in_vllm() }),
        }
    }

    /// The error as vLLM would have it: `code` is the status.
    fn in_vllm(&self) -> VllmError {
        let status = self.status_in(Dialect::Vllm);
        let r#type = match (self, status) {
            (ApiError::LoraInput(_) | ApiError::AdapterExists { .. }, _) => "InvalidUserInput",
            (_, StatusCode::NOT_FOUND) => "NotFoundError",
            (_, StatusCode::UNAUTHORIZED) => "AuthenticationError",
            (_, status) if status.is_server_error() => "InternalServerError",
            _ => "BadRequestError",
        };
        let param = self.field().map(str::to_owned);
        VllmError { message: self.openai_message(), r#type, param, code: status.as_u16() }
    }

    /// The field that is at fault, as the request names it.
    fn field(&self) -> Option<&str> {
        match self {
            ApiError::Missing { field } | ApiError::Unsupported { field } | ApiError::Type { field, .. } => {
                Some(field.as_str()).filter(|field| !field.is_empty())
            }
            ApiError::Invalid { field, .. } => Some(field.as_ref()),
            ApiError::ContextLength { names, .. } => Some(names.prompt),
            ApiError::AdapterNotFound { field, .. }
            | ApiError::AdapterForbidden { field, .. }
            | ApiError::AdapterFailed { field, .. }
            | ApiError::AdapterInvalid { field, .. } => Some(field),
            _ => None,
        }
    }

    fn native_message(&self) -> String {
        let prefix = if self.native_type() == "validation" { "Input validation error: " } else { "" };
        let message = match self {
            ApiError::ContextLength { names, prompt, max_prompt, .. } if prompt > max_prompt => {
                format!("`{}` must have at most {max_prompt} tokens. Given: {prompt}", names.prompt)
            }
            ApiError::ContextLength { names, prompt, new, max_total, .. } => {
                let FieldNames { prompt: text, max_new_tokens: limit, .. } = names;
                format!(
                    "`{text}` tokens + `{limit}` must be <= {max_total}. Given: {prompt} `{text}` tokens and {new} `{limit}`"
                )
            }
            error => error.to_string(),
        };
        format!("{prefix}{message}")
    }

    fn native_type(&self) -> &'static str {
        match self {
            ApiError::Malformed(_) | ApiError::Incomplete | ApiError::Unreadable(_) => "malformed",
            ApiError::Encoding(_) => "unsupported_encoding",
            ApiError::Missing { .. }
            | ApiError::Type { .. }
            | ApiError::Invalid { .. }
            | ApiError::Unsupported { .. }
            | ApiError::ContextLength { .. }
            | ApiError::Refused(_)
            | ApiError::AdapterInvalid { .. } => "validation",
            ApiError::Template(_) => "template_error",
            ApiError::TooLarge { .. } => "too_large",
            ApiError::Slow => "timeout",
            ApiError::InvalidKey => "invalid_api_key",
            ApiError::RateLimited(_) => "rate_limit_exceeded",
            ApiError::Overloaded { .. } => "overloaded",
            ApiError::AdapterTimeout { .. } => "adapter_timeout",
            ApiError::RequestTimeout { .. } => "request_timeout",
            ApiError::AdapterNotFound { .. } => "adapter_not_found",
            ApiError::AdapterForbidden { .. } | ApiError::AdapterFailed { .. } | ApiError::Generation(_) => {
                "generation"
            }
            ApiError::Unavailable(_) => "unavailable",
            ApiError::AdapterExists { .. } => "adapter_exists",
            ApiError::AdapterUnknown { .. } => "adapter_not_registered",
            ApiError::LoraInput(_) => "validation",
            ApiError::NotKept(_) => "not_kept",
            ApiError::NotAdmin => "admin_token_required",
            ApiError::NoRoute => "not_found",
            ApiError::Method(_) => "method_not_allowed",
        }
    }

    fn openai_message(&self) -> String {
        match self {
            // Clients look for "maximum context length is N tokens".
            ApiError::ContextLength { names, prompt, max_prompt, max_total, .. } if prompt > max_prompt => {
                format!(
                    "This model's maximum context length is {max_total} tokens, of which the prompt may have {max_prompt}: \
                 `{}` must have at most {max_prompt} tokens. Given: {prompt}",
                    names.prompt
                )
            }
            ApiError::ContextLength { names, prompt, new, max_total, .. } => format!(
                "This model's maximum context length is {max_total} tokens: `{}` tokens + `{}` must be <= {max_total}. \
                 Given: {prompt} and {new}",
                names.prompt, names.max_new_tokens
            ),
            error => error.to_string(),
        }
    }

    fn openai_type(&self) -> &'static str {
        match self {
            ApiError::Overloaded { .. } | ApiError::RateLimited(_) => "rate_limit_error",
            error if error.status().is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    fn openai_code(&self) -> &'static str {
        match self {
            ApiError::Missing { .. } => "missing_required_parameter",
            ApiError::Type { .. } => "invalid_type",
            ApiError::Invalid { .. } => "invalid_value",
            ApiError::Unsupported { .. } => "unsupported_parameter",
            ApiError::ContextLength { .. } => "context_length_exceeded",
            ApiError::AdapterNotFound { .. } => "model_not_found",
            ApiError::AdapterForbidden { .. } => "adapter_forbidden",
            ApiError::AdapterFailed { .. } => "adapter_unavailable",
            ApiError::AdapterInvalid { .. } => "adapter_invalid",
            ApiError::Overloaded { .. } => "overloaded",
            error => error.native_type(),
        }
    }
}
