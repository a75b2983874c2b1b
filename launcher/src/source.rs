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
    #[error("{id}: {file} is not in the cache, and HF_HUB_OFFLINE is set")]
    Offline {
        /// The model.
        id: String,
        /// What is missing.
        file: &'static str,
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
    let repo = Repo::with_revision(id.into(), RepoType::Model, revision.unwrap_or("main").into());
    let offline = env::var("HF_HUB_OFFLINE").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"));
    let (path, sha) = if offline { (from_cache(id, repo)?, None) } else { from_hub(id, repo)? };
    Ok(ModelFiles { id: id.into(), path, revision: revision.map(str::to_owned), sha })
}

fn from_cache(id: &str, repo: Repo) -> Result<PathBuf, SourceError> {
    let file = SMALL_FILES[0];
    let config = Cache::from_env().repo(repo).get(file);
    let folder = config.as_deref().and_then(Path::parent).map(Path::to_owned);
    folder.ok_or_else(|| SourceError::Offline { id: id.into(), file })
}

fn from_hub(id: &str, repo: Repo) -> Result<(PathBuf, Option<String>), SourceError> {
    let hub = |source| SourceError::Hub { id: id.into(), source: Box::new(source) };
    let token = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].iter().find_map(|name| env::var(name).ok());
    let mut builder = ApiBuilder::from_env().with_progress(true).with_retries(3);
    if token.is_some() {
        builder = builder.with_token(token);
    }
    let api = builder.build().map_err(hub)?.repo(repo);
    let info = api.info().map_err(hub)?;
    let files: Vec<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
    tracing::info!(model = id, sha = info.sha, "fetching what is not in the cache");
    let ggufs: Vec<&&str> = files.iter().filter(|file| file.ends_with(".gguf")).collect();
    let has = |name: &str| files.contains(&name);
    let path = if has(WEIGHTS) || has(INDEX) {
        for file in SMALL_FILES.iter().filter(|file| has(file)) {
            api.get(file).map_err(hub)?;
        }
        let config = api.get(SMALL_FILES[0]).map_err(hub)?;
        if has(WEIGHTS) {
            api.get(WEIGHTS).map_err(hub)?;
        } else {
            sharded_weights(id, &api)?;
        }
        config.parent().map(Path::to_owned)
    } else if let [gguf] = ggufs[..] {
        Some(api.get(gguf).map_err(hub)?)
    } else {
        None
    };
    let missing = || SourceError::NoWeights { id: id.into(), files: files.join(", ") };
    Ok((path.ok_or_else(missing)?, Some(info.sha.clone())))
}

/// Fetches every file that the index names.
fn sharded_weights(id: &str, api: &ApiRepo) -> Result<(), SourceError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let hub = |source| SourceError::Hub { id: id.into(), source: Box::new(source) };
    let path = api.get(INDEX).map_err(hub)?;
    let broken = |message| SourceError::Index { path: path.clone(), message };
    let text = std::fs::read(&path).map_err(|error| broken(error.to_string()))?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| broken(error.to_string()))?;
    let mut files: Vec<&String> = index.weight_map.values().collect();
    files.sort();
    files.dedup();
    for file in files {
        api.get(file).map_err(hub)?;
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
