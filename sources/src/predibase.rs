//! Adapters of Predibase: its gateway says where in a bucket the adapter of a repository is, to those who may read it.

use std::time::Duration;

use reqwest::{Client, StatusCode, Url, header::HeaderValue};
use secrecy::SecretString;
use serde::Deserialize;
use tokio::time::timeout;

use crate::{
    Denial, NameError, Reference, SettingsError, SourceError, SourceKind,
    bucket::{Buckets, Place, Variables},
    http,
    retry::repeatedly,
};

/// Where Predibase is.
const GATEWAY: &str = "https://api.app.predibase.com";
/// How long it may take to answer a question.
const ANSWER: Duration = Duration::from_secs(10);
/// Most bytes of an answer.
const MAX_ANSWER: usize = 1 << 20;

/// Predibase's gateway.
#[derive(Debug)]
pub(crate) struct Predibase {
    client: Client,
    /// The address of the gateway.
    gateway: Url,
    /// The server's own token, for requests without one.
    token: Option<SecretString>,
}

/// What the gateway tells of an adapter.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Adapter {
    adapter_path: Option<String>,
}

/// What it tells of a model of its older interface.
#[derive(Deserialize)]
struct Model {
    uuid: String,
    #[serde(rename = "bestRunID")]
    best_run_id: String,
}

/// Why the gateway did not say.
enum Refusal {
    Status(StatusCode),
    /// It cannot be reached, or did not answer.
    Unreachable(&'static str),
    /// Its answer is not what it should be.
    Malformed,
    Token,
}

impl Predibase {
    pub(crate) fn new(client: Client, variables: &Variables) -> Result<Predibase, SettingsError> {
        let gateway = variables.get("PREDIBASE_GATEWAY_ENDPOINT").unwrap_or(GATEWAY);
        let gateway = Url::parse(gateway).ok().filter(|url| url.has_host() && !url.cannot_be_a_base());
        let gateway = gateway.ok_or(SettingsError::Url("PREDIBASE_GATEWAY_ENDPOINT"))?;
        let token = variables.get("PREDIBASE_API_TOKEN").map(|token| SecretString::from(token.to_owned()));
        Ok(Predibase { client, gateway, token })
    }

    /// The gateway, for people.
    pub(crate) fn gateway(&self) -> String {
        self.gateway.origin().ascii_serialization()
    }

    /// Where an adapter is, if this credential may read it.
    pub(crate) async fn resolve(
        &self,
        adapter: &Reference,
        credential: Option<&SecretString>,
        buckets: &Buckets,
    ) -> Result<Place, SourceError> {
        let needs = "an api_token, or PREDIBASE_API_TOKEN on the server";
        let token = credential.or(self.token.as_ref());
        let token = token.ok_or(SourceError::NotConfigured { kind: SourceKind::Pbase, needs })?;
        let header = http::bearer(token).ok_or(Refusal::Token);
        let path = match header {
            Ok(header) => self.path(adapter, &header).await,
            Err(refusal) => Err(refusal),
        };
        let hint = ": it has no files yet";
        let path = path.map_err(|refusal| explain(adapter, refusal))?;
        let path = path.ok_or_else(|| SourceError::NotFound { adapter: adapter.clone(), hint })?;
        self.place(adapter, &path, buckets)
    }

    /// A path is a key in Predibase's bucket, or names a bucket itself, which the operator must allow then.
    fn place(&self, adapter: &Reference, path: &str, buckets: &Buckets) -> Result<Place, SourceError> {
        let invalid = |_: NameError| SourceError::Invalid {
            adapter: adapter.clone(),
            fault: "Predibase's gateway does not answer with a path".into(),
        };
        let needs = "PREDIBASE_MODEL_BUCKET";
        let reference =
            Reference::parse(SourceKind::S3.name(), path.trim_end_matches('/')).map_err(invalid)?;
        let own = buckets.default_bucket();
        let place = Place::of(&reference, own);
        let place = place.ok_or(SourceError::NotConfigured { kind: SourceKind::Pbase, needs })?;
        if place.kind == SourceKind::S3 && own == Some(&*place.bucket) || buckets.allowed(&reference).is_ok()
        {
            return Ok(place);
        }
        Err(SourceError::Denied { adapter: adapter.clone(), reason: Denial::Bucket })
    }

