//! Models in buckets, which are kept beside the hub's: a folder for each version, with the files under their own names.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use futures::StreamExt;
use object_store::{ObjectMeta, ObjectStore, path::Path as Key};
use tokio::time::timeout;

use super::{
    Asked, ModelError,
    weights::{CONFIG, Weights, is_small, sharded},
};
use crate::{
    AdapterFile,
    bucket::{BucketSettings, Download, Failure, Place, connect},
    found::Digest,
    http::bar,
    hub::is_plain,
};

/// The folder of all models from buckets, in the cache of the hub's clients.
const FOLDER: &str = "buckets";
/// The file that names the version that was found last, once it is whole.
const CURRENT: &str = "current";
/// Most objects that a prefix may have.
const MAX_OBJECTS: usize = 100_000;

/// A model in a bucket.
pub(super) struct InBucket<'a> {
    /// As the user named it.
    pub(super) id: &'a str,
    pub(super) place: Place,
    /// What to look for in it.
    pub(super) asked: Asked<'a>,
    /// The folder of everything that is kept.
    pub(super) cache: &'a Path,
    pub(super) settings: BucketSettings,
}

impl InBucket<'_> {
    /// The folder or GGUF file of the model, fetched if it is not here. A bucket that cannot be reached is not missed
    /// if the model was fetched before.
    pub(super) async fn find(&self, offline: bool) -> Result<PathBuf, ModelError> {
        let cached = || self.cached().ok().flatten();
        let of_bucket = |failure| ModelError::Bucket { id: self.id.into(), failure };
        if offline {
            let (id, revision) = (self.id.into(), "its present version".into());
            return cached().ok_or(ModelError::Offline { id, revision });
        }
        match self.fetch().await {
            Err(Fault::Bucket(failure)) if failure.is_passing() => match cached() {
                Some(path) => {
                    tracing::warn!(model = self.id, "using what is in the cache: {failure}");
                    Ok(path)
                }
                None => Err(of_bucket(failure)),
            },
            Err(Fault::Bucket(failure)) => Err(of_bucket(failure)),
            Err(Fault::Model(error)) => Err(error),
            Ok(path) => Ok(path),
        }
    }

    /// The folder of all versions of this model.
    fn folder(&self) -> PathBuf {
        let Place { kind, bucket, prefix } = &self.place;
        let endpoint = self.settings.variables.endpoint(*kind).unwrap_or_default();
        let name = Digest::of(kind.name()).with(endpoint).with(bucket).with(prefix).end();
        self.cache.join(FOLDER).join(hex(&name[..16]))
    }

    /// What was found last.
    fn cached(&self) -> Result<Option<PathBuf>, ModelError> {
        let folder = self.folder();
        let Ok(version) = fs::read_to_string(folder.join(CURRENT)) else { return Ok(None) };
        let folder = folder.join(version.trim());
        let names: Vec<String> = fs::read_to_string(folder.join(LIST))
            .map(|list| list.lines().map(str::to_owned).collect())
            .unwrap_or_default();
        let path = path_of(&folder, &Weights::choose(&self.asked, &names)?);
        Ok(path.exists().then_some(path))
    }

    async fn fetch(&self) -> Result<PathBuf, Fault> {
        let store = connect(&self.place, &self.settings).map_err(|error| Failure::of_settings(&error))?;
        let objects = self.list(&*store).await?;
        let names: Vec<String> = objects.iter().map(|(name, _)| name.clone()).collect();
        let weights = Weights::choose(&self.asked, &names)?;
        let version = objects.iter().fold(Digest::of("objects"), |digest, (name, data)| {
            let tag = data.e_tag.as_deref().unwrap_or_default();
            digest.with(name).with(data.size.to_le_bytes()).with(tag).with(data.last_modified.to_rfc3339())
        });
        let version = hex(&version.end()[..16]);
        let folder = self.folder().join(&version);
        let _lock = lock(&folder).await?;
        tracing::info!(model = self.id, "fetching what is not in the cache");
        let fetch = async |name: &str| -> Result<PathBuf, Fault> {
            let found = objects.iter().find(|(known, _)| known == name);
            let (_, data) = found.ok_or_else(|| self.missing(name))?;
            Ok(object(&*store, (name, data), &folder, &self.settings).await?)
        };
        match &weights {
            Weights::Gguf(parts) => {
                for part in parts {
                    fetch(part).await?;
                }
            }
            weights => {
                fetch(CONFIG).await?;
                for name in names.iter().filter(|name| is_small(name)) {
                    fetch(name).await?;
                }
                let (Weights::Whole(file) | Weights::Sharded(file)) = weights else {
                    return Err(self.missing("").into());
                };
                let path = fetch(file).await?;
                if matches!(weights, Weights::Sharded(_)) {
                    let broken = |message| ModelError::Index { path: path.clone(), message };
                    for name in sharded(&path).map_err(broken)? {
                        fetch(&name).await?;
                    }
                }
            }
        }
        let path = path_of(&folder, &weights);
        write(&folder.join(LIST), &names.join("\n"))?;
        write(&self.folder().join(CURRENT), &version)?;
        Ok(path)
    }

    fn missing(&self, name: &str) -> ModelError {
        ModelError::NotInBucket { id: self.id.into(), file: name.into() }
    }

    /// The names below the prefix, and what is known of them.
    async fn list(&self, store: &dyn ObjectStore) -> Result<Vec<(String, ObjectMeta)>, Failure> {
        let limit = self.settings.answer;
        let prefix = Key::parse(&self.place.prefix).map_err(|_| Failure::NotFound)?;
        let mut objects = store.list(Some(&prefix));
        let mut found = Vec::new();
        while let Some(data) = timeout(limit, objects.next()).await.map_err(|_| Failure::TimedOut(limit))? {
            let data = data?;
            let name = data
                .location
                .prefix_match(&prefix)
                .map(|parts| parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/"));
            // A placeholder for the folder itself has no name in it.
            found.extend(name.filter(|name| is_plain(name)).map(|name| (name, data)));
            if found.len() > MAX_OBJECTS {
                return Err(Failure::Unavailable(format!("there are more than {MAX_OBJECTS} objects in it")));
            }
        }
        found.sort_by(|one, other| one.0.cmp(&other.0));
        if found.is_empty() { Err(Failure::NotFound) } else { Ok(found) }
    }
}

