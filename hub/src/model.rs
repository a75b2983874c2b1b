//! Where the files of a model are: on this machine, or on a hub from which they are fetched into its cache.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{Cache, Commit, Hub, HubError, Settings, settings::NoHome};

/// Files beside the weights that somebody reads. The first must be there.
const SMALL_FILES: [&str; 13] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
];
/// Further chat templates are in this folder.
const TEMPLATES: &str = "additional_chat_templates/";
/// The weights in one file, and the index of weights in several, in the order in which transformers takes them. Where
/// there is one file, an index beside it is left over.
const WEIGHTS: [(&str, &str); 2] = [
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
];

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

/// Why a model's files cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The path exists and is not a model.
    #[error("{} is neither a folder with a config.json nor a GGUF file", .0.display())]
    NotAModel(PathBuf),
    /// There is no folder for the hub's files.
    #[error(transparent)]
    NoHome(#[from] NoHome),
    /// This is neither a path nor a hub id.
    #[error("{0:?} is neither a path that exists nor a hub id")]
    NotAnId(String),
    /// The hub refused, or what it sent cannot be kept.
    #[error("{id}: {source}")]
    Hub {
        /// The model.
        id: String,
        /// The cause.
        source: HubError,
    },
    /// The hub does not answer, and the model was not downloaded before.
    #[error("{id} at {revision} is not in the cache, and the hub cannot be reached: {source}")]
    Unreachable {
        /// The model.
        id: String,
        /// The revision that was asked for.
        revision: String,
        /// The cause.
        source: HubError,
    },
    /// The model was not downloaded before, and downloads are off.
    #[error("{id} at {revision} is not in the cache, and HF_HUB_OFFLINE is set")]
    Offline {
        /// The model.
        id: String,
        /// The revision that was asked for.
        revision: String,
    },
    /// The repository has no weights that we can load.
    #[error("{id} has neither safetensors, pytorch_model.bin nor a single GGUF file; it has: {files}")]
    NoWeights {
        /// The model.
        id: String,
        /// The files that it has.
        files: String,
    },
    /// The index of the weights is broken.
    #[error("{}: {message}", path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

impl ModelError {
    /// Returns whether the user named something that cannot be had.
    pub fn is_usage(&self) -> bool {
        match self {
            ModelError::Hub { source, .. } => source.is_refusal(),
            ModelError::Unreachable { .. } => false,
            _ => true,
        }
    }
}

/// Finds a model, and fetches it if it is not here.
pub async fn find(model_id: &str, revision: Option<&str>) -> Result<ModelFiles, ModelError> {
    let path = Path::new(model_id);
    if path.exists() {
        let is_gguf = path.is_file() && path.extension().is_some_and(|extension| extension == "gguf");
        let absolute = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        return if is_gguf || path.join(SMALL_FILES[0]).is_file() {
            Ok(ModelFiles { id: model_id.into(), path: absolute, revision: None, sha: None })
        } else {
            Err(ModelError::NotAModel(absolute))
        };
    }
    let (id, tag) = model_id.split_once('@').map_or((model_id, None), |(id, tag)| (id, Some(tag)));
    if !is_id(id) || model_id.starts_with(['.', '~']) {
        return Err(ModelError::NotAnId(model_id.into()));
    }
    // An empty one, as of a variable without a value, is none.
    let revision = revision.filter(|revision| !revision.is_empty()).or(tag).filter(|tag| !tag.is_empty());
    let asked = revision.unwrap_or("main");
    let settings = Settings::from_env()?;
    let (path, sha) = if settings.offline {
        let missing = || ModelError::Offline { id: id.into(), revision: asked.into() };
        from_cache(&settings, id, asked).ok_or_else(missing)?
    } else {
        online(settings, id, asked).await?
    };
    Ok(ModelFiles { id: id.into(), path, revision: revision.map(str::to_owned), sha: Some(sha) })
}

/// Returns whether this is `name` or `organisation/name`.
fn is_id(id: &str) -> bool {
    let is_name = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !part.contains("..")
    };
    id.split('/').count() <= 2 && id.split('/').all(is_name)
}

