//! Where the model's files are: on this machine, or on a hub from which they are fetched into its cache.

mod commit;

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use config::ModelConfig;
use hf_hub::{
    Cache, Repo, RepoType,
    api::{
        RepoInfo,
        sync::{ApiBuilder, ApiError},
    },
};
use serde::Deserialize;

use commit::Commit;

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

/// What the hub gets to answer the first question, and to send the next bytes of a file, unless these variables say
/// otherwise in seconds.
const ANSWER: (&str, Duration) = ("HF_HUB_ETAG_TIMEOUT", Duration::from_secs(10));
const BYTES: (&str, Duration) = ("HF_HUB_DOWNLOAD_TIMEOUT", Duration::from_secs(60));

/// Why a model's files cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    /// A path that is there, but is no model.
    #[error("{} is neither a folder with a config.json nor a GGUF file", .0.display())]
    NotAModel(PathBuf),
    /// Neither a path nor a hub id.
    #[error("{0:?} is neither a path that exists nor a hub id")]
    NotAnId(String),
    /// The hub refused, or what it sent cannot be kept.
    #[error("{id}: {source}")]
    Hub {
        /// The model.
        id: String,
        /// The cause.
        source: Box<ApiError>,
    },
    /// The hub does not answer, and the model was not downloaded before.
    #[error("{id} at {revision} is not in the cache, and the hub cannot be reached: {source}")]
    Unreachable {
        /// The model.
        id: String,
        /// The revision that was asked for.
        revision: String,
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

impl SourceError {
    /// Whether the configuration is at fault.
    pub(crate) fn is_usage(&self) -> bool {
        match self {
            SourceError::Hub { source, .. } => matches!(**source, ApiError::RequestError(_)),
            SourceError::Unreachable { .. } => false,
            _ => true,
        }
    }
}

/// Finds a model, and fetches it if it is not here.
pub(crate) fn find(model_id: &str, revision: Option<&str>) -> Result<ModelConfig, SourceError> {
    let path = Path::new(model_id);
    if path.exists() {
        let is_gguf = path.is_file() && path.extension().is_some_and(|extension| extension == "gguf");
        let absolute = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        return if is_gguf || path.join("config.json").is_file() {
            Ok(ModelConfig { id: model_id.into(), path: absolute, revision: None, sha: None })
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
    if model_id.starts_with(['.', '~']) || id.split('/').count() > 2 || !id.split('/').all(name) {
        return Err(SourceError::NotAnId(model_id.into()));
    }
    let revision = revision.or(tag);
    let asked = revision.unwrap_or("main");
    let offline = env::var("HF_HUB_OFFLINE").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"));
    let (path, sha) = if offline {
        let missing = || SourceError::Offline { id: id.into(), revision: asked.into() };
        from_cache(id, asked).ok_or_else(missing)?
    } else {
        online(id, asked)?
    };
    Ok(ModelConfig { id: id.into(), path, revision: revision.map(str::to_owned), sha: Some(sha) })
}

/// From the hub, or from the cache while the hub cannot be reached.
fn online(id: &str, revision: &str) -> Result<(PathBuf, String), SourceError> {
    match from_hub(id, revision) {
        Err(SourceError::Hub { id, source }) if is_unreachable(&source) => {
            let Some((path, sha)) = from_cache(&id, revision) else {
                return Err(SourceError::Unreachable { id, revision: revision.into(), source });
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

/// Whether a later attempt may end otherwise: no connection, no answer, or one that speaks of the hub's own trouble.
fn is_unreachable(error: &ApiError) -> bool {
    use io::ErrorKind as Io;
    use ureq::ErrorKind as Http;
    match error {
        ApiError::RequestError(error) => match &**error {
            ureq::Error::Status(status, _) => *status == 429 || *status >= 500,
            ureq::Error::Transport(error) => {
                matches!(error.kind(), Http::Dns | Http::ConnectionFailed | Http::ProxyConnect | Http::Io)
            }
        },
        ApiError::IoError(error) => matches!(
            error.kind(),
            Io::TimedOut | Io::UnexpectedEof | Io::ConnectionReset | Io::ConnectionAborted
        ),
        ApiError::TooManyRetries(error) => is_unreachable(error),
        _ => false,
    }
}

fn at(id: &str, revision: &str) -> Repo {
    Repo::with_revision(id.into(), RepoType::Model, revision.into())
}

/// What the environment says, or the default.
fn patience((variable, default): (&str, Duration)) -> Duration {
    let seconds = env::var(variable).ok().and_then(|seconds| seconds.parse().ok());
    seconds.filter(|seconds| *seconds > 0).map_or(default, Duration::from_secs)
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

/// Path and commit of a model that was fetched before, if all of it was.
fn from_cache(id: &str, revision: &str) -> Option<(PathBuf, String)> {
    let folder: PathBuf = Cache::from_env().repo(at(id, revision)).get(".")?.components().collect();
    let sha = folder.file_name()?.to_string_lossy().into_owned();
    // What is named but not there is a link whose end is missing.
    let names = folder.read_dir().ok()?.flatten().filter(|file| file.path().exists());
    let files: Vec<String> = names.map(|file| file.file_name().to_string_lossy().into_owned()).collect();
    let config = || folder.join(SMALL_FILES[0]).exists();
    match weights(id, &files).ok()? {
        Weights::Gguf(file) => Some((folder.join(file), sha)),
        Weights::Whole => config().then_some((folder, sha)),
        Weights::Sharded => {
            let named = sharded(&folder.join(INDEX)).ok()?;
            let whole = config() && named.iter().all(|file| folder.join(file).exists());
            whole.then_some((folder, sha))
        }
    }
}

/// Fetches what is not in the cache; returns path and commit.
fn from_hub(id: &str, revision: &str) -> Result<(PathBuf, String), SourceError> {
    let hub = |source| SourceError::Hub { id: id.into(), source: Box::new(source) };
    let token = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].iter().find_map(|name| env::var(name).ok());
    let mut builder = ApiBuilder::from_env().with_retries(3);
    if token.is_some() {
        builder = builder.with_token(token);
    }
    let api = builder.build().map_err(hub)?;
    let asked = api.repo(at(id, revision)).info_request().timeout(patience(ANSWER)).call();
    let answer = asked.map_err(|error| hub(Box::new(error).into()))?;
    let info: RepoInfo = answer.into_json().map_err(|error| hub(error.into()))?;
    let files: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    tracing::info!(model = id, sha = info.sha, "fetching what is not in the cache");
    // All files of one commit, however the branch moves and whatever of it is in the cache.
    let repo = Commit { api, repo: at(id, &info.sha), patience: patience(BYTES) };
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
fn sharded_weights(id: &str, repo: &Commit, files: &[String]) -> Result<(), SourceError> {
    let hub = |source| SourceError::Hub { id: id.into(), source: Box::new(source) };
    let path = repo.get(INDEX).map_err(hub)?;
    let broken = |message| SourceError::Index { path: path.clone(), message };
    for file in sharded(&path).map_err(broken)? {
        // A path out of the cache's folder is none of the repository's files.
        if !files.contains(&file) {
            return Err(broken(format!("{file:?} is not in the repository")));
        }
        repo.get(&file).map_err(hub)?;
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
