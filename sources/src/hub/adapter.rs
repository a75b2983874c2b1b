//! Adapters on a hub.

use std::{fs, path::Path};

use reqwest::{Method, StatusCode};
use secrecy::SecretString;

use super::{
    Cache, ErrorCode, Hub, HubError,
    client::{Question, within},
    download::{Part, repeatedly},
    error::shown,
    listing::{Listed, Listing},
    settings::{ANSWER, BYTES},
};
use crate::{
    AdapterFile, Denial, Destination, Found, Reference, SourceError, SourceKind, Stamp,
    adapter_files::Layout, found::Digest,
};

/// The revision that a reference without one means.
const MAIN: &str = "main";

impl Hub {
    /// The version that a reference leads to, if this credential may read it.
    pub(crate) async fn find_adapter(
        &self,
        adapter: &Reference,
        token: Option<&SecretString>,
    ) -> Result<Found, SourceError> {
        if self.settings.offline {
            let (cache, name) = (self.settings.cache.clone(), adapter.clone());
            let offline = || SourceError::Offline { adapter: adapter.clone() };
            let found = tokio::task::spawn_blocking(move || in_cache(&cache?, &name)).await.ok().flatten();
            return found.ok_or_else(offline);
        }
        let failed = |error| explain(adapter, error);
        let revision = adapter.revision.as_deref().unwrap_or(MAIN);
        let ask = || self.listing(&adapter.id, revision, token);
        let listing = repeatedly(&adapter.id, ask).await.map_err(failed)?;
        let invalid = |fault: &str| SourceError::Invalid { adapter: adapter.clone(), fault: fault.into() };
        let listed = |name: &str| listing.files.iter().find(|file| file.name == name);
        let layout = Layout::find(|name| listed(name).is_some()).map_err(invalid)?;
        let mut files = Vec::new();
        for (name, path) in layout.files() {
            let file = listed(&path);
            let size = file.and_then(|file| file.size);
            // The list of a gated repository is public, its files are not.
            let bytes = match size {
                Some(size) if !listing.is_gated => size,
                size => {
                    let described = self.describe(adapter, &listing, &path, token).await.map_err(failed)?;
                    size.unwrap_or(described)
                }
            };
            let tag = file.and_then(Listed::sha256);
            let key = format!("{}/{path}", listing.sha);
            files.push(AdapterFile { name: name.into(), bytes, stamp: None, key, tag });
        }
        let bytes = files.iter().fold(0_u64, |sum, file| sum.saturating_add(file.bytes));
        let version = version(&self.endpoint(), &adapter.id, &listing.sha);
        // Servers of another age fetch fewer files of the same commit.
        let version = layout.text.iter().fold(version, Digest::with).end();
        Ok(Found { version, bytes, files, in_place: None, is_free: false })
    }

    /// The size of a file, if this credential may read it.
    async fn describe(
        &self,
        adapter: &Reference,
        listing: &Listing,
        file: &str,
        token: Option<&SecretString>,
    ) -> Result<u64, HubError> {
        let attempt = || async {
            let url = self.file_url(&adapter.id, &listing.sha, file)?;
            let question = Question { method: Method::HEAD, url: url.clone(), from: 0, token };
            let answer = within(self.settings.answer, ANSWER.0, file, self.ask(question)).await?;
            let no_size =
                || HubError::Malformed { url: shown(&url), message: "no length of the file".into() };
            answer.size.ok_or_else(no_size)
        };
        repeatedly(file, attempt).await
    }

    /// Writes the files of a version into a folder.
    pub(crate) async fn fetch_adapter(
        &self,
        adapter: &Reference,
        found: &Found,
        token: Option<&SecretString>,
        into: Destination<'_>,
    ) -> Result<(), SourceError> {
        let mut before = 0;
        for file in &found.files {
            let path = into.place(file)?;
            let part = Part { path: &path, name: &file.name, limit: self.settings.bytes };
            let progress = |bytes| (into.progress)(before + bytes);
            let attempt = || self.fetch_file(adapter, file, token, (&part, &progress));
            let is_same = repeatedly(&file.name, attempt).await.map_err(|error| explain(adapter, error))?;
            if !is_same {
                return Err(SourceError::Changed { adapter: adapter.clone() });
            }
            before += file.bytes;
        }
        Ok(())
    }

