//! Settings of the environment, named as all clients of the hub name them.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::SecretString;

/// How long the hub may take to answer a question (`HF_HUB_ETAG_TIMEOUT`).
pub(crate) const ANSWER: (&str, Duration) = ("HF_HUB_ETAG_TIMEOUT", Duration::from_secs(10));
/// How long the hub may take to send the next bytes of a file (`HF_HUB_DOWNLOAD_TIMEOUT`).
pub(crate) const BYTES: (&str, Duration) = ("HF_HUB_DOWNLOAD_TIMEOUT", Duration::from_secs(60));

/// How to reach a hub, and where its files are kept.
#[derive(Debug, Clone)]
pub struct HubSettings {
    /// Where the hub is, without a slash at the end.
    pub endpoint: String,
    /// The caller's credential.
    pub token: Option<SecretString>,
    /// The folder of all repositories, if there is one.
    pub cache: Option<PathBuf>,
    /// Whether nothing may be downloaded.
    pub offline: bool,
    /// How long the hub may take to answer a question.
    pub answer: Duration,
    /// How long the hub may take to send the next bytes of a file.
    pub bytes: Duration,
}

/// There is no folder for what the hub's clients keep.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("there is no home folder to keep the hub's files in: set HF_HOME, or HOME")]
pub struct NoHome;

impl HubSettings {
    /// What the environment says, or the defaults.
    pub fn from_env() -> HubSettings {
        let home = home(variable, env::home_dir());
        let cache = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE"));
        let tokens = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"];
        let token = tokens.into_iter().find_map(variable);
        let in_home = |name| home.as_ref().map(|home| home.join(name));
        let token_file = variable("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| in_home("token"));
        let token = token.or_else(|| fs::read_to_string(token_file?).ok());
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        HubSettings {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.map(SecretString::from),
            cache: cache.map(PathBuf::from).or_else(|| in_home("hub")),
            offline: flag("HF_HUB_OFFLINE") || flag("TRANSFORMERS_OFFLINE"),
            answer: seconds(ANSWER),
            bytes: seconds(BYTES),
        }
    }

    pub(super) fn cache(&self) -> Result<&Path, NoHome> {
        self.cache.as_deref().ok_or(NoHome)
    }
}

/// The folder of what the hub's clients keep. Without `HOME` the user's home is the one that the system knows, as for
/// `huggingface_hub` (Python's `os.path.expanduser`). A user without any would have the files in whatever folder the
/// process was started in.
fn home(variable: impl Fn(&str) -> Option<String>, of_user: Option<PathBuf>) -> Option<PathBuf> {
    let folder = |name: &str| variable(name).map(PathBuf::from);
    let in_cache = || folder("XDG_CACHE_HOME").map(|cache| cache.join("huggingface"));
    let in_home = || {
        let home = of_user.filter(|home| home.is_absolute())?;
        Some(home.join(".cache/huggingface"))
    };
    folder("HF_HOME").or_else(in_cache).or_else(in_home)
}

/// A variable that is set and not empty.
pub(crate) fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether a variable is set to one of the words for yes.
pub(crate) fn flag(name: &str) -> bool {
    variable(name).is_some_and(|value| is_true(&value))
}

/// The words that `huggingface_hub` takes for yes (`constants.py`).
fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&&*value.to_lowercase())
}

fn seconds((name, default): (&str, Duration)) -> Duration {
    let seconds = variable(name).and_then(|seconds| seconds.parse().ok());
    seconds.filter(|seconds| *seconds > 0).map_or(default, Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_never_kept_where_the_process_happens_to_start() {
        for (hf_home, cache, user, expected) in [
            ("/hf", "/cache", Some("/home/me"), Some("/hf")),
            ("/hf", "", None, Some("/hf")),
            ("here", "", Some("/home/me"), Some("here")),
            ("", "/cache", Some("/home/me"), Some("/cache/huggingface")),
            ("", "/cache", None, Some("/cache/huggingface")),
            ("", "", Some("/home/me"), Some("/home/me/.cache/huggingface")),
            ("", "", Some("/"), Some("/.cache/huggingface")),
            ("", "", Some("me"), None),
            ("", "", Some(""), None),
            ("", "", Some("~"), None),
            ("", "", None, None),
        ] {
            let variable = |name: &str| {
                let value = if name == "HF_HOME" { hf_home } else { cache };
                (!value.is_empty()).then(|| value.to_owned())
            };
            let found = home(variable, user.map(PathBuf::from));
            assert_eq!(found, expected.map(PathBuf::from), "{hf_home:?} {cache:?} {user:?}");
        }
    }
}
