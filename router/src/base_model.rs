//! The names of the base model.

use std::{
    path::{Component, Path},
    time::{SystemTime, UNIX_EPOCH},
};

use config::Config;
use sha2::{Digest, Sha256};

/// LoRAX's name of the base model where an adapter is named.
pub(crate) const BASE_MODEL: &str = "__base_model__";

/// Names that clients send of themselves where their users name no model: Hugging Face's and others.
const PLACEHOLDERS: [&str; 2] = ["dummy", "tgi"];

/// The names by which requests can call the base model.
#[derive(Debug, Clone)]
pub(crate) struct BaseModel {
    /// The model as the operator named it.
    id: String,
    /// The model by its own name, wherever it lies.
    root: String,
    /// The names that it is listed under; never empty.
    served: Vec<String>,
    /// Time at which its files came to this machine, in seconds since 1970.
    created: u64,
    fingerprint: String,
}

impl BaseModel {
    /// The names that the configuration gives, else the model's own.
    pub(crate) fn new(config: &Config) -> BaseModel {
        let (model, given) = (&config.model, &config.router.served_model_name);
        let root = own_name(&model.id);
        let served = if given.is_empty() { vec![root.clone()] } else { given.clone() };
        let written = model.path.metadata().and_then(|file| file.modified());
        let written = written.unwrap_or_else(|_| SystemTime::now());
        let created = written.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        BaseModel { id: model.id.clone(), root, served, created, fingerprint: fingerprint(config) }
    }

    /// The model by its own name, wherever it lies.
    pub(crate) fn root(&self) -> &str {
        &self.root
    }

    /// The name that answers report where requests named none.
    pub(crate) fn name(&self) -> &str {
        &self.served[0]
    }

    /// The names that it is listed under.
    pub(crate) fn served(&self) -> &[String] {
        &self.served
    }

    /// Time at which its files came to this machine, in seconds since 1970.
    pub(crate) fn created(&self) -> u64 {
        self.created
    }

    /// A name for the model and all that its answers depend on beside a request, for `system_fingerprint`.
    pub(crate) fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Returns whether the model has this name. The name on the command line is always one of them.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        name == self.id || self.served.iter().any(|served| served == name)
    }

    /// The adapter that a request of OpenAI's names, and the field that names it: `adapter_id` unless it is empty, else
    /// `model` unless that is the base model.
    pub(crate) fn adapter_in(
        &self,
        model: Option<&str>,
        adapter_id: Option<String>,
    ) -> (&'static str, Option<String>) {
        match adapter_id.filter(|id| !id.is_empty()) {
            None => {
                let model = model.filter(|model| !model.is_empty() && !self.is_called(model));
                ("model", model.map(|model| self.strip_from(model).unwrap_or(model).to_owned()))
            }
            own => ("adapter_id", own),
        }
    }

    /// The adapter of `BASE|ADAPTER`, as Dynamo proposes for adapters that are loaded when a request names them.
    fn strip_from<'a>(&self, name: &'a str) -> Option<&'a str> {
        let names = self.served.iter().chain([&self.id]);
        names.filter_map(|base| name.strip_prefix(base.as_str())?.strip_prefix('|')).next()
    }
}

/// Returns whether a client sends this name where its user has named no model.
pub(crate) fn is_placeholder(name: &str) -> bool {
    PLACEHOLDERS.contains(&name)
}

/// A hash of the model, of how it is computed, and of this program's version.
fn fingerprint(config: &Config) -> String {
    let (model, shard) = (&config.model, &config.shard);
    let parts = (&model.id, &model.sha, shard.device, shard.dtype, config.ranks(), env!("CARGO_PKG_VERSION"));
    let hash = Sha256::digest(format!("{parts:?}"));
    let digits: String = hash.iter().take(5).map(|byte| format!("{byte:02x}")).collect();
    format!("fp_{digits}")
}

/// The name that a model has wherever it lies: a repository's of its hub, otherwise that of the file, the folder or the
/// last part of the address.
fn own_name(id: &str) -> String {
    let is_address = id.contains("://");
    let path = Path::new(id);
    if !is_address && !path.exists() {
        return id.to_owned();
    }
    // A relative path may end in dots.
    let path =
        if is_address { path.to_owned() } else { path.canonicalize().unwrap_or_else(|_| path.to_owned()) };
    let parts: Vec<_> = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    let parts: Vec<_> = parts.iter().filter_map(|part| part.as_os_str().to_str()).collect();
    // In the cache of the hub's clients.
    let repository = parts.iter().rev().find_map(|part| part.strip_prefix("models--"));
    match (repository, parts.last()) {
        (Some(repository), _) if parts.contains(&"snapshots") => repository.replace("--", "/"),
        (_, Some(last)) => (*last).to_owned(),
        (_, None) => id.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_model_is_called_by_its_own_name_wherever_it_lies() {
        let folder = tempfile::tempdir().unwrap();
        let cached = "hub/models--org--some-model/snapshots/0123abc";
        for made in ["models/my-model", cached] {
            fs::create_dir_all(folder.path().join(made)).unwrap();
        }
        fs::write(folder.path().join("models/tiny.Q4_K_M.gguf"), "").unwrap();
        fs::write(folder.path().join(cached).join("tiny.gguf"), "").unwrap();
        let here = |path: &str| folder.path().join(path).to_str().unwrap().to_owned();
        for (id, name) in [
            ("org/model".to_owned(), "org/model"),
            ("org/model:Q4_K_M".into(), "org/model:Q4_K_M"),
            ("org/model/file.gguf".into(), "org/model/file.gguf"),
            ("gpt2".into(), "gpt2"),
            (here("models/my-model"), "my-model"),
            (here("models/my-model/"), "my-model"),
            (here("models/my-model/../my-model/."), "my-model"),
            (here("models/tiny.Q4_K_M.gguf"), "tiny.Q4_K_M.gguf"),
            (here(cached), "org/some-model"),
            (here(cached) + "/tiny.gguf", "org/some-model"),
            ("s3://bucket/team/llama".into(), "llama"),
            ("gs://bucket".into(), "bucket"),
        ] {
            assert_eq!(own_name(&id), name, "{id}");
        }
    }
}
