//! Errors as HTTP responses. No other module knows status codes of failures.

mod body;

use std::{borrow::Cow, time::Duration};

use axum::{
    Json,
    http::{
        HeaderMap, HeaderValue, Method, StatusCode,
        header::{ACCEPT_ENCODING, CONNECTION, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
};

use exchange::Fault;

use super::request::FieldNames;
use crate::{
    admission::Refusal, generation::Failure, grammar::CompileError, metrics::End, registry::RegistryError,
    workers::WorkError,
};

pub(crate) use body::{Dialect, ErrorBody};

/// The reason that a request was not answered. Fields are named as the request names them.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum ApiError {
    /// Not JSON.
    #[error("the body is not valid JSON: {0}")]
    Malformed(String),
    /// The client has left before it had sent all of the body.
    #[error("the body could not be read: the connection has ended before it")]
    Incomplete,
    /// The body is not sent as HTTP has it: its chunks make no sense.
    #[error("the body could not be read: {0}")]
    Unreadable(String),
    /// The body is compressed.
    #[error("the body has the content-encoding {0:?}, and only \"identity\" is supported")]
    Encoding(String),
    /// A field that must be there is not.
    #[error("missing field `{field}`")]
    Missing {
        /// The field.
        field: String,
    },
    /// A field has another type than it should.
    #[error("{}: {problem}", place(field))]
    Type {
        /// The field; empty for the body itself.
        field: String,
        /// The type that was found, and the one that was expected.
        problem: String,
    },
    /// A field has a value that makes no sense.
    #[error("`{field}` {problem}")]
    Invalid {
        /// The field.
        field: Cow<'static, str>,
        /// The rule that its value breaks.
        problem: String,
    },
    /// A field that is not supported, or not with this value.
    #[error("`{field}` is not supported")]
    Unsupported {
        /// The field.
        field: String,
    },
    /// The prompt is too long, alone or with the tokens to generate.
    #[error("the request needs more than {max_total} tokens")]
    ContextLength {
        /// The dialect's names of the fields.
        names: FieldNames,
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens to generate.
        new: u32,
        /// Largest prompt.
        max_prompt: usize,
        /// Most tokens of prompt and answer together.
        max_total: usize,
    },
    /// It cannot be run here, for a reason that is in no single field.
    #[error("{0}")]
    Refused(String),
    /// The chat template failed, or there is none.
    #[error("Template error: {0}")]
    Template(String),
    /// More bytes than allowed.
    #[error("the body is larger than {limit} bytes")]
    TooLarge {
        /// The largest size that is allowed.
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
        /// Time until a new attempt may succeed.
        retry_after: Duration,
    },
    /// The tenant is at one of its own limits.
    #[error("{0}")]
    RateLimited(Refusal),
    /// The adapter was not there in time.
    #[error("the adapter was not ready within {} s", limit.as_secs_f64())]
    AdapterTimeout {
        /// The deadline.
        limit: Duration,
    },
    /// The answer was not complete in time.
    #[error("the request was not answered within {} s", limit.as_secs_f64())]
    RequestTimeout {
        /// The deadline.
        limit: Duration,
    },
    /// No such adapter.
    #[error("{message}")]
    AdapterNotFound {
        /// The field that names it.
        field: &'static str,
        /// The limit.
        message: String,
    },
    /// The caller may not read the adapter.
    #[error("{message}")]
    AdapterForbidden {
        /// The field that names it.
        field: &'static str,
        /// The cause.
        message: String,
    },
    /// The adapter's source cannot be reached, is too slow, or has something else than it said.
    #[error("{message}")]
    AdapterFailed {
        /// The field that names it.
        field: &'static str,
        /// The cause.
        message: String,
    },
    /// The adapter cannot be served exactly.
    #[error("{message}")]
    AdapterInvalid {
        /// The field that names it, or its source.
        field: &'static str,
        /// The cause.
        message: String,
    },
    /// The name of an adapter is taken.
    #[error("the adapter {id:?} is registered already")]
    AdapterExists {
        /// The name.
        id: String,
    },
    /// No adapter of this name is registered.
    #[error("The lora adapter '{id}' cannot be found.")]
    AdapterUnknown {
        /// The name.
        id: String,
    },
    /// A request of vLLM's interface that it refuses in these words.
    #[error("{0}")]
    LoraInput(String),
    /// What was registered cannot be written down.
    #[error("{0}")]
    NotKept(String),
    /// The route needs the administrator's key.
    #[error("the request needs the administrator's key: send it as `Authorization: Bearer KEY`")]
    NotAdmin,
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

/// Spells the part of a body that is at fault.
fn place(field: &str) -> String {
    if field.is_empty() { "the body".into() } else { format!("`{field}`") }
}

impl ApiError {
    /// A value that was refused.
    pub(crate) fn invalid(field: impl Into<Cow<'static, str>>, problem: impl Into<String>) -> ApiError {
        ApiError::Invalid { field: field.into(), problem: problem.into() }
    }

    /// The error of an adapter of this name that cannot be had.
    pub(crate) fn of_adapter(field: &'static str, name: &str, fault: Fault) -> ApiError {
        let message = fault.to_string();
        match fault {
            Fault::NotFound(_) => ApiError::AdapterNotFound { field, message },
            Fault::Denied(_) => ApiError::AdapterForbidden { field, message },
            Fault::Invalid(_) => ApiError::AdapterInvalid { field, message },
            Fault::Unavailable(_) => ApiError::AdapterFailed { field, message },
            Fault::TooLarge { .. } | Fault::Slow | Fault::Changed => {
                let message = format!("adapter \"{name}\": {message}");
                ApiError::AdapterFailed { field, message }
            }
            Fault::Ranks(_) | Fault::PinsFull(_) | Fault::SessionLost | Fault::Duplicate => {
                ApiError::Unavailable(format!("the model is not available: {message}"))
            }
        }
    }

    /// The status in LoRAX's dialect.
    fn status(&self) -> StatusCode {
        match self {
            ApiError::Malformed(_) | ApiError::Incomplete | ApiError::Unreadable(_) => {
                StatusCode::BAD_REQUEST
            }
            ApiError::Encoding(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ApiError::Missing { .. }
            | ApiError::Type { .. }
            | ApiError::Invalid { .. }
            | ApiError::Unsupported { .. }
            | ApiError::ContextLength { .. }
            | ApiError::Refused(_)
            | ApiError::AdapterInvalid { .. }
            | ApiError::Template(_) => StatusCode::UNPROCESSABLE_ENTITY,
            ApiError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            ApiError::Slow => StatusCode::REQUEST_TIMEOUT,
            ApiError::InvalidKey | ApiError::NotAdmin => StatusCode::UNAUTHORIZED,
            ApiError::AdapterExists { .. } => StatusCode::CONFLICT,
            ApiError::LoraInput(_) => StatusCode::BAD_REQUEST,
            ApiError::NotKept(_) => StatusCode::INTERNAL_SERVER_ERROR,
            ApiError::RateLimited(_) | ApiError::Overloaded { .. } => StatusCode::TOO_MANY_REQUESTS,
            ApiError::AdapterTimeout { .. } | ApiError::RequestTimeout { .. } => StatusCode::GATEWAY_TIMEOUT,
            ApiError::AdapterNotFound { .. } | ApiError::AdapterUnknown { .. } | ApiError::NoRoute => {
                StatusCode::NOT_FOUND
            }
            // LoRAX's clients take 403 for a shard that is not ready, and try again.
            ApiError::AdapterForbidden { .. } | ApiError::AdapterFailed { .. } | ApiError::Generation(_) => {
                StatusCode::FAILED_DEPENDENCY
            }
            ApiError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            ApiError::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
        }
    }

    fn status_in(&self, dialect: Dialect) -> StatusCode {
        match (dialect, self) {
            (Dialect::OpenAi, ApiError::AdapterForbidden { .. }) => StatusCode::FORBIDDEN,
            // OpenAI's clients know 400 as "your request is wrong".
            (Dialect::OpenAi, error) if error.status() == StatusCode::UNPROCESSABLE_ENTITY => {
                StatusCode::BAD_REQUEST
            }
            // vLLM says of whatever keeps an adapter from being loaded that the request was bad.
            (Dialect::Vllm | Dialect::Aibrix, error) => match error.status() {
                StatusCode::UNPROCESSABLE_ENTITY | StatusCode::FAILED_DEPENDENCY | StatusCode::CONFLICT => {
                    StatusCode::BAD_REQUEST
                }
                status => status,
            },
            (_, error) => error.status(),
        }
    }

    /// The headers of the response.
    fn headers(&self) -> HeaderMap {
        let seconds = |after: Duration| (after.as_secs_f64().ceil() as u64).max(1);
        let (name, value) = match self {
            ApiError::Overloaded { retry_after } => (RETRY_AFTER, seconds(*retry_after).into()),
            ApiError::RateLimited(refusal) => (RETRY_AFTER, seconds(refusal.retry_after()).into()),
            ApiError::Unavailable(_) => (RETRY_AFTER, 1.into()),
            ApiError::InvalidKey | ApiError::NotAdmin => {
                (WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
            }
            ApiError::Encoding(_) => (ACCEPT_ENCODING, HeaderValue::from_static("identity")),
            // The rest of the body is still to come, and nobody will read it.
            ApiError::Slow | ApiError::TooLarge { .. } => (CONNECTION, HeaderValue::from_static("close")),
            _ => return HeaderMap::new(),
        };
        HeaderMap::from_iter([(name, value)])
    }

    /// The whole response. Its extensions say how the request has ended.
    pub(crate) fn respond(&self, dialect: Dialect) -> Response {
        let mut response = (self.status_in(dialect), Json(self.body(dialect))).into_response();
        response.headers_mut().extend(self.headers());
        response.extensions_mut().insert(self.end());
        response
    }

    /// The end that metrics count for the request.
    fn end(&self) -> End {
        match self {
            ApiError::Incomplete => End::Cancelled,
            ApiError::InvalidKey | ApiError::NotAdmin => End::Unauthorized,
            ApiError::RateLimited(_) | ApiError::Overloaded { .. } => End::Overloaded,
            ApiError::AdapterTimeout { .. }
            | ApiError::AdapterNotFound { .. }
            | ApiError::AdapterForbidden { .. }
            | ApiError::AdapterFailed { .. }
            | ApiError::AdapterInvalid { .. } => End::Adapter,
            ApiError::Generation(_) | ApiError::RequestTimeout { .. } => End::Generation,
            ApiError::Unavailable(_) => End::Unavailable,
            _ => End::Validation,
        }
    }
}

impl From<RegistryError> for ApiError {
    fn from(error: RegistryError) -> ApiError {
        let message = error.to_string();
        match error {
            RegistryError::Name(_) => ApiError::Refused(message),
            RegistryError::Exists(id) => ApiError::AdapterExists { id },
            RegistryError::Unknown(id) => ApiError::AdapterUnknown { id },
            RegistryError::Adapter { fault: Fault::PinsFull(_), .. } => ApiError::Refused(message),
            RegistryError::Adapter { reference, fault } => {
                ApiError::of_adapter("adapter_id", &reference.to_string(), fault)
            }
            RegistryError::Manifest(_) => ApiError::NotKept(message),
        }
    }
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

impl ApiError {
    /// The error of a grammar that a field asks for.
    pub(crate) fn of_grammar(field: &'static str, error: CompileError) -> ApiError {
        match error {
            CompileError::Grammar(error) => ApiError::invalid(field, error.to_string()),
            CompileError::Work(error) => error.into(),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> ApiError {
        match failure {
            Failure::Unavailable | Failure::Adapter(_) => ApiError::Unavailable(failure.to_string()),
            Failure::Refused(error) => ApiError::Refused(error.to_string()),
            Failure::Rejected(reason) => ApiError::Refused(reason),
            Failure::Generation(message) => ApiError::Generation(message),
        }
    }
}
