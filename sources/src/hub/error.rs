//! What can go wrong between us and a hub.

use std::{error::Error, io, path::PathBuf};

use reqwest::StatusCode;

/// Why the hub's files cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The hub answered with an error.
    #[error("{url}: status code {status}")]
    Status {
        /// What was asked for.
        url: String,
        /// The answer.
        status: StatusCode,
    },
    /// There is no connection, or it broke off.
    #[error("{}", with_causes(.0))]
    Connection(#[from] reqwest::Error),
    /// Nothing came for too long.
    #[error("timed out while waiting for {what}: nothing came for {seconds} s ({variable})")]
    TimedOut {
        /// What was asked for.
        what: String,
        /// For how long nothing came.
        seconds: u64,
        /// The variable that sets this time.
        variable: &'static str,
    },
    /// The answer ended before the file did, or after it.
    #[error("{file} has {expected} bytes, and {received} came")]
    Length {
        /// The file.
        file: String,
        /// The bytes that the hub announced.
        expected: u64,
        /// The bytes that came.
        received: u64,
    },
    /// The answer is not what the hub's interface says.
    #[error("{url}: {message}")]
    Malformed {
        /// What was asked for.
        url: String,
        /// What is wrong.
        message: String,
    },
    /// The cache cannot be written.
    #[error("{}: {source}", path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl HubError {
    /// Whether a later attempt may end otherwise: there was no connection or no answer, or an answer that speaks of the
    /// hub's own trouble.
    pub fn is_passing(&self) -> bool {
        match self {
            HubError::Status { status, .. } => status.as_u16() == 429 || status.is_server_error(),
            HubError::Connection(error) => !error.is_builder(),
            HubError::TimedOut { .. } | HubError::Length { .. } => true,
            HubError::Malformed { .. } | HubError::Cache { .. } => false,
        }
    }

    /// Returns whether the fault is in what was asked for, or of whom.
    pub fn is_refusal(&self) -> bool {
        matches!(self, HubError::Status { .. } | HubError::Malformed { .. }) && !self.is_passing()
    }
}

/// The client's errors do not name their causes, which tell most.
fn with_causes(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
