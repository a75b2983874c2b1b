//! From errors to HTTP: the only place that knows status codes of failures.

use std::time::Duration;

use axum::{
    Json,
    http::{
        HeaderMap, HeaderValue, Method, StatusCode,
        header::{CONNECTION, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{admission::Refusal, generation::Failure, ranks::PrepareError, workers::WorkError};

/// Why a request was not answered.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum ApiError {
    /// Not JSON.
    #[error("the body is not valid JSON: {0}")]
    Malformed(String),
    /// JSON of another shape, or a value out of range.
    #[error("Input validation error: {0}")]
    Validation(String),
    /// The chat template failed.
    #[error("Template error: {0}")]
    Template(String),
    /// More bytes than allowed.
    #[error("the body is larger than {limit} bytes")]
    TooLarge {
        /// What is allowed.
        limit: usize,
    },
    /// The body did not come in time.
    #[error("the body did not come in time")]
    Slow,
    /// The caller has no valid key.
    #[error("the request has no valid API key: send one as `Authorization: Bearer KEY`")]
    InvalidKey,
    /// Too many requests at the same time.
    #[error("Model is overloaded")]
    Overloaded {
        /// When a new attempt may succeed.
        retry_after: Duration,
    },
    /// The tenant is at one of its own limits.
    #[error("{0}")]
    RateLimited(Refusal),
    /// The adapter was not there in time.
    #[error("the adapter was not ready within {} s", limit.as_secs_f64())]
    AdapterTimeout {
        /// How long it had.
        limit: Duration,
    },
    /// No such adapter.
    #[error("{0}")]
    AdapterNotFound(String),
    /// The caller may not read the adapter.
    #[error("{0}")]
    AdapterForbidden(String),
    /// It failed while it ran.
    #[error("Request failed during generation: {0}")]
    Generation(String),
    /// The shards are gone, or not there yet.
    #[error("{0}")]
    Unavailable(String),
    /// No such route.
    #[error("no such route")]
    NoRoute,
    /// The route takes another method.
    #[error("{0} is not allowed here")]
    Method(Method),
}

impl ApiError {
    /// A value that was refused.
    pub(crate) fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::Validation(message.into())
    }

    /// A field that was refused.
    pub(crate) fn unsupported(field: &str) -> ApiError {
        ApiError::Validation(format!("`{field}` is not supported"))
    }

    /// Status and kind, as LoRAX names them.
    fn kind(&self) -> (StatusCode, &'static str) {
        match self {
            ApiError::Malformed(_) => (StatusCode::BAD_REQUEST, "malformed"),
            ApiError::Validation(_) => (StatusCode::UNPROCESSABLE_ENTITY, "validation"),
            ApiError::Template(_) => (StatusCode::UNPROCESSABLE_ENTITY, "template_error"),
            ApiError::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "too_large"),
            ApiError::Slow => (StatusCode::REQUEST_TIMEOUT, "timeout"),
            ApiError::InvalidKey => (StatusCode::UNAUTHORIZED, "invalid_api_key"),
            ApiError::RateLimited(_) => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded"),
            ApiError::AdapterTimeout { .. } => (StatusCode::GATEWAY_TIMEOUT, "adapter_timeout"),
            ApiError::Overloaded { .. } => (StatusCode::TOO_MANY_REQUESTS, "overloaded"),
            ApiError::AdapterNotFound(_) => (StatusCode::NOT_FOUND, "adapter_not_found"),
            ApiError::AdapterForbidden(_) => (StatusCode::FORBIDDEN, "adapter_forbidden"),
            ApiError::Generation(_) => (StatusCode::FAILED_DEPENDENCY, "generation"),
            ApiError::Unavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
            ApiError::NoRoute => (StatusCode::NOT_FOUND, "not_found"),
            ApiError::Method(_) => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
        }
    }

    /// What the response says in its head.
    fn headers(&self) -> HeaderMap {
        let seconds = |after: Duration| (after.as_secs_f64().ceil() as u64).max(1);
        let (name, value) = match self {
            ApiError::Overloaded { retry_after } => (RETRY_AFTER, seconds(*retry_after).into()),
            ApiError::RateLimited(refusal) => (RETRY_AFTER, seconds(refusal.retry_after()).into()),
            ApiError::Unavailable(_) => (RETRY_AFTER, 1.into()),
            ApiError::InvalidKey => (WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")),
            // The rest of the body is still to come, and nobody will read it.
            ApiError::Slow | ApiError::TooLarge { .. } => (CONNECTION, HeaderValue::from_static("close")),
            _ => return HeaderMap::new(),
        };
        HeaderMap::from_iter([(name, value)])
    }

    /// The JSON of a dialect.
    pub(crate) fn body(&self, dialect: Dialect) -> Value {
        let (status, kind) = self.kind();
        match dialect {
            Dialect::Native => json!({"error": self.to_string(), "error_type": kind}),
            Dialect::OpenAi => {
                let family = if status.is_server_error() { "server_error" } else { "invalid_request_error" };
                json!({"error": {"message": self.to_string(), "type": family, "param": null, "code": kind}})
            }
        }
    }

    /// The whole response.
    pub(crate) fn respond(&self, dialect: Dialect) -> Response {
        let status = match (dialect, self.kind().0) {
            // OpenAI's clients know 400 as "your request is wrong".
            (Dialect::OpenAi, StatusCode::UNPROCESSABLE_ENTITY) => StatusCode::BAD_REQUEST,
            (_, status) => status,
        };
        let mut response = (status, Json(self.body(dialect))).into_response();
        response.headers_mut().extend(self.headers());
        response
    }
}

/// Whose shapes to speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// LoRAX's.
    Native,
    /// OpenAI's.
    OpenAi,
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> ApiError {
        match refusal {
            Refusal::Full { retry_after } => ApiError::Overloaded { retry_after },
            _ => ApiError::RateLimited(refusal),
        }
    }
}

impl From<WorkError> for ApiError {
    fn from(error: WorkError) -> ApiError {
        match error {
            WorkError::Busy => ApiError::Unavailable(error.to_string()),
            WorkError::Panicked => ApiError::Generation(error.to_string()),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> ApiError {
        match failure {
            Failure::Unavailable | Failure::Adapter(_) => ApiError::Unavailable(failure.to_string()),
            Failure::Refused(error) => ApiError::Validation(error.to_string()),
            Failure::Rejected(reason) => ApiError::Validation(reason),
            Failure::Generation(message) => ApiError::Generation(message),
        }
    }
}

impl From<PrepareError> for ApiError {
    fn from(error: PrepareError) -> ApiError {
        match error {
            PrepareError::NotFound(message) => ApiError::AdapterNotFound(message),
            PrepareError::Forbidden(message) => ApiError::AdapterForbidden(message),
            PrepareError::Invalid(message) => ApiError::Validation(message),
            PrepareError::Unavailable(_) => ApiError::Unavailable(error.to_string()),
        }
    }
}
