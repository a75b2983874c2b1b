//! Where the model's files are: on this machine, or on a hub from which they are fetched into its cache.

use std::{
    env,
    path::{Path, PathBuf},
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{ApiBuilder, ApiError, ApiRepo},
};
use serde::Deserialize;

/// Files beside the weights. The first must be there.
const SMALL_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A model that is on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ModelFiles {
    /// As the user named it, without the revision.
    pub(crate) id: String,
    /// A folder, or a GGUF file.
    pub(crate) path: PathBuf,
    /// The revision that was asked for.
    pub(crate) revision: Option<String>,
    /// The commit that it led to.
    pub(crate) sha: Option<String>,
}

/// Why a model's files cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    /// A path that is there, but is no model.
    #[error("{} is neither a folder with a config.json nor a GGUF file", .0.display())]
    NotAModel(PathBuf),
    /// Neither a path nor a hub id.
    #[error("{0:?} is neither a path that exists nor a hub id")]
    NotAnId(String),
    /// The hub refused, or cannot be reached.
    #[error("{id}: {source}")]
    Hub {
        /// The model.
        id: String,
        /// The cause.
        source: Box<ApiError>,
    },
    /// Not downloaded before, and downloads are off.
    #[error("{id} at {revision} is not in the cache, and HF_HUB_OFFLINE is set")]
    Offline {
        /// The model.
        id: String,
        /// The revision that was asked for.
        revision: String,
    },
    /// The hub has no weights that we can load.
    #[error("{id} has neither safetensors nor a single GGUF file; it has: {files}")]
    NoWeights {
        /// The model.
        id: String,
        /// What it has.
        files: String,
    },
    /// The index of the weights is not what it should be.
    #[error("{}: {message}", path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

/// Finds a model, and fetches it if it is not here.
pub(crate) fn find(model_id: &str, revision: Option<&str>) -> Result<ModelFiles, SourceError> {
    let path = Path::new(model_id);
    if path.exists() {
        let is_gguf = path.is_file() && path.extension().is_some_and(|extension| extension == "gguf");
        let absolute = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        return if is_gguf || path.join("config.json").is_file() {
            Ok(ModelFiles { id: model_id.into(), path: absolute, revision: None, sha: None })
        } else {
            Err(SourceError::NotAModel(absolute))
        };
    }
    let (id, tag) = model_id.split_once('@').map_or((model_id, None), |(id, tag)| (id, Some(tag)));
    let name = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !part.contains("..")
    };
    if id.split('/').count() > 2 || !id.split('/').all(name) {
        return Err(SourceError::NotAnId(model_id.into()));
    }
    let revision = revision.or(tag);
    let asked = revision.unwrap_or("main");
    let offline = env::var("HF_HUB_OFFLINE").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"));
    let (path, sha) = if offline { from_cache(id, asked)? } else { from_hub(id, asked)? };
    Ok(ModelFiles { id: id.into(), path, revision: revision.map(str::to_owned), sha: Some(sha) })
}

fn at(id: &str, revision: &str) -> Repo {
    Repo::with_revision(id.into(), RepoType::Model, revision.into())
}

/// How a repository keeps its weights.
enum Weights<'a> {
    Whole,
    Sharded,
    Gguf(&'a str),
}

fn weights<'a>(id: &str, files: &'a [String]) -> Result<Weights<'a>, SourceError> {
    let has = |name: &str| files.iter().any(|file| file == name);
    let mut ggufs = files.iter().filter(|file| file.ends_with(".gguf"));
    match (has(WEIGHTS), has(INDEX), ggufs.next(), ggufs.next()) {
        (true, ..) => Ok(Weights::Whole),
        (_, true, ..) => Ok(Weights::Sharded),
        (_, _, Some(gguf), None) => Ok(Weights::Gguf(gguf)),
        _ => Err(SourceError::NoWeights { id: id.into(), files: files.join(", ") }),
    }
}

