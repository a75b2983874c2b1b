//! Questions to a hub.

use std::time::Duration;

use reqwest::{
    Client, Method, Response, StatusCode, Url,
    header::{AUTHORIZATION, CONTENT_RANGE, ETAG, HeaderMap, LOCATION, RANGE},
};
use secrecy::SecretString;
use tokio::time::timeout;

use super::{
    Cache, Commit, HubError, HubSettings,
    error::{ErrorCode, shown, shown_to},
    listing::Listing,
    settings::ANSWER,
};
use crate::http;

/// Redirects of one question.
const REDIRECTS: usize = 10;
/// Most bytes of a repository's description. One of ten thousand files has three million.
const MAX_DESCRIPTION: usize = 64 << 20;

/// A hub.
#[derive(Debug, Clone)]
pub struct Hub {
    client: Client,
    pub(super) settings: HubSettings,
}

/// A question about a file.
pub(super) struct Question<'a> {
    pub(super) method: Method,
    pub(super) url: Url,
    /// The first byte that is asked for.
    pub(super) from: u64,
    pub(super) token: Option<&'a SecretString>,
}

/// The answer to a question about a file.
pub(super) struct Answer {
    pub(super) response: Response,
    /// The first byte that the answer has.
    pub(super) from: u64,
    /// The name of the whole content: a hash of it.
    pub(super) etag: Option<String>,
    /// The length of the whole content.
    pub(super) size: Option<u64>,
    /// The commit that the file is of.
    pub(super) commit: Option<String>,
}

impl Hub {
    /// A hub that is reached by these settings.
    pub fn new(settings: HubSettings) -> Result<Hub, HubError> {
        // Only the hub gets the token, and only it describes its files: see `ask`.
        let client = http::client(settings.answer)?;
        Ok(Hub { client, settings })
    }

    /// What asks it, which others may use as well.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// The server's own token.
    pub(crate) fn token(&self) -> Option<&SecretString> {
        self.settings.token.as_ref()
    }

    /// The address of the hub, for people.
    pub(crate) fn endpoint(&self) -> String {
        let endpoint = &self.settings.endpoint;
        Url::parse(endpoint).map_or_else(|_| endpoint.clone(), |url| shown(&url))
    }

    /// The commit that a revision of a model leads to, asked for with the server's own token.
    pub async fn model(&self, id: &str, revision: &str) -> Result<Commit, HubError> {
        let listing = self.listing(id, revision, self.settings.token.as_ref()).await?;
        let cache = Cache::of_model(self.settings.cache()?, id);
        // The list is needed when the hub cannot be asked.
        if let Err(error) = cache.keep_listing(&listing) {
            tracing::warn!(model = id, "the list of files is not kept: {error}");
        }
        let files = listing.files.into_iter().map(|file| file.name).collect();
        Ok(Commit { hub: self.clone(), cache, id: id.into(), sha: listing.sha, files })
    }

    /// The commit that a revision of a repository leads to, and its files.
    pub(super) async fn listing(
        &self,
        id: &str,
        revision: &str,
        token: Option<&SecretString>,
    ) -> Result<Listing, HubError> {
        let mut url = self.url(&["api", "models"], id, &["revision", revision])?;
        // With sizes and hashes.
        url.set_query(Some("blobs=true"));
        let asked = async {
            let question = Question { method: Method::GET, url: url.clone(), from: 0, token };
            let mut response = self.ask(question).await?.response;
            let mut body = Vec::new();
            while let Some(chunk) = response.chunk().await? {
                body.extend_from_slice(&chunk);
                if body.len() > MAX_DESCRIPTION {
                    let message = format!("more than {MAX_DESCRIPTION} bytes of description");
                    return Err(HubError::Malformed { url: shown(&url), message });
                }
            }
            Ok(body)
        };
        let body = within(self.settings.answer, ANSWER.0, id, asked).await?;
        Listing::parse(&body).map_err(|message| HubError::Malformed { url: shown(&url), message })
    }

    /// The address of a file at a commit.
    pub(super) fn file_url(&self, id: &str, commit: &str, file: &str) -> Result<Url, HubError> {
        let parts: Vec<&str> = ["resolve", commit].into_iter().chain(file.split('/')).collect();
        self.url(&[], id, &parts)
    }

