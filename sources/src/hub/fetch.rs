//! Questions to a hub, and its files.

use std::{
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use reqwest::{
    Certificate, Client, Response, StatusCode, Url,
    header::{ETAG, HeaderMap, LOCATION, RANGE},
    redirect::Policy,
};
use secrecy::ExposeSecret;
use serde::Deserialize;
use tokio::{
    fs::OpenOptions,
    io::{AsyncWriteExt, BufWriter},
    time::{Instant, sleep, timeout},
};

use super::{
    Cache, HubError, HubSettings,
    cache::{in_place, is_plain},
    settings::{ANSWER, BYTES},
};

/// Attempts to get a file after the first one.
const RETRIES: u32 = 3;
/// The wait before the first retry. Each further one is twice as long.
const BACKOFF: Duration = Duration::from_millis(250);
/// Redirects of one question.
const REDIRECTS: usize = 10;
/// Time between two looks at a file that another process fetches.
const LOOK: Duration = Duration::from_millis(200);
/// Bytes that are gathered before they are written.
const GATHERED: usize = 1 << 20;

/// A hub.
#[derive(Debug, Clone)]
pub struct Hub {
    client: Client,
    settings: HubSettings,
}

/// A repository at a commit.
#[derive(Debug, Clone)]
pub struct Commit {
    hub: Hub,
    cache: Cache,
    id: String,
    /// The hash of the commit.
    pub sha: String,
    /// The names of all its files.
    pub files: Vec<String>,
}

/// What the hub tells of a repository.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// The answer to a question about a file.
struct Answer {
    response: Response,
    /// The hash of the whole content.
    etag: Option<String>,
    /// The length of the whole content.
    size: Option<u64>,
}

impl Hub {
    /// A hub that is reached by these settings.
    pub fn new(settings: HubSettings) -> Result<Hub, HubError> {
        // Besides those of the system, which small images do not have.
        let roots = webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter();
        let roots: Vec<_> = roots.map(|root| Certificate::from_der(root)).collect::<Result<_, _>>()?;
        let client = Client::builder()
            .tls_certs_merge(roots)
            .connect_timeout(settings.answer)
            // Only the hub gets the token, and only it describes its files: see `get`.
            .redirect(Policy::none())
            .user_agent(concat!("lorax/", env!("CARGO_PKG_VERSION")))
            .build()?;
        Ok(Hub { client, settings })
    }

    /// The commit that a revision of a model leads to.
    pub async fn model(&self, id: &str, revision: &str) -> Result<Commit, HubError> {
        let url = self.url(&["api", "models"], id, &["revision", revision])?;
        let asked = async { Ok(self.get(url.clone(), 0).await?.response.bytes().await?) };
        let body = within(self.settings.answer, ANSWER.0, id, asked).await?;
        let malformed = |message: String| HubError::Malformed { url: url.to_string(), message };
        let info: Info = serde_json::from_slice(&body).map_err(|error| malformed(error.to_string()))?;
        let files: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
        if let Some(name) = files.iter().chain([&info.sha]).find(|name| !is_plain(name)) {
            return Err(malformed(format!("{name:?} is not a name")));
        }
        let cache = Cache::of_model(&self.settings.cache, id);
        Ok(Commit { hub: self.clone(), cache, id: id.into(), sha: info.sha, files })
    }

    fn url(&self, before: &[&str], id: &str, after: &[&str]) -> Result<Url, HubError> {
        let endpoint = &self.settings.endpoint;
        let malformed = |message: String| HubError::Malformed { url: endpoint.clone(), message };
        let mut url = Url::parse(endpoint).map_err(|error| malformed(error.to_string()))?;
        url.path_segments_mut()
            .map_err(|()| malformed("not the address of a hub".into()))?
            .pop_if_empty()
            .extend(before)
            .extend(id.split('/'))
            .extend(after);
        Ok(url)
    }

    /// Asks for something from a byte on, and follows redirects. Large files are kept elsewhere: the hub's redirect has
    /// their hash and length, in headers of their own.
    async fn get(&self, url: Url, from: u64) -> Result<Answer, HubError> {
        let hub = url.origin();
        let (mut next, mut linked) = (url, None);
        for _ in 0..REDIRECTS {
            let mut request = self.client.get(next.clone());
            if let Some(token) = self.settings.token.as_ref().filter(|_| next.origin() == hub) {
                request = request.bearer_auth(token.expose_secret());
            }
            if from > 0 {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            let response = request.send().await?;
            let status = response.status();
            if linked.is_none() && header(response.headers(), "x-linked-etag").is_some() {
                linked = Some(response.headers().clone());
            }
            if let Some(location) =
                header(response.headers(), LOCATION.as_str()).filter(|_| status.is_redirection())
            {
                next = next.join(&location).map_err(|error| HubError::Malformed {
                    url: next.to_string(),
                    message: format!("a redirect to {location:?}: {error}"),
                })?;
                continue;
            }
            if !status.is_success() {
                return Err(HubError::Status { url: next.to_string(), status });
            }
            let own = header(response.headers(), ETAG.as_str());
            let etag = linked.as_ref().and_then(|headers| header(headers, "x-linked-etag")).or(own);
            let size = linked.as_ref().and_then(|headers| header(headers, "x-linked-size")?.parse().ok());
            let size = size.or_else(|| Some(from + response.content_length()?));
            return Ok(Answer { response, etag, size });
        }
        Err(HubError::Malformed { url: next.to_string(), message: "one redirect after the other".into() })
    }
}

impl Commit {
    /// Where a file is in the cache, into which it is fetched if it is not there. What has come of it before is kept.
    pub async fn fetch(&self, file: &str) -> Result<PathBuf, HubError> {
        let path = self.cache.snapshot(&self.sha).join(file);
        if path.exists() {
            return Ok(path);
        }
        let mut retries = 0;
        loop {
            match self.attempt(file).await {
                // Another wait as long as this one is for the caller to decide.
                Err(error @ HubError::TimedOut { .. }) => return Err(error),
                Err(error) if error.is_passing() && retries < RETRIES => {
                    tracing::debug!("{file}: {error}");
                    sleep(BACKOFF * 2_u32.pow(retries)).await;
                    retries += 1;
                }
                result => return result,
            }
        }
    }

    /// Lets the revision lead to this commit in the cache, for when the hub cannot be asked.
    pub fn remember_as(&self, revision: &str) -> Result<(), HubError> {
        self.cache.remember(revision, &self.sha)
    }

    async fn attempt(&self, file: &str) -> Result<PathBuf, HubError> {
        let parts: Vec<&str> = ["resolve", &self.sha].into_iter().chain(file.split('/')).collect();
        let url = self.hub.url(&[], &self.id, &parts)?;
        let mut answer = self.within(file, self.hub.get(url.clone(), 0)).await?;
        let etag = answer.etag.take().map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        let Some(etag) = etag.filter(|etag| is_plain(etag) && !etag.contains('/')) else {
            return Err(HubError::Malformed {
                url: url.to_string(),
                message: "no hash of the content".into(),
            });
        };
        let blob = self.cache.blob(&etag);
        let part = in_place(&blob, |blob| Ok(PathBuf::from(format!("{}.incomplete", blob.display()))))?;
        let _lock = self.lock(file, &etag, &part).await?;
        if !blob.exists() {
            let there = part.metadata().map_or(0, |part| part.len());
            let begun = answer.size.is_some_and(|size| (1..size).contains(&there));
            if begun {
                answer = self.within(file, self.hub.get(url, there)).await?;
            }
            let from =
                if begun && answer.response.status() == StatusCode::PARTIAL_CONTENT { there } else { 0 };
            self.receive(file, answer, &part, from).await?;
            in_place(&blob, |blob| std::fs::rename(&part, blob))?;
        }
        self.cache.link(&self.sha, file, &etag)
    }

    /// Writes what comes to the end of `part`, of which `from` bytes are kept.
    async fn receive(&self, file: &str, answer: Answer, part: &Path, from: u64) -> Result<(), HubError> {
        let Answer { mut response, size, .. } = answer;
        let failed = |source| HubError::Cache { path: part.into(), source };
        let mut open = OpenOptions::new();
        let open = open.create(true).write(true).truncate(from == 0).append(from > 0).open(part);
        let mut writer = BufWriter::with_capacity(GATHERED, open.await.map_err(failed)?);
        let bar = bar(file, size.unwrap_or_default(), from);
        let mut received = from;
        let came = loop {
            match self.within(file, async { Ok(response.chunk().await?) }).await {
                Ok(Some(chunk)) => {
                    writer.write_all(&chunk).await.map_err(failed)?;
                    received += chunk.len() as u64;
                    bar.set_position(received);
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        // What came before a failure is kept for the next attempt.
        writer.flush().await.map_err(failed)?;
        came?;
        bar.finish();
        match size {
            Some(expected) if expected != received => {
                in_place(part, |part| std::fs::remove_file(part))?;
                Err(HubError::Length { file: file.into(), expected, received })
            }
            _ => Ok(()),
        }
    }

    /// Waits while another process fetches the same content, for as long as that goes on.
    async fn lock(&self, file: &str, etag: &str, part: &Path) -> Result<File, HubError> {
        let path = self.cache.lock(etag);
        let lock = in_place(&path, |path| File::options().create(true).append(true).open(path))?;
        let (mut grown, mut last) = (0, Instant::now());
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(lock),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => return Err(HubError::Cache { path, source }),
            }
            let length = part.metadata().map_or(0, |part| part.len());
            if length != grown {
                (grown, last) = (length, Instant::now());
            }
            if last.elapsed() > self.hub.settings.bytes {
                return Err(timed_out(self.hub.settings.bytes, BYTES.0, file));
            }
            sleep(LOOK).await;
        }
    }

    async fn within<T>(
        &self,
        file: &str,
        work: impl Future<Output = Result<T, HubError>>,
    ) -> Result<T, HubError> {
        within(self.hub.settings.bytes, BYTES.0, file, work).await
    }
}

async fn within<T>(
    limit: Duration,
    variable: &'static str,
    what: &str,
    work: impl Future<Output = Result<T, HubError>>,
) -> Result<T, HubError> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out(limit, variable, what)))
}

fn timed_out(limit: Duration, variable: &'static str, what: &str) -> HubError {
    HubError::TimedOut { what: what.into(), seconds: limit.as_secs(), variable }
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Shows how far a download is, where stderr is a terminal.
fn bar(file: &str, size: u64, from: u64) -> ProgressBar {
    let style =
        ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} ({eta})");
    let bar = ProgressBar::new(size).with_message(file.to_owned()).with_position(from);
    if let Ok(style) = style { bar.with_style(style) } else { bar }
}