/// Path and commit of a model that was fetched before.
fn from_cache(id: &str, revision: &str) -> Result<(PathBuf, String), SourceError> {
    let missing = || SourceError::Offline { id: id.into(), revision: revision.into() };
    let folder = Cache::from_env().repo(at(id, revision)).get(".").ok_or_else(missing)?;
    let folder: PathBuf = folder.components().collect();
    let sha = folder.file_name().ok_or_else(missing)?.to_string_lossy().into_owned();
    let names = folder.read_dir().map_err(|_| missing())?.flatten();
    let files: Vec<String> = names.map(|file| file.file_name().to_string_lossy().into_owned()).collect();
    match weights(id, &files)? {
        Weights::Gguf(file) => Ok((folder.join(file), sha)),
        Weights::Whole | Weights::Sharded => Ok((folder, sha)),
    }
}

/// Fetches what is not in the cache; returns path and commit.
fn from_hub(id: &str, revision: &str) -> Result<(PathBuf, String), SourceError> {
    let hub = |source| SourceError::Hub { id: id.into(), source: Box::new(source) };
    let token = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].iter().find_map(|name| env::var(name).ok());
    let mut builder = ApiBuilder::from_env().with_progress(true).with_retries(3);
    if token.is_some() {
        builder = builder.with_token(token);
    }
    let api = builder.build().map_err(hub)?;
    let info = api.repo(at(id, revision)).info().map_err(hub)?;
    let files: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    tracing::info!(model = id, sha = info.sha, "fetching what is not in the cache");
    // All files of one commit, however the branch moves and whatever of it is in the cache.
    let repo = api.repo(at(id, &info.sha));
    let weights = weights(id, &files)?;
    let path = if let Weights::Gguf(file) = weights {
        repo.get(file).map_err(hub)?
    } else {
        for file in SMALL_FILES.iter().filter(|name| files.iter().any(|file| file == *name)) {
            repo.get(file).map_err(hub)?;
        }
        match weights {
            Weights::Sharded => sharded_weights(id, &repo, &files)?,
            _ => repo.get(WEIGHTS).map_err(hub).map(drop)?,
        }
        let config = repo.get(SMALL_FILES[0]).map_err(hub)?;
        config.parent().map(Path::to_owned).unwrap_or_default()
    };
    // So that the name leads to this commit when the hub cannot be asked.
    let cached = Cache::from_env().repo(at(id, revision)).create_ref(&info.sha);
    cached.map_err(|error| hub(error.into()))?;
    Ok((path, info.sha))
}

/// Fetches every file that the index names.
fn sharded_weights(id: &str, repo: &ApiRepo, files: &[String]) -> Result<(), SourceError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let hub = |source| SourceError::Hub { id: id.into(), source: Box::new(source) };
    let path = repo.get(INDEX).map_err(hub)?;
    let broken = |message| SourceError::Index { path: path.clone(), message };
    let text = std::fs::read(&path).map_err(|error| broken(error.to_string()))?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| broken(error.to_string()))?;
    let mut named: Vec<&String> = index.weight_map.values().collect();
    named.sort();
    named.dedup();
    for file in named {
        // A path out of the cache's folder is none of the repository's files.
        if !files.contains(file) {
            return Err(broken(format!("{file:?} is not in the repository")));
        }
        repo.get(file).map_err(hub)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_as_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let find = |path: &Path| super::find(path.to_str().unwrap(), None);
        assert!(matches!(find(folder.path()), Err(SourceError::NotAModel(_))));
        let gguf = folder.path().join("m.gguf");
        std::fs::write(&gguf, "").unwrap();
        assert_eq!(find(&gguf).unwrap().path, gguf.canonicalize().unwrap());
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        assert_eq!(find(folder.path()).unwrap().path, folder.path().canonicalize().unwrap());
    }

    #[test]
    fn what_cannot_be_an_id_is_refused_without_asking_a_hub() {
        for bad in ["/no/such/path", "a/b/c", "", "a b", "../x", "org/..", "@main"] {
            assert!(matches!(find(bad, None), Err(SourceError::NotAnId(_))), "{bad}");
        }
    }
}