    fn url(&self, before: &[&str], id: &str, after: &[&str]) -> Result<Url, HubError> {
        let endpoint = &self.settings.endpoint;
        let malformed = |message: String| HubError::Malformed { url: "HF_ENDPOINT".into(), message };
        let mut url = Url::parse(endpoint).map_err(|error| malformed(error.to_string()))?;
        url.path_segments_mut()
            .map_err(|()| malformed("not the address of a hub".into()))?
            .pop_if_empty()
            .extend(before)
            .extend(id.split('/'))
            .extend(after);
        Ok(url)
    }

    /// Asks for something, and follows redirects. Large files are kept elsewhere: the hub's redirect has their hash and
    /// length, in headers of their own.
    pub(super) async fn ask(&self, question: Question<'_>) -> Result<Answer, HubError> {
        let Question { method, url, from, token } = question;
        let token = token.map(|token| http::bearer(token).ok_or(HubError::Token)).transpose()?;
        let (hub, is_encrypted) = (url.origin(), url.scheme() == "https");
        let (mut next, mut linked, mut commit) = (url, None, None);
        for _ in 0..REDIRECTS {
            let mut request = self.client.request(method.clone(), next.clone());
            if let Some(token) = token.as_ref().filter(|_| next.origin() == hub) {
                request = request.header(AUTHORIZATION, token);
            }
            if from > 0 {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            let response = request.send().await.map_err(|error| HubError::of(error, &hub))?;
            let (status, headers) = (response.status(), response.headers());
            commit = commit.or_else(|| header(headers, "x-repo-commit"));
            if linked.is_none() && header(headers, "x-linked-etag").is_some() {
                linked = Some(headers.clone());
            }
            if let Some(location) = header(headers, LOCATION.as_str()).filter(|_| status.is_redirection()) {
                next = redirected(&next, &location, is_encrypted)?;
                continue;
            }
            if !status.is_success() {
                let code = ErrorCode::of(status, headers);
                return Err(HubError::Status { url: shown_to(&next, &hub), status, code });
            }
            return Ok(Answer::new(response, from, linked.as_ref(), commit));
        }
        Err(HubError::Malformed { url: shown(&next), message: "one redirect after the other".into() })
    }
}

impl Answer {
    /// The same, of a file whose length is known.
    pub(super) fn of_size(self, size: u64) -> Answer {
        Answer { size: Some(size), ..self }
    }

    fn new(response: Response, from: u64, linked: Option<&HeaderMap>, commit: Option<String>) -> Answer {
        let headers = response.headers();
        let from = if response.status() == StatusCode::PARTIAL_CONTENT { from } else { 0 };
        let linked = |name| header(linked?, name);
        let etag = linked("x-linked-etag").or_else(|| header(headers, ETAG.as_str()));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        let whole =
            header(headers, CONTENT_RANGE.as_str()).and_then(|range| range.rsplit_once('/')?.1.parse().ok());
        let length = header(headers, "content-length").and_then(|length| length.parse::<u64>().ok());
        let size = linked("x-linked-size").and_then(|size| size.parse().ok()).or(whole);
        let size = size.or_else(|| from.checked_add(length?));
        Answer { response, from, etag, size, commit }
    }
}

fn redirected(from: &Url, location: &str, is_encrypted: bool) -> Result<Url, HubError> {
    let malformed = |message: String| HubError::Malformed { url: shown(from), message };
    let next = from.join(location).map_err(|error| malformed(format!("a redirect: {error}")))?;
    match next.scheme() {
        "https" => Ok(next),
        "http" if !is_encrypted => Ok(next),
        scheme => Err(malformed(format!("a redirect to an address of {scheme:?}"))),
    }
}

pub(super) async fn within<T>(
    limit: Duration,
    variable: &'static str,
    what: &str,
    work: impl Future<Output = Result<T, HubError>>,
) -> Result<T, HubError> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out(limit, variable, what)))
}

pub(super) fn timed_out(limit: Duration, variable: &'static str, what: &str) -> HubError {
    HubError::TimedOut { what: what.into(), seconds: limit.as_secs(), variable }
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}
