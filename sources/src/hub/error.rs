//! What can go wrong between us and a hub.

use std::{error::Error, io, path::PathBuf};

use reqwest::{StatusCode, Url, header::HeaderMap};
use url::Origin;

use super::NoHome;

/// Why the hub's files cannot be had. No message holds a token or a signed address.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The hub answered with an error.
    #[error("{url}: status code {status}{}", explained(*.code))]
    Status {
        /// What was asked for.
        url: String,
        /// The answer.
        status: StatusCode,
        /// What the hub means by it.
        code: Option<ErrorCode>,
    },
    /// There is no connection, or it broke off.
    #[error("{}", with_causes(.0))]
    Connection(reqwest::Error),
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
    /// The token has characters that no token has.
    #[error("the credential is not a token of a hub")]
    Token,
    /// There is no folder for the hub's files.
    #[error(transparent)]
    NoHome(#[from] NoHome),
    /// The cache cannot be written.
    #[error("{}: {source}", path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// What a hub means by a status (`x-error-code`), as far as its clients look at it. A text of the hub's is in no
/// message: there is no knowing what it repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorCode {
    /// There is no such repository, or it is private and this credential may not know of it.
    RepoNotFound,
    /// The repository has no such branch, tag or commit.
    RevisionNotFound,
    /// The commit has no such file.
    EntryNotFound,
    /// Its owners must give access first.
    GatedRepo,
    /// The hub does not know the token.
    BadToken,
}

impl ErrorCode {
    /// As `huggingface_hub` reads an answer (`hf_raise_for_status`): a 401 is the hub's answer to an anonymous caller
    /// who asks for what does not exist as well as for what is private.
    pub(super) fn of(status: StatusCode, headers: &HeaderMap) -> Option<ErrorCode> {
        let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
        match header("x-error-code") {
            Some("RepoNotFound") => return Some(ErrorCode::RepoNotFound),
            Some("RevisionNotFound") => return Some(ErrorCode::RevisionNotFound),
            Some("EntryNotFound") => return Some(ErrorCode::EntryNotFound),
            Some("GatedRepo") => return Some(ErrorCode::GatedRepo),
            _ => {}
        }
        let is_bad_token = header("x-error-message") == Some("Invalid credentials in Authorization header");
        (status == StatusCode::UNAUTHORIZED).then_some(if is_bad_token {
            ErrorCode::BadToken
        } else {
            ErrorCode::RepoNotFound
        })
    }
}

fn explained(code: Option<ErrorCode>) -> &'static str {
    match code {
        None => "",
        Some(ErrorCode::RepoNotFound) => {
            ": there is no such repository, or it needs a token that may read it"
        }
        Some(ErrorCode::RevisionNotFound) => ": the repository has no such revision",
        Some(ErrorCode::EntryNotFound) => ": the repository has no such file",
        Some(ErrorCode::GatedRepo) => ": the repository is gated, and access must be asked for at the hub",
        Some(ErrorCode::BadToken) => ": the hub does not know the token",
    }
}

impl From<reqwest::Error> for HubError {
    /// Without the address, which may be one that opens a file to whoever has it.
    fn from(error: reqwest::Error) -> HubError {
        HubError::Connection(error.without_url())
    }
}

impl HubError {
    /// A fault of a connection to a hub, or to where it redirects.
    pub(super) fn of(mut error: reqwest::Error, hub: &Origin) -> HubError {
        if let Some(url) = error.url_mut()
            && let Ok(shown) = Url::parse(&shown_to(url, hub))
        {
            *url = shown;
        }
        HubError::Connection(error)
    }

    /// Whether a later attempt may end otherwise: there was no connection or no answer, or an answer that speaks of the
    /// hub's own trouble.
    pub fn is_passing(&self) -> bool {
        match self {
            HubError::Status { status, .. } => {
                matches!(status.as_u16(), 408 | 429) || status.is_server_error()
            }
            HubError::Connection(error) => !error.is_builder(),
            HubError::TimedOut { .. } | HubError::Length { .. } => true,
            HubError::Malformed { .. } | HubError::Cache { .. } | HubError::Token | HubError::NoHome(_) => {
                false
            }
        }
    }

    /// Returns whether the fault is in what was asked for, or of whom.
    pub fn is_refusal(&self) -> bool {
        let is_final = matches!(self, HubError::Status { .. } | HubError::Malformed { .. })
            || matches!(self, HubError::Token | HubError::NoHome(_));
        is_final && !self.is_passing()
    }
}

/// An address without what may be secret in it.
pub(super) fn shown(url: &Url) -> String {
    format!("{}{}", url.origin().ascii_serialization(), url.path())
}

/// The same, and without the path if it is not the hub's: addresses of storage are signed.
pub(super) fn shown_to(url: &Url, hub: &Origin) -> String {
    if url.origin() == *hub { shown(url) } else { url.origin().ascii_serialization() }
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
