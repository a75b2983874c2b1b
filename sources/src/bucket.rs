//! Adapters in buckets: Amazon S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage.
//!
//! A bucket is read with the server's own credentials, so that the operator says which buckets requests may name.

mod connect;
mod download;
mod failure;

use std::{
    collections::HashMap,
    fmt,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::try_join_all;
use object_store::{GetOptions, ObjectMeta, ObjectStore, path::Path as Key};
use tokio::time::timeout;

pub use connect::Variables;
pub(crate) use connect::connect;
pub(crate) use download::Download;
pub use failure::BucketError;
pub(crate) use failure::Failure;

use crate::{
    AdapterFile, Denial, Destination, Found, NameError, Reference, SourceError, SourceKind,
    adapter_files::Layout, found::Digest,
};

/// How to reach buckets, and which of them requests may name.
#[derive(Debug, Clone)]
pub struct BucketSettings {
    /// What requests may name (`--adapter-buckets`).
    pub allowed: Vec<BucketPrefix>,
    /// The standard variables of the clouds' own clients.
    pub variables: Variables,
    /// How long a bucket may take to answer a question, retries included.
    pub answer: Duration,
    /// How long a bucket may take to send the next bytes of a file.
    pub bytes: Duration,
}

impl BucketSettings {
    /// What the environment says, with these buckets.
    pub fn from_env(allowed: Vec<BucketPrefix>) -> BucketSettings {
        let (answer, bytes) = (Duration::from_secs(30), Duration::from_secs(60));
        BucketSettings { allowed, variables: Variables::from_env(), answer, bytes }
    }
}

/// A bucket, or what begins with some whole parts of a key in it: `s3://BUCKET` or `s3://BUCKET/PREFIX`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketPrefix {
    kind: SourceKind,
    /// The bucket and the parts of the prefix.
    parts: Vec<String>,
}

impl FromStr for BucketPrefix {
    type Err = NameError;

    fn from_str(text: &str) -> Result<BucketPrefix, NameError> {
        let (text, fault) =
            (text.trim_end_matches('/'), "is not s3://, gs:// or az:// and the name of a bucket");
        let invalid = || NameError::Id { id: text.chars().take(200).collect(), fault };
        let (scheme, _) = text.split_once("://").ok_or_else(invalid)?;
        // The name of some adapter in it is checked as that of any.
        let within = Reference::parse(scheme, &format!("{text}/x"))?;
        let parts: Vec<String> = within.id.split('/').map(str::to_owned).collect();
        let is_bucket = within.kind.is_bucket() && within.kind.name() == scheme;
        if !is_bucket {
            return Err(invalid());
        }
        Ok(BucketPrefix { kind: within.kind, parts: parts[..parts.len() - 1].to_vec() })
    }
}

impl BucketPrefix {
    /// Whether an adapter is in it.
    fn holds(&self, kind: SourceKind, bucket: &str, prefix: &str) -> bool {
        let parts = [bucket].into_iter().chain(prefix.split('/'));
        kind == self.kind && self.parts.iter().map(String::as_str).eq(parts.take(self.parts.len()))
    }
}

/// A place in a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) kind: SourceKind,
    pub(crate) bucket: String,
    pub(crate) prefix: String,
}

impl Place {
    /// The place that a reference names; the bucket of one without any is that of Predibase's adapters.
    pub(crate) fn of(reference: &Reference, default_bucket: Option<&str>) -> Option<Place> {
        let (bucket, prefix) = reference.id.split_once('/')?;
        let bucket = if bucket.is_empty() { default_bucket? } else { bucket };
        Some(Place { kind: reference.kind, bucket: bucket.into(), prefix: prefix.into() })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.kind, self.bucket)
    }
}

/// All buckets.
#[derive(Debug)]
pub(crate) struct Buckets {
    settings: BucketSettings,
    /// Connections to buckets, by kinds and names. There are no more than buckets that are allowed.
    stores: Mutex<HashMap<(SourceKind, String), Arc<dyn ObjectStore>>>,
}

