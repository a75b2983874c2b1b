//! Settings of the environment, named as all clients of the hub name them.

use std::{env, fs, path::PathBuf, time::Duration};

use secrecy::SecretString;

/// How long the hub may take to answer a question (`HF_HUB_ETAG_TIMEOUT`).
pub(crate) const ANSWER: (&str, Duration) = ("HF_HUB_ETAG_TIMEOUT", Duration::from_secs(10));
/// How long the hub may take to send the next bytes of a file (`HF_HUB_DOWNLOAD_TIMEOUT`).
pub(crate) const BYTES: (&str, Duration) = ("HF_HUB_DOWNLOAD_TIMEOUT", Duration::from_secs(60));

/// How to reach a hub, and where its files are kept.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where the hub is, without a slash at the end.
    pub endpoint: String,
    /// The caller's credential.
    pub token: Option<SecretString>,
    /// The folder of all repositories.
    pub cache: PathBuf,
    /// Whether nothing may be downloaded.
    pub offline: bool,
    /// How long the hub may take to answer a question.
    pub answer: Duration,
    /// How long the hub may take to send the next bytes of a file.
    pub bytes: Duration,
}

impl Settings {
    /// What the environment says, or the defaults.
    pub fn from_env() -> Settings {
        let home = home();
        let cache = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE"));
        let token = variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN"));
        let token_file = variable("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token = token.or_else(|| fs::read_to_string(token_file).ok());
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Settings {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.map(SecretString::from),
            cache: cache.map_or_else(|| home.join("hub"), PathBuf::from),
            offline: variable("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)),
            answer: seconds(ANSWER),
            bytes: seconds(BYTES),
        }
    }
}

/// The folder of what the hub's clients keep.
fn home() -> PathBuf {
    let in_cache = || variable("XDG_CACHE_HOME").map(|cache| PathBuf::from(cache).join("huggingface"));
    let in_home = || PathBuf::from(variable("HOME").unwrap_or_default()).join(".cache/huggingface");
    variable("HF_HOME").map(PathBuf::from).or_else(in_cache).unwrap_or_else(in_home)
}

/// A variable that is set and not empty.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether a flag is set, by the words that `huggingface_hub` knows (`constants.py`).
fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&&*value.to_lowercase())
}

fn seconds((name, default): (&str, Duration)) -> Duration {
    let seconds = variable(name).and_then(|seconds| seconds.parse().ok());
    seconds.filter(|seconds| *seconds > 0).map_or(default, Duration::from_secs)
}
