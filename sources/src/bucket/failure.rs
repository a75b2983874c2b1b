//! What a failure of a bucket means.

use std::{error::Error, path::PathBuf, time::Duration};

use object_store::client::{HttpError, HttpErrorKind};

use crate::{Denial, Reference, SourceError};

/// Why something in a bucket cannot be read. A text of the bucket's is in no message: it repeats names of keys, and
/// there is no knowing what else.
#[derive(Debug)]
pub(crate) enum Failure {
    NotFound,
    Denied(&'static str),
    Unavailable(String),
    Changed,
    TimedOut(Duration),
    Io { path: PathBuf, source: std::io::Error },
}

impl Failure {
    /// The same, of an adapter.
    pub(crate) fn of(self, adapter: &Reference) -> SourceError {
        let adapter = adapter.clone();
        match self {
            Failure::NotFound => SourceError::NotFound { adapter, hint: "" },
            Failure::Denied(why) => SourceError::Denied { adapter, reason: Denial::Store(why) },
            Failure::Unavailable(cause) => SourceError::Unavailable { adapter, cause },
            Failure::Changed => SourceError::Changed { adapter },
            Failure::TimedOut(limit) => {
                let cause = format!("nothing came from its bucket for {} s", limit.as_secs_f32());
                SourceError::Unavailable { adapter, cause }
            }
            Failure::Io { path, source } => SourceError::Io { path, source },
        }
    }

    /// The settings are no connection to a bucket.
    pub(crate) fn of_settings(error: &object_store::Error) -> Failure {
        // It may name a file of credentials, which is nothing for those who send requests.
        tracing::error!("the settings of a bucket cannot be used: {error}");
        Failure::Unavailable("the server's settings of its bucket cannot be used".into())
    }
}

impl From<object_store::Error> for Failure {
    fn from(error: object_store::Error) -> Failure {
        match &error {
            object_store::Error::NotFound { .. } => Failure::NotFound,
            object_store::Error::PermissionDenied { .. } => {
                Failure::Denied("the server has no permission at its bucket")
            }
            object_store::Error::Unauthenticated { .. } => {
                Failure::Denied("its bucket does not know the server's credentials")
            }
            object_store::Error::Precondition { .. } | object_store::Error::NotModified { .. } => {
                Failure::Changed
            }
            _ => Failure::Unavailable(format!("its bucket {}", trouble(&error))),
        }
    }
}

fn trouble(error: &object_store::Error) -> String {
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(cause) = next {
        if let Some(error) = cause.downcast_ref::<HttpError>() {
            return match error.kind() {
                HttpErrorKind::Connect => "cannot be reached",
                HttpErrorKind::Timeout => "did not answer in time",
                _ => "broke off",
            }
            .into();
        }
        next = cause.source();
    }
    // The client keeps the type that has the status to itself.
    let text = error.to_string();
    let status = text.split("status code: ").nth(1).and_then(|rest| rest.get(..3));
    match status.filter(|status| status.bytes().all(|byte| byte.is_ascii_digit())) {
        Some(status) => format!("answers with status code {status}"),
        None => "answers as no bucket does".into(),
    }
}
