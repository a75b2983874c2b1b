//! Where the files of a model are: on this machine, or on a hub from which they are fetched into its cache.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    hub::{Cache, Commit, Hub, HubError, HubSettings, NoHome},
    model_name::{self, Gguf, Name},
};

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
    #[error("{id} has neither safetensors, pytorch_model.bin nor GGUF files; it has: {files}")]
    NoWeights {
        /// The model.
        id: String,
        /// The files that it has.
        files: String,
    },
    /// The repository has several models as GGUF files, and none of them is named.
    #[error(
        "{id} has several GGUF files, so that one must be named, as {id}/FILE or {id}:TYPE; it has: {files}"
    )]
    SeveralGgufs {
        /// The model.
        id: String,
        /// The GGUF files that it has.
        files: String,
    },
    /// No GGUF file, or more than one, has the name that was asked for.
    #[error("{id} has {count} GGUF files that {asked:?} names; it has: {files}")]
    NoSuchGguf {
        /// The model.
        id: String,
        /// The name that was asked for.
        asked: String,
        /// The number of files with that name.
        count: usize,
        /// The GGUF files that it has.
        files: String,
    },
    /// The model is in several GGUF files, which we do not load.
    #[error(
        "{id}: {file} is one of several files of a model, which are not loaded: join them with llama-gguf-split"
    )]
    PartOfGguf {
        /// The model.
        id: String,
        /// One of the files.
        file: String,
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
pub async fn find_model(model_id: &str, revision: Option<&str>) -> Result<ModelFiles, ModelError> {
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
    let named = Name::of(model_id).filter(|_| !model_id.starts_with(['.', '~']));
    let named = named.ok_or_else(|| ModelError::NotAnId(model_id.into()))?;
    // An empty one, as of a variable without a value, is none.
    let given = revision.filter(|revision| !revision.is_empty());
    let revision = given.or(named.revision).filter(|revision| !revision.is_empty());
    let asked = Asked { id: named.id, gguf: named.gguf, revision: revision.unwrap_or("main") };
    let settings = HubSettings::from_env()?;
    let (path, sha) = if settings.offline {
        let (id, revision) = (asked.id.into(), asked.revision.into());
        from_cache(&settings, &asked).ok_or(ModelError::Offline { id, revision })?
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
            let Some((path, sha)) = from_cache(&settings, asked) else {
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

/// How a repository keeps its weights.
enum Weights<'a> {
    /// In one file.
    Whole(&'static str),
    /// In the files that an index names.
    Sharded(&'static str),
    Gguf(&'a str),
}

fn weights<'a>(asked: &Asked<'_>, files: &'a [String]) -> Result<Weights<'a>, ModelError> {
    let Some(gguf) = asked.gguf else {
        let has = |name: &str| files.iter().any(|file| file == name);
        for (whole, index) in WEIGHTS {
            if has(whole) {
                return Ok(Weights::Whole(whole));
            }
            if has(index) {
                return Ok(Weights::Sharded(index));
            }
        }
        let (models, id) = (model_name::models(files), asked.id.to_owned());
        return match models[..] {
            [] => Err(ModelError::NoWeights { id, files: files.join(", ") }),
            _ if models.iter().all(|file| model_name::is_part(file)) => part_of_gguf(asked, models[0]),
            [file] => Ok(Weights::Gguf(file)),
            _ => Err(ModelError::SeveralGgufs { id, files: models.join(", ") }),
        };
    };
    let models = model_name::models(files);
    let named: Vec<&str> = models.iter().copied().filter(|file| gguf.names(file)).collect();
    match named[..] {
        [first, ..] if named.iter().all(|file| model_name::is_part(file)) => part_of_gguf(asked, first),
        [file] => Ok(Weights::Gguf(file)),
        _ => {
            let (Gguf::Path(name) | Gguf::Tag(name)) = gguf;
            let (id, asked, count) = (asked.id.into(), name.into(), named.len());
            Err(ModelError::NoSuchGguf { id, asked, count, files: models.join(", ") })
        }
    }
}

fn part_of_gguf<'a>(asked: &Asked<'_>, file: &str) -> Result<Weights<'a>, ModelError> {
    Err(ModelError::PartOfGguf { id: asked.id.into(), file: file.into() })
}

/// Path and commit of a model that was fetched before, if all of it was.
fn from_cache(settings: &HubSettings, asked: &Asked<'_>) -> Option<(PathBuf, String)> {
    let cache = Cache::of_model(&settings.cache, asked.id);
    let sha = cache.commit(asked.revision)?;
    let folder = cache.snapshot(&sha);
    let files = files_in(&folder, "");
    let config = || folder.join(SMALL_FILES[0]).exists();
    match weights(asked, &files).ok()? {
        Weights::Gguf(file) => Some((folder.join(file), sha)),
        Weights::Whole(_) => config().then_some((folder, sha)),
        Weights::Sharded(index) => {
            let named = sharded(&folder.join(index)).ok()?;
            let whole = config() && named.iter().all(|file| folder.join(file).exists());
            whole.then_some((folder, sha))
        }
    }
}

/// The paths of all files in a folder, as a repository names them. A dangling link is a file that is not there.
fn files_in(folder: &Path, prefix: &str) -> Vec<String> {
    let mut files = Vec::new();
    for entry in folder.read_dir().into_iter().flatten().flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files.extend(files_in(&entry.path(), &format!("{name}/")));
        } else if entry.path().exists() {
            files.push(name);
        }
    }
    files
}

/// Fetches what is not in the cache; returns path and commit.
async fn from_hub(settings: HubSettings, asked: &Asked<'_>) -> Result<(PathBuf, String), ModelError> {
    let Asked { id, revision, .. } = *asked;
    let failed = |source| ModelError::Hub { id: id.into(), source };
    let hub = Hub::new(settings).map_err(failed)?;
    // All files are those of one commit, however the branch moves and whatever of it is in the cache.
    let commit = hub.model(id, revision).await.map_err(failed)?;
    tracing::info!(model = id, sha = commit.sha, "fetching what is not in the cache");
    let weights = weights(asked, &commit.files)?;
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
        let find = async |path: &Path| super::find_model(path.to_str().unwrap(), None).await;
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
            assert!(matches!(find_model(bad, None).await, Err(ModelError::NotAnId(_))), "{bad}");
        }
    }
}