impl Buckets {
    pub(crate) fn new(settings: BucketSettings) -> Buckets {
        Buckets { settings, stores: Mutex::default() }
    }

    /// The bucket of Predibase's adapters.
    pub(crate) fn default_bucket(&self) -> Option<&str> {
        self.settings.variables.get("PREDIBASE_MODEL_BUCKET")
    }

    /// Where a reference leads, if requests may name it.
    pub(crate) fn allowed(&self, adapter: &Reference) -> Result<Place, SourceError> {
        let needs = "PREDIBASE_MODEL_BUCKET, or an id of the form s3://BUCKET/PREFIX";
        let place = Place::of(adapter, self.default_bucket());
        let place = place.ok_or(SourceError::NotConfigured { kind: adapter.kind, needs })?;
        let holds = |allowed: &BucketPrefix| allowed.holds(place.kind, &place.bucket, &place.prefix);
        if !self.settings.allowed.iter().any(holds) {
            return Err(SourceError::Denied { adapter: adapter.clone(), reason: Denial::Bucket });
        }
        Ok(place)
    }

    /// The version of the adapter at a place.
    pub(crate) async fn find_adapter(
        &self,
        adapter: &Reference,
        place: &Place,
    ) -> Result<Found, SourceError> {
        let store = self.store(place).map_err(|failure| failure.of(adapter))?;
        let look = Look { buckets: self, store: &*store, place };
        let failed = |failure: Failure| failure.of(adapter);
        let files = look.files().await.map_err(failed)?;
        let layout = Layout::find(|name| files.iter().any(|(key, _)| key == name));
        let layout = layout
            .map_err(|fault| SourceError::Invalid { adapter: adapter.clone(), fault: fault.to_owned() })?;
        let endpoint = self.settings.variables.endpoint(place.kind).unwrap_or_default();
        let mut version = Digest::of(place.kind.name()).with(endpoint).with(&place.bucket);
        let mut found = Vec::new();
        for (name, key) in layout.files() {
            let Some((_, data)) = files.iter().find(|(found, _)| *found == key) else { continue };
            let tag = data.e_tag.clone().or(data.version.clone());
            version = version
                .with(data.location.as_ref())
                .with(data.size.to_le_bytes())
                .with(tag.as_deref().unwrap_or_default())
                .with(data.last_modified.to_rfc3339());
            let key = data.location.to_string();
            found.push(AdapterFile { name: name.into(), bytes: data.size, stamp: None, key, tag });
        }
        let bytes = found.iter().fold(0_u64, |sum, file| sum.saturating_add(file.bytes));
        Ok(Found { version: version.end(), bytes, files: found, in_place: None, is_free: false })
    }

    /// Writes the files of a version into a folder.
    pub(crate) async fn fetch_adapter(
        &self,
        adapter: &Reference,
        place: &Place,
        found: &Found,
        into: Destination<'_>,
    ) -> Result<(), SourceError> {
        let failed = |failure: Failure| failure.of(adapter);
        let store = self.store(place).map_err(failed)?;
        let mut before = 0;
        for file in &found.files {
            let path = into.place(file)?;
            let progress = |bytes| (into.progress)(before + bytes);
            let download = Download { store: &*store, file, path: &path, limit: self.settings.bytes };
            download.run(&progress).await.map_err(failed)?;
            before += file.bytes;
        }
        Ok(())
    }

    /// The connection to a bucket.
    fn store(&self, place: &Place) -> Result<Arc<dyn ObjectStore>, Failure> {
        // Nobody panics with the lock held.
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        let name = (place.kind, place.bucket.clone());
        if let Some(store) = stores.get(&name) {
            return Ok(store.clone());
        }
        let store = connect(place, &self.settings).map_err(|error| Failure::of_settings(&error))?;
        stores.insert(name, store.clone());
        Ok(store)
    }
}

