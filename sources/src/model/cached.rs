//! Models that were fetched before.

use std::path::{Path, PathBuf};

use super::{
    Asked, ModelError,
    weights::{CONFIG, Weights, is_small, sharded},
};
use crate::{
    hub::{Cache, HubSettings},
    model_name::Gguf,
};

/// Path and commit of a model in the cache, if all of it is there. Which file a name means is decided by the list of the
/// repository's files, as the hub would: the cache may have only one of several.
pub(super) fn find(
    settings: &HubSettings,
    asked: &Asked<'_>,
) -> Result<Option<(PathBuf, String)>, ModelError> {
    let Some(root) = settings.cache.as_deref() else { return Ok(None) };
    let cache = Cache::of_model(root, asked.id);
    let Some(sha) = cache.commit(asked.revision) else { return Ok(None) };
    let folder = cache.snapshot(&sha);
    let here = files_in(&folder, "");
    let listed = cache.listed(&sha);
    let is_unlisted = listed.is_none();
    let files = listed.unwrap_or_else(|| here.clone());
    let weights = match Weights::choose(asked, &files) {
        Ok(weights) => weights,
        // What the cache lacks may be what was asked for.
        Err(_) if is_unlisted => return Ok(None),
        Err(error) => return Err(error),
    };
    let has = |file: &str| here.iter().any(|known| known == file);
    let path = match weights {
        Weights::Gguf(parts) => {
            if is_unlisted && !is_exact(asked, parts[0]) {
                return Err(ModelError::Unlisted { id: asked.id.into() });
            }
            parts.iter().all(|part| has(part)).then(|| folder.join(parts[0]))
        }
        Weights::Whole(file) => (has(CONFIG) && has(file)).then_some(folder),
        Weights::Sharded(index) => {
            let named = sharded(&folder.join(index)).unwrap_or_default();
            let is_whole = has(CONFIG) && !named.is_empty() && named.iter().all(|file| has(file));
            is_whole.then_some(folder)
        }
    };
    if path.as_ref().is_some_and(|path| path.is_dir()) {
        for file in files.iter().filter(|file| is_small(file) && !has(file)) {
            tracing::warn!(model = asked.id, "{file} is not in the cache, and is left out");
        }
    }
    Ok(path.map(|path| (path, sha)))
}

/// Whether a file was named by its whole name, which no other file has.
fn is_exact(asked: &Asked<'_>, file: &str) -> bool {
    match asked.gguf {
        Some(Gguf::Path(_)) => true,
        Some(Gguf::Tag(tag)) => tag == file,
        None => false,
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
