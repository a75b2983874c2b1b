//! The files of a commit, in the cache.

use std::{
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    time::Duration,
};

use reqwest::Method;
use tokio::time::{Instant, sleep};

use super::{
    Cache, Hub, HubError,
    cache::in_place,
    client::{Answer, Question, timed_out, within},
    download::{Part, repeatedly},
    error::shown,
    is_plain,
    settings::BYTES,
};
use crate::http::bar;

/// Time between two looks at a file that another process fetches.
const LOOK: Duration = Duration::from_millis(200);

/// A repository at a commit.
#[derive(Debug, Clone)]
pub struct Commit {
    pub(super) hub: Hub,
    pub(super) cache: Cache,
    pub(super) id: String,
    /// The hash of the commit.
    pub sha: String,
    /// The names of all its files.
    pub files: Vec<String>,
}

impl Commit {
    /// Where a file is in the cache, into which it is fetched if it is not there. What has come of it before is kept.
    pub async fn fetch(&self, file: &str) -> Result<PathBuf, HubError> {
        let path = self.cache.snapshot(&self.sha).join(file);
        if path.exists() {
            return Ok(path);
        }
        repeatedly(file, || self.attempt(file)).await
    }

    /// Lets the revision lead to this commit in the cache, for when the hub cannot be asked.
    pub fn remember_as(&self, revision: &str) -> Result<(), HubError> {
        self.cache.remember(revision, &self.sha)
    }

    async fn attempt(&self, file: &str) -> Result<PathBuf, HubError> {
        let mut answer = self.ask(file, 0).await?;
        let etag = answer.etag.take();
        let Some(etag) = etag.filter(|etag| is_plain(etag) && !etag.contains('/')) else {
            let url = self.hub.file_url(&self.id, &self.sha, file)?;
            return Err(HubError::Malformed { url: shown(&url), message: "no hash of the content".into() });
        };
        let blob = self.cache.blob(&etag);
        let path = in_place(&blob, |blob| Ok(PathBuf::from(format!("{}.incomplete", blob.display()))))?;
        let _lock = self.lock(file, &etag, &path).await?;
        if !blob.exists() {
            let there = path.metadata().map_or(0, |part| part.len());
            if answer.size.is_some_and(|size| (1..size).contains(&there)) {
                answer = self.ask(file, there).await?;
            }
            let bar = bar(file, answer.size.unwrap_or_default(), answer.from);
            let part = Part { path: &path, name: file, limit: self.hub.settings.bytes };
            part.receive(answer, |bytes| bar.set_position(bytes)).await?;
            bar.finish();
            in_place(&blob, |blob| std::fs::rename(&path, blob))?;
        }
        self.cache.link(&self.sha, file, &etag)
    }

    async fn ask(&self, file: &str, from: u64) -> Result<Answer, HubError> {
        let url = self.hub.file_url(&self.id, &self.sha, file)?;
        let token = self.hub.settings.token.as_ref();
        let question = Question { method: Method::GET, url, from, token };
        within(self.hub.settings.bytes, BYTES.0, file, self.hub.ask(question)).await
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
}
