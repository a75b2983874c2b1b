//! What a failure of a bucket means.

use std::{error::Error, path::PathBuf, time::Duration};

use object_store::client::{HttpError, HttpErrorKind};

use crate::{Denial, Reference, SourceError};

/// Why something in a bucket cannot be read. A text of the bucket's is in no message: it repeats names of keys, and
/// there is no knowing what else.
#[derive(Debug, thiserror::Error)]
pub enum BucketError {
    /// There is no such object.
    #[error("there is nothing by this name in its bucket")]
    NotFound,
    /// The bucket does not let the server read it.
    #[error("{0}")]
    Denied(&'static str),
    /// The bucket cannot be reached, or failed in the middle.
    #[error("{0}")]
    Unavailable(String),
    /// The object is another one by now.
    #[error("it has changed in its bucket")]
    Changed,
    /// Nothing came for so long.
    #[error("nothing came from its bucket for {} s", .0.as_secs_f32())]
    TimedOut(Duration),
    /// A file cannot be written here.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
}

pub(crate) use BucketError as Failure;

impl Failure {
    /// The same, of an adapter.
    pub(crate) fn of(self, adapter: &Reference) -> SourceError {
        let adapter = adapter.clone();
        match self {
            Failure::NotFound => SourceError::NotFound { adapter, hint: "" },
            Failure::Denied(why) => SourceError::Denied { adapter, reason: Denial::Store(why) },
            Failure::Unavailable(cause) => SourceError::Unavailable { adapter, cause },
            Failure::Changed => SourceError::Changed { adapter },
            failure @ Failure::TimedOut(_) => {
                SourceError::Unavailable { adapter, cause: failure.to_string() }
            }
            Failure::Io { path, source } => SourceError::Io { path, source },
        }
    }

    /// Whether a later attempt may end otherwise.
    pub fn is_passing(&self) -> bool {
        matches!(self, Failure::Unavailable(_) | Failure::TimedOut(_) | Failure::Changed)
    }

    /// Whether the fault is in what was asked for, or of whom.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Failure::NotFound | Failure::Denied(_))
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
            // Of a question that is not for one object.
            _ if status(&error).as_deref() == Some("404") => Failure::NotFound,
            _ if status(&error).as_deref() == Some("403") => {
                Failure::Denied("the server has no permission at its bucket")
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
    match status(error) {
        Some(status) => format!("answers with status code {status}"),
        None => "answers as no bucket does".into(),
    }
}

/// The client keeps the type that has the status to itself.
fn status(error: &object_store::Error) -> Option<String> {
    let text = error.to_string();
    let status = text.split("status code: ").nth(1)?.get(..3)?;
    status.bytes().all(|byte| byte.is_ascii_digit()).then(|| status.to_owned())
}
