//! The S3 server of all tests, and sources that read from it.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use sources::{BucketSettings, Destination, Found, Reference, SourceError, SourceSettings, Sources};
use tempfile::TempDir;

pub(crate) use crate::s3::{S3, hex};

impl S3 {
    /// The server of all tests, each of which has a bucket of its own. It is started if it does not run yet, and ends
    /// when this process does.
    pub(crate) fn server() -> MutexGuard<'static, S3> {
        static SERVER: OnceLock<Mutex<S3>> = OnceLock::new();
        SERVER.get_or_init(|| Mutex::new(S3::start())).lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) const CONFIG: &[u8] = br#"{"r": 8}"#;

/// Weights that do not fit in one packet.
pub(crate) fn weights() -> Vec<u8> {
    (0..20_000_u32).flat_map(u32::to_le_bytes).collect()
}

/// Sources that may read from some buckets at an address.
pub(crate) fn sources(url: &str, allowed: &[&str]) -> Sources {
    sources_with(url, allowed, &[])
}

/// The same, which soon give up a bucket.
pub(crate) fn impatient(url: &str, allowed: &[&str]) -> Sources {
    sources_for(url, allowed, &[], Duration::from_secs(1))
}

/// The same, with further variables; an empty one is not set.
pub(crate) fn sources_with(url: &str, allowed: &[&str], more: &[(&str, &str)]) -> Sources {
    // However busy the machine is.
    sources_for(url, allowed, more, Duration::from_secs(60))
}

fn sources_for(url: &str, allowed: &[&str], more: &[(&str, &str)], patience: Duration) -> Sources {
    let variables = [
        ("S3_ENDPOINT_URL", url),
        ("AWS_ACCESS_KEY_ID", "secret-id"),
        ("AWS_SECRET_ACCESS_KEY", "secret-key"),
        ("GOOGLE_BASE_URL", url),
        ("GOOGLE_SKIP_SIGNATURE", "true"),
        ("GOOGLE_ALLOW_HTTP", "true"),
        ("AZURE_STORAGE_ENDPOINT", url),
        ("AZURE_STORAGE_ACCOUNT_NAME", "account"),
        ("AZURE_SKIP_SIGNATURE", "true"),
        ("PREDIBASE_MODEL_BUCKET", "predibase"),
    ];
    let variables =
        variables.iter().chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let variables = variables.collect::<BTreeMap<_, _>>().into_iter().collect();
    let allowed = allowed.iter().map(|prefix| prefix.parse().unwrap()).collect();
    let buckets = BucketSettings { allowed, variables, answer: patience, bytes: patience };
    let settings = SourceSettings { buckets, ..SourceSettings::from_env(None, vec![]) };
    assert!(!format!("{settings:?}").contains("secret-"));
    Sources::new(settings).unwrap()
}

pub(crate) fn reference(id: &str) -> Reference {
    Reference::parse("s3", id).unwrap()
}

pub(crate) async fn find(sources: &Sources, id: &str) -> Result<Found, SourceError> {
    sources.lookup(&reference(id), None).await
}

/// An adapter that was fetched.
#[derive(Debug)]
pub(crate) struct Fetched {
    folder: TempDir,
    /// What was told of its progress.
    pub(crate) progress: Vec<u64>,
}

impl Fetched {
    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.folder.path().join(name)).unwrap()
    }

    pub(crate) fn count(&self) -> usize {
        fs::read_dir(self.folder.path()).unwrap().count()
    }
}

pub(crate) async fn fetch(sources: &Sources, id: &str, found: &Found) -> Result<Fetched, SourceError> {
    let folder = tempfile::tempdir().unwrap();
    let progress = Mutex::new(Vec::new());
    let told = |bytes| progress.lock().unwrap().push(bytes);
    let into = Destination { folder: folder.path(), max_bytes: 1 << 30, progress: &told };
    sources.fetch(&reference(id), found, None, into).await?;
    let progress = std::mem::take(&mut *progress.lock().unwrap());
    Ok(Fetched { folder, progress })
}

pub(crate) async fn get(sources: &Sources, id: &str) -> Result<Fetched, SourceError> {
    fetch(sources, id, &find(sources, id).await?).await
}