    /// The path that the gateway tells, if there is one yet. Repositories have versions; models of the older interface
    /// may be asked for without.
    async fn path(&self, adapter: &Reference, token: &HeaderValue) -> Result<Option<String>, Refusal> {
        let (name, version) = (&*adapter.id, adapter.revision.as_deref());
        if let Some(version) = version {
            let url = self.url(&["v2", "repos", name, "version", version], None)?;
            match self.ask::<Adapter>(url, token).await {
                Err(Refusal::Status(StatusCode::NOT_FOUND)) => {}
                answer => return Ok(answer?.adapter_path),
            }
        }
        let url = self.url(&["v1", "models", "version", "name", name], version)?;
        let Model { uuid, best_run_id } = self.ask(url, token).await?;
        Ok(Some(format!("{uuid}/{best_run_id}/artifacts/model/model_weights")))
    }

    fn url(&self, parts: &[&str], version: Option<&str>) -> Result<Url, Refusal> {
        let mut url = self.gateway.clone();
        url.path_segments_mut().map_err(|()| Refusal::Malformed)?.pop_if_empty().extend(parts);
        if let Some(version) = version {
            url.query_pairs_mut().append_pair("version", version);
        }
        Ok(url)
    }

    async fn ask<T: for<'de> Deserialize<'de>>(&self, url: Url, token: &HeaderValue) -> Result<T, Refusal> {
        let attempt = || async {
            let answer = timeout(ANSWER, self.ask_once(url.clone(), token)).await;
            answer.unwrap_or(Err(Refusal::Unreachable("did not answer in time")))
        };
        let answer = repeatedly(Refusal::is_passing, attempt).await?;
        serde_json::from_slice(&answer).map_err(|_| Refusal::Malformed)
    }

    async fn ask_once(&self, url: Url, token: &HeaderValue) -> Result<Vec<u8>, Refusal> {
        let unreachable = |_: reqwest::Error| Refusal::Unreachable("cannot be reached");
        let asked = self.client.get(url).header(reqwest::header::AUTHORIZATION, token).send();
        let mut response = asked.await.map_err(unreachable)?;
        if !response.status().is_success() {
            return Err(Refusal::Status(response.status()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_ANSWER {
                return Err(Refusal::Malformed);
            }
        }
        Ok(body)
    }
}

impl Refusal {
    fn is_passing(&self) -> bool {
        match self {
            Refusal::Status(status) => matches!(status.as_u16(), 408 | 429) || status.is_server_error(),
            // One that did not answer in time is asked again by the caller, or not at all.
            Refusal::Unreachable(how) => *how == "cannot be reached",
            Refusal::Malformed | Refusal::Token => false,
        }
    }
}

fn explain(adapter: &Reference, refusal: Refusal) -> SourceError {
    let adapter = adapter.clone();
    let denied = |adapter, why: &str| SourceError::Denied { adapter, reason: Denial::Credential(why.into()) };
    match refusal {
        Refusal::Token => denied(adapter, "it is not a token of Predibase"),
        Refusal::Status(status) => match status.as_u16() {
            404 => SourceError::NotFound { adapter, hint: "" },
            401 | 403 => denied(adapter, "Predibase refuses it"),
            code => {
                let text = format!("Predibase's gateway answers with status code {code}");
                match Refusal::Status(status).is_passing() {
                    true => SourceError::Unavailable { adapter, cause: text },
                    false => SourceError::Invalid { adapter, fault: text },
                }
            }
        },
        Refusal::Unreachable(how) => {
            SourceError::Unavailable { adapter, cause: format!("Predibase's gateway {how}") }
        }
        Refusal::Malformed => {
            let fault = "Predibase's gateway answers what it should not".into();
            SourceError::Invalid { adapter, fault }
        }
    }
}