    /// Fetches what is missing of a file. Returns false if the hub has another content by that name.
    async fn fetch_file(
        &self,
        adapter: &Reference,
        file: &AdapterFile,
        token: Option<&SecretString>,
        (part, progress): (&Part<'_>, &(dyn Fn(u64) + Send + Sync)),
    ) -> Result<bool, HubError> {
        let (commit, path) = file.key.split_once('/').unwrap_or_default();
        let url = self.file_url(&adapter.id, commit, path)?;
        let there = fs::metadata(part.path).map_or(0, |part| part.len());
        let question = Question { method: Method::GET, url, from: there, token };
        let asked = within(self.settings.bytes, BYTES.0, part.name, self.ask(question)).await;
        let answer = match asked {
            Err(HubError::Status { status: StatusCode::RANGE_NOT_SATISFIABLE, .. }) if there > 0 => {
                // As much has come as the file is said to have now.
                return part.discard(self.length(file, there)).map(|()| true);
            }
            answer => answer?,
        };
        // A mirror may have tags of its own. One that is a SHA-256 is the hub's name of a large file's content.
        let etag = answer.etag.as_ref().filter(|etag| etag.len() == 64);
        let is_other_content = etag.zip(file.tag.as_ref()).is_some_and(|(etag, tag)| etag != tag);
        if is_other_content || answer.commit.as_ref().is_some_and(|told| told != commit) {
            return Ok(false);
        }
        match answer.size {
            Some(size) if size != file.bytes => part.discard(self.length(file, size))?,
            // A length that nobody tells is that of the list.
            _ => part.receive(answer.of_size(file.bytes), progress).await?,
        }
        Ok(true)
    }

    fn length(&self, file: &AdapterFile, received: u64) -> HubError {
        HubError::Length { file: file.name.clone(), expected: file.bytes, received }
    }
}

fn version(endpoint: &str, id: &str, commit: &str) -> Digest {
    Digest::of(SourceKind::Hub.name()).with(endpoint).with(id).with(commit)
}

/// The version that a reference led to last, if its files are in the cache of the hub's clients.
fn in_cache(root: &Path, adapter: &Reference) -> Option<Found> {
    let cache = Cache::of_model(root, &adapter.id);
    let commit = cache.commit(adapter.revision.as_deref().unwrap_or(MAIN))?;
    let folder = cache.snapshot(&commit).canonicalize().ok()?;
    let layout = Layout::find(|name| folder.join(name).is_file()).ok()?;
    let folder = layout.folder.map_or(folder.clone(), |inner| folder.join(inner));
    // Nothing keeps others from writing to the cache, hence the stamps.
    let mut version = version("cache", &adapter.id, &commit).with(folder.as_os_str().as_encoded_bytes());
    let mut files = Vec::new();
    for (name, key) in (Layout { folder: None, ..layout }).files() {
        let stamp = Stamp::of(&fs::metadata(folder.join(name)).ok()?);
        version = version.with(stamp.bytes());
        files.push(AdapterFile { name: name.into(), bytes: stamp.size, stamp: Some(stamp), key, tag: None });
    }
    let bytes = files.iter().map(|file| file.bytes).sum();
    Some(Found { version: version.end(), bytes, files, in_place: Some(folder), is_free: true })
}

/// What a hub's answer means for who asked for an adapter.
fn explain(adapter: &Reference, error: HubError) -> SourceError {
    let adapter = adapter.clone();
    let denied =
        |adapter, reason: &str| SourceError::Denied { adapter, reason: Denial::Credential(reason.into()) };
    match error {
        HubError::Token => denied(adapter, "it is not a token of a hub"),
        HubError::Status { status, code, .. } => match (code, status.as_u16()) {
            (Some(ErrorCode::GatedRepo), _) => denied(adapter, "access must be asked for at the hub"),
            (Some(ErrorCode::BadToken), _) => denied(adapter, "the hub does not know it"),
            (Some(ErrorCode::RevisionNotFound), _) => {
                SourceError::NotFound { adapter, hint: ": its repository has no such revision" }
            }
            (Some(ErrorCode::RepoNotFound), _) => {
                SourceError::NotFound { adapter, hint: ", or needs a credential that may read it" }
            }
            (_, 404 | 410) => SourceError::NotFound { adapter, hint: "" },
            (_, 401 | 403) => denied(adapter, "the hub refuses it"),
            _ if error.is_passing() => SourceError::Unavailable { adapter, cause: error.to_string() },
            _ => SourceError::Invalid { adapter, fault: error.to_string() },
        },
        HubError::Malformed { .. } => SourceError::Invalid { adapter, fault: error.to_string() },
        HubError::Cache { path, source } => SourceError::Io { path, source },
        _ => SourceError::Unavailable { adapter, cause: error.to_string() },
    }
}