/// A look at a place in a bucket.
struct Look<'a> {
    buckets: &'a Buckets,
    store: &'a dyn ObjectStore,
    place: &'a Place,
}

impl Look<'_> {
    /// Those files that may be an adapter's. Each is asked for by its name: this needs no right to list a bucket, and
    /// finds nothing that only begins with the same letters.
    async fn files(&self) -> Result<Vec<(String, ObjectMeta)>, Failure> {
        let mut files = Vec::new();
        let mut refused = None;
        for name in Layout::candidates() {
            let is_needless = Layout::find(|name| files.iter().any(|(found, _)| found == name)).is_ok();
            if is_needless {
                break;
            }
            match self.head(&name).await {
                Ok(data) => files.push((name, data)),
                Err(Failure::NotFound) => {}
                // What a bucket that may not be listed says of a file that is not there.
                Err(failure @ Failure::Denied(_)) => refused = Some(failure),
                Err(failure) => return Err(failure),
            }
        }
        match (Layout::find(|name| files.iter().any(|(found, _)| found == name)), refused) {
            (Ok(layout), _) => files.extend(self.text_files(&layout).await?),
            (Err(_), Some(refused)) => return Err(refused),
            (Err(_), None) if files.is_empty() => return Err(Failure::NotFound),
            (Err(_), None) => {}
        }
        Ok(files)
    }

    /// The tokenizer's files, which are asked for at once: most adapters have none or nearly all of them.
    async fn text_files(&self, layout: &Layout) -> Result<Vec<(String, ObjectMeta)>, Failure> {
        let asked = layout.text_candidates().map(async |name| match self.head(&name).await {
            Ok(data) => Ok(Some((name, data))),
            Err(Failure::NotFound | Failure::Denied(_)) => Ok(None),
            Err(failure) => Err(failure),
        });
        Ok(try_join_all(asked).await?.into_iter().flatten().collect())
    }

    async fn head(&self, name: &str) -> Result<ObjectMeta, Failure> {
        let key = Key::parse(format!("{}/{name}", self.place.prefix)).map_err(|_| Failure::NotFound)?;
        let options = GetOptions { head: true, ..GetOptions::default() };
        let asked = timeout(self.buckets.settings.answer, self.store.get_opts(&key, options)).await;
        Ok(asked.map_err(|_| Failure::TimedOut(self.buckets.settings.answer))??.meta)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_whole_parts_of_keys() {
        for (allowed, id, expected) in [
            ("s3://bucket", "s3://bucket/a", true),
            ("s3://bucket/", "s3://bucket/a/b", true),
            ("s3://bucket/team", "s3://bucket/team/a", true),
            ("s3://bucket/team", "s3://bucket/team", true),
            ("s3://bucket/team/", "s3://bucket/team/a", true),
            ("s3://bucket/team", "s3://bucket/team2/a", false),
            ("s3://bucket/team", "s3://bucket/tea", false),
            ("s3://bucket/team", "s3://bucket/other/team", false),
            ("s3://bucket", "s3://bucket2/a", false),
            ("s3://bucket2", "s3://bucket/a", false),
            ("s3://bucket", "gs://bucket/a", false),
            ("gs://bucket", "gs://bucket/a", true),
            ("az://bucket/a/b", "az://bucket/a/b/c", true),
            ("az://bucket/a/b", "az://bucket/a/c", false),
        ] {
            let prefix: BucketPrefix = allowed.parse().unwrap();
            let place = Place::of(&Reference::parse("hub", id).unwrap(), None).unwrap();
            assert_eq!(prefix.holds(place.kind, &place.bucket, &place.prefix), expected, "{allowed} {id}");
        }
        for text in [
            "",
            "bucket",
            "s3://",
            "s3:///a",
            "hub://org/name",
            "local://x",
            "s3://../a",
            "s3://a/../b",
            "pbase://a",
            "S3://bucket",
            "s3://*",
            "hf://a/b",
        ] {
            assert!(text.parse::<BucketPrefix>().is_err(), "{text}");
        }
    }
}
