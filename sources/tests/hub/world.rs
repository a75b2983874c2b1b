//! Sources that ask a hub of this machine.

use std::{fs, path::Path, sync::Mutex, time::Duration};

use secrecy::SecretString;
use sources::{Destination, Found, HubSettings, Reference, SourceError, SourceSettings, Sources};
use tempfile::TempDir;

use crate::fake::{Repository, Server};

pub(crate) const ID: &str = "org/name";
pub(crate) const CONFIG: &[u8] = br#"{"r": 8}"#;

/// Weights that do not fit in one packet.
pub(crate) fn weights() -> Vec<u8> {
    (0..20_000_u32).flat_map(u32::to_le_bytes).collect()
}

/// A repository with an adapter and more.
pub(crate) fn repository() -> Repository {
    Repository::new(&[
        ("adapter_config.json", CONFIG),
        ("adapter_model.safetensors", &weights()),
        ("README.md", b"not needed"),
        ("optimizer.pt", b"not needed either"),
    ])
}

/// How long a hub is waited for that answers in the end, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long one is waited for that does not answer.
const IMPATIENCE: Duration = Duration::from_secs(1);

pub(crate) fn settings(url: &str) -> HubSettings {
    HubSettings {
        endpoint: url.into(),
        token: None,
        cache: None,
        offline: false,
        answer: PATIENCE,
        bytes: PATIENCE,
    }
}

pub(crate) fn sources(hub: HubSettings, use_hub_token: bool) -> Sources {
    Sources::new(SourceSettings { hub, use_hub_token, ..SourceSettings::from_env(None, vec![]) }).unwrap()
}

pub(crate) fn of(server: &Server) -> Sources {
    sources(settings(&server.url), false)
}

/// Sources that soon give up a hub.
pub(crate) fn impatient(server: &Server) -> Sources {
    let hub = HubSettings { answer: IMPATIENCE, bytes: IMPATIENCE, ..settings(&server.url) };
    sources(hub, false)
}

pub(crate) fn reference(id: &str) -> Reference {
    Reference::parse("hub", id).unwrap()
}

pub(crate) fn secret(token: &str) -> Option<SecretString> {
    (!token.is_empty()).then(|| token.to_owned().into())
}

/// An adapter that was fetched.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) folder: TempDir,
    /// What was told of its progress.
    pub(crate) progress: Vec<u64>,
}

impl Fetched {
    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.folder.path().join(name)).unwrap()
    }

    /// The names of its files.
    pub(crate) fn names(&self) -> Vec<String> {
        names(self.folder.path())
    }
}

pub(crate) fn names(folder: &Path) -> Vec<String> {
    let files = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        files.map(|file| file.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Fetches what was found.
pub(crate) async fn fetch(
    sources: &Sources,
    id: &str,
    found: &Found,
    token: &str,
    max_bytes: u64,
) -> Result<Fetched, SourceError> {
    let folder = tempfile::tempdir().unwrap();
    let progress = Mutex::new(Vec::new());
    let told = |bytes| progress.lock().unwrap().push(bytes);
    let into = Destination { folder: folder.path(), max_bytes, progress: &told };
    sources.fetch(&reference(id), found, secret(token).as_ref(), into).await?;
    let progress = std::mem::take(&mut *progress.lock().unwrap());
    Ok(Fetched { folder, progress })
}

/// Finds and fetches an adapter.
pub(crate) async fn get(sources: &Sources, id: &str, token: &str) -> Result<Fetched, SourceError> {
    let found = sources.lookup(&reference(id), secret(token).as_ref()).await?;
    fetch(sources, id, &found, token, u64::MAX).await
}
