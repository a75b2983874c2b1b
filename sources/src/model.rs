//! Where the files of a model are: on this machine, or on a hub or in a bucket, from which they are fetched.

mod cached;
mod error;
mod in_bucket;
mod weights;

use std::path::{Path, PathBuf};

pub use error::ModelError;
use weights::{CONFIG, Weights, is_small, sharded};

use crate::{
    BucketSettings, Reference, SourceKind,
    bucket::Place,
    hub::{Commit, Hub, HubSettings, NoHome},
    model_name::{Gguf, Name},
};
use in_bucket::InBucket;

/// A model that is on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFiles {
    /// The model as the user named it, without the revision.
    pub id: String,
    /// A folder in Hugging Face layout, or a GGUF file.
    pub path: PathBuf,
    /// The revision that the user asked for.
    pub revision: Option<String>,
    /// The commit to which the revision led.
    pub sha: Option<String>,
}

/// Finds a model, and fetches it if it is not here. A path that exists is taken for one of the hub's, too, as LoRAX does;
/// an address such as `s3://BUCKET/PREFIX` names its source itself.
pub async fn find_model(
    source: SourceKind,
    model_id: &str,
    revision: Option<&str>,
) -> Result<ModelFiles, ModelError> {
    let settings = HubSettings::from_env();
    let is_address = ["s3://", "gs://", "az://"].iter().any(|scheme| model_id.starts_with(scheme));
    match source {
        SourceKind::Pbase => Err(ModelError::NoSuchSource(source)),
        _ if is_address => in_bucket(SourceKind::S3, model_id, settings).await,
        SourceKind::Local => on_this_machine(model_id),
        SourceKind::Hub if Path::new(model_id).exists() => on_this_machine(model_id),
        SourceKind::Hub => on_hub(model_id, revision, settings).await,
        kind => in_bucket(kind, model_id, settings).await,
    }
}

/// A model of a hub.
async fn on_hub(
    model_id: &str,
    revision: Option<&str>,
    settings: HubSettings,
) -> Result<ModelFiles, ModelError> {
    let named = Name::of(model_id).filter(|_| !model_id.starts_with(['.', '~']));
    let named = named.ok_or_else(|| ModelError::NotAnId(model_id.into()))?;
    // An empty one, as of a variable without a value, is none.
    let given = revision.filter(|revision| !revision.is_empty());
    let revision = given.or(named.revision).filter(|revision| !revision.is_empty());
    let asked = Asked { id: named.id, gguf: named.gguf, revision: revision.unwrap_or("main") };
    if settings.cache.is_none() {
        return Err(NoHome.into());
    }
    let (path, sha) = if settings.offline {
        let (id, revision) = (asked.id.into(), asked.revision.into());
        cached::find(&settings, &asked)?.ok_or(ModelError::Offline { id, revision })?
    } else {
        online(settings, &asked).await?
    };
    let id = match named.gguf {
        None => named.id.into(),
        Some(Gguf::Path(path)) => format!("{}/{path}", named.id),
        Some(Gguf::Tag(tag)) => format!("{}:{tag}", named.id),
    };
    Ok(ModelFiles { id, path, revision: revision.map(str::to_owned), sha: Some(sha) })
}

/// A model in a bucket: all that is below a prefix, or one of its GGUF files.
async fn in_bucket(kind: SourceKind, id: &str, hub: HubSettings) -> Result<ModelFiles, ModelError> {
    let not_an_id = |_| ModelError::NotAnId(id.into());
    let reference = Reference::parse(kind.name(), id).map_err(not_an_id)?;
    let settings = BucketSettings::from_env(Vec::new());
    let place = Place::of(&reference, settings.variables.get("PREDIBASE_MODEL_BUCKET"));
    let mut place = place.ok_or_else(|| ModelError::NotAnId(id.into()))?;
    let prefix = place.prefix.clone();
    let file = prefix.rsplit_once('/').filter(|(_, file)| file.to_ascii_lowercase().ends_with(".gguf"));
    if let Some((folder, _)) = file {
        place.prefix = folder.into();
    }
    let gguf = file.map(|(_, file)| Gguf::Path(file));
    let cache = hub.cache.ok_or(NoHome)?;
    let asked = Asked { id, gguf, revision: "" };
    let path = InBucket { id, place, asked, cache: &cache, settings }.find(hub.offline).await?;
    Ok(ModelFiles { id: id.into(), path, revision: None, sha: None })
}