/// Path and commit of a model from the hub, or from the cache while the hub cannot be reached.
async fn online(settings: Settings, id: &str, revision: &str) -> Result<(PathBuf, String), ModelError> {
    match from_hub(settings.clone(), id, revision).await {
        Err(ModelError::Hub { id, source }) if source.is_passing() => {
            let Some((path, sha)) = from_cache(&settings, &id, revision) else {
                return Err(ModelError::Unreachable { id, revision: revision.into(), source });
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

/// How a repository keeps its weights.
enum Weights<'a> {
    /// In one file.
    Whole(&'static str),
    /// In the files that an index names.
    Sharded(&'static str),
    Gguf(&'a str),
}

fn weights<'a>(id: &str, files: &'a [String]) -> Result<Weights<'a>, ModelError> {
    let has = |name: &str| files.iter().any(|file| file == name);
    for (whole, index) in WEIGHTS {
        if has(whole) {
            return Ok(Weights::Whole(whole));
        }
        if has(index) {
            return Ok(Weights::Sharded(index));
        }
    }
    let mut ggufs = files.iter().filter(|file| file.ends_with(".gguf"));
    match (ggufs.next(), ggufs.next()) {
        (Some(gguf), None) => Ok(Weights::Gguf(gguf)),
        _ => Err(ModelError::NoWeights { id: id.into(), files: files.join(", ") }),
    }
}

/// Path and commit of a model that was fetched before, if all of it was.
fn from_cache(settings: &Settings, id: &str, revision: &str) -> Option<(PathBuf, String)> {
    let cache = Cache::of_model(&settings.cache, id);
    let sha = cache.commit(revision)?;
    let folder = cache.snapshot(&sha);
    // A dangling link is a file that is not there.
    let names = folder.read_dir().ok()?.flatten().filter(|file| file.path().exists());
    let files: Vec<String> = names.map(|file| file.file_name().to_string_lossy().into_owned()).collect();
    let config = || folder.join(SMALL_FILES[0]).exists();
    match weights(id, &files).ok()? {
        Weights::Gguf(file) => Some((folder.join(file), sha)),
        Weights::Whole(_) => config().then_some((folder, sha)),
        Weights::Sharded(index) => {
            let named = sharded(&folder.join(index)).ok()?;
            let whole = config() && named.iter().all(|file| folder.join(file).exists());
            whole.then_some((folder, sha))
        }
    }
}

/// Fetches what is not in the cache; returns path and commit.
async fn from_hub(settings: Settings, id: &str, revision: &str) -> Result<(PathBuf, String), ModelError> {
    let failed = |source| ModelError::Hub { id: id.into(), source };
    let hub = Hub::new(settings).map_err(failed)?;
    // All files are those of one commit, however the branch moves and whatever of it is in the cache.
    let commit = hub.model(id, revision).await.map_err(failed)?;
    tracing::info!(model = id, sha = commit.sha, "fetching what is not in the cache");
    let weights = weights(id, &commit.files)?;
    let path = if let Weights::Gguf(file) = weights {
        commit.fetch(file).await.map_err(failed)?
    } else {
        // Asked for even where the repository does not list it: the hub's refusal names what is missing.
        let config = commit.fetch(SMALL_FILES[0]).await.map_err(failed)?;
        for file in commit.files.iter().filter(|file| is_small(file)) {
            commit.fetch(file).await.map_err(failed)?;
        }
        match weights {
            Weights::Sharded(index) => sharded_weights(id, &commit, index).await?,
            Weights::Whole(file) | Weights::Gguf(file) => {
                commit.fetch(file).await.map_err(failed).map(drop)?;
            }
        }
        config.parent().map(Path::to_owned).unwrap_or_default()
    };
    // It is needed only when the hub cannot be asked: all files are here, in a cache that is read-only or full, perhaps.
    if let Err(error) = commit.remember_as(revision) {
        tracing::warn!(model = id, "without the hub, {revision} will not be found in the cache: {error}");
    }
    Ok((path, commit.sha))
}

fn is_small(file: &str) -> bool {
    SMALL_FILES.contains(&file) || (file.starts_with(TEMPLATES) && file.ends_with(".jinja"))
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

/// The files that an index names.
fn sharded(index: &Path) -> Result<BTreeSet<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = fs::read(index).map_err(|error| error.to_string())?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    Ok(index.weight_map.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn paths_are_taken_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let find = async |path: &Path| super::find(path.to_str().unwrap(), None).await;
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
            assert!(matches!(find(bad, None).await, Err(ModelError::NotAnId(_))), "{bad}");
        }
    }
}