/// The file with the names of all objects of a version.
const LIST: &str = ".objects";

/// Why a model could not be fetched.
enum Fault {
    Bucket(Failure),
    Model(ModelError),
}

impl From<Failure> for Fault {
    fn from(failure: Failure) -> Fault {
        Fault::Bucket(failure)
    }
}

impl From<ModelError> for Fault {
    fn from(error: ModelError) -> Fault {
        Fault::Model(error)
    }
}

fn path_of(folder: &Path, weights: &Weights<'_>) -> PathBuf {
    match weights {
        Weights::Gguf(parts) => folder.join(parts[0]),
        _ => folder.to_owned(),
    }
}

/// Fetches an object into a folder, unless it is there. It has its name when it is whole.
async fn object(
    store: &dyn ObjectStore,
    (name, data): (&str, &ObjectMeta),
    folder: &Path,
    settings: &BucketSettings,
) -> Result<PathBuf, Failure> {
    let path = folder.join(name);
    let io = |path: &Path, source| Failure::Io { path: path.into(), source };
    if path.metadata().is_ok_and(|there| there.len() == data.size) {
        return Ok(path);
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|source| io(parent, source))?;
    }
    let part = folder.join(format!("{name}.incomplete"));
    let (key, tag) = (data.location.to_string(), data.e_tag.clone());
    let file = AdapterFile { name: name.into(), bytes: data.size, stamp: None, key, tag };
    let bar = bar(name, data.size, 0);
    let progress = |bytes| bar.set_position(bytes);
    Download { store, file: &file, path: &part, limit: settings.bytes }.run(&progress).await?;
    bar.finish();
    fs::rename(&part, &path).map_err(|source| io(&path, source))?;
    Ok(path)
}

/// Waits until nobody else fetches the same.
async fn lock(folder: &Path) -> Result<File, Failure> {
    let path = folder.with_extension("lock");
    let taken = path.clone();
    let locked = tokio::task::spawn_blocking(move || {
        taken.parent().map_or(Ok(()), fs::create_dir_all)?;
        let file = File::options().create(true).append(true).open(&taken)?;
        file.lock()?;
        Ok::<_, io::Error>(file)
    });
    let locked = locked.await.unwrap_or_else(|error| Err(io::Error::other(error)));
    locked.map_err(|source| Failure::Io { path, source })
}

/// Writes a file that others may read meanwhile.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let new = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = fs::write(&new, text).and_then(|()| fs::rename(&new, path));
    written.map_err(|source| Failure::Io { path: path.into(), source })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