/// A folder or a GGUF file.
fn on_this_machine(name: &str) -> Result<ModelFiles, ModelError> {
    let path = Path::new(name);
    let is_gguf = path.is_file() && path.extension().is_some_and(|extension| extension == "gguf");
    let canonical = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    // The name of a file is kept, because the other parts of a model are found by it.
    let absolute = match (path.parent(), path.file_name()) {
        (Some(folder), Some(name)) if is_gguf => {
            canonical(if folder.as_os_str().is_empty() { Path::new(".") } else { folder }).join(name)
        }
        _ => canonical(path),
    };
    if !path.exists() {
        Err(ModelError::NotAnId(name.into()))
    } else if is_gguf || path.join(CONFIG).is_file() {
        Ok(ModelFiles { id: name.into(), path: absolute, revision: None, sha: None })
    } else {
        Err(ModelError::NotAModel(absolute))
    }
}

/// A model of a hub at a revision.
struct Asked<'a> {
    id: &'a str,
    gguf: Option<Gguf<'a>>,
    revision: &'a str,
}

/// Path and commit of a model from the hub, or from the cache while the hub cannot be reached.
async fn online(settings: HubSettings, asked: &Asked<'_>) -> Result<(PathBuf, String), ModelError> {
    match from_hub(settings.clone(), asked).await {
        Err(ModelError::Hub { id, source }) if source.is_passing() => {
            // Which model was meant cannot be found out, if not from the cache.
            let Some((path, sha)) = cached::find(&settings, asked).ok().flatten() else {
                return Err(ModelError::Unreachable { id, revision: asked.revision.into(), source });
            };
            tracing::warn!(
                model = id,
                sha,
                "the hub cannot be reached, using what is in the cache: {source}"
            );
            Ok((path, sha))
        }
        found => found,
    }
}

/// Fetches what is not in the cache; returns path and commit.
async fn from_hub(settings: HubSettings, asked: &Asked<'_>) -> Result<(PathBuf, String), ModelError> {
    let Asked { id, revision, .. } = *asked;
    let failed = |source| ModelError::Hub { id: id.into(), source };
    let hub = Hub::new(settings).map_err(failed)?;
    // All files are those of one commit, however the branch moves and whatever of it is in the cache.
    let commit = hub.model(id, revision).await.map_err(failed)?;
    tracing::info!(model = id, sha = commit.sha, "fetching what is not in the cache");
    let path = match Weights::choose(asked, &commit.files)? {
        Weights::Gguf(parts) => {
            let mut paths = Vec::new();
            for part in parts {
                paths.push(commit.fetch(part).await.map_err(failed)?);
            }
            paths.swap_remove(0)
        }
        weights => {
            // Asked for even where the repository does not list it: the hub's refusal names what is missing.
            let config = commit.fetch(CONFIG).await.map_err(failed)?;
            for file in commit.files.iter().filter(|file| is_small(file)) {
                commit.fetch(file).await.map_err(failed)?;
            }
            match weights {
                Weights::Sharded(index) => sharded_weights(id, &commit, index).await?,
                Weights::Whole(file) => drop(commit.fetch(file).await.map_err(failed)?),
                Weights::Gguf(_) => {}
            }
            config.parent().map(Path::to_owned).unwrap_or_default()
        }
    };
    // It is needed only when the hub cannot be asked: all files are here, in a cache that is read-only or full, perhaps.
    if let Err(error) = commit.remember_as(revision) {
        tracing::warn!(model = id, "without the hub, {revision} will not be found in the cache: {error}");
    }
    Ok((path, commit.sha))
}

/// Fetches every file that the index names.
async fn sharded_weights(id: &str, commit: &Commit, index: &str) -> Result<(), ModelError> {
    let failed = |source| ModelError::Hub { id: id.into(), source };
    let path = commit.fetch(index).await.map_err(failed)?;
    let broken = |message| ModelError::Index { path: path.clone(), message };
    for file in sharded(&path).map_err(broken)? {
        // A name that leaves the folder is not one of the repository's.
        if !commit.files.contains(&file) {
            return Err(broken(format!("{file:?} is not in the repository")));
        }
        commit.fetch(&file).await.map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn paths_are_taken_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let find = async |path: &Path| super::find_model(SourceKind::Hub, path.to_str().unwrap(), None).await;
        assert!(matches!(find(folder.path()).await, Err(ModelError::NotAModel(_))));
        let gguf = folder.path().join("m.gguf");
        std::fs::write(&gguf, "").unwrap();
        assert_eq!(find(&gguf).await.unwrap().path, gguf.canonicalize().unwrap());
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        assert_eq!(find(folder.path()).await.unwrap().path, folder.path().canonicalize().unwrap());
    }

    #[tokio::test]
    async fn what_cannot_be_an_id_is_refused_without_asking_a_hub() {
        for bad in ["/no/such/path", "a/b/c", "", "a b", "../x", "org/..", "@main"] {
            assert!(
                matches!(find_model(SourceKind::Hub, bad, None).await, Err(ModelError::NotAnId(_))),
                "{bad}"
            );
        }
    }
}
