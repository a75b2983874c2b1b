//! The folders that may be read, and paths into them.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use super::unreadable;
use crate::{Denial, Reference, SourceError};

/// The folders that adapters may be read from.
#[derive(Debug)]
pub(super) struct Roots {
    /// The folder below which relative names are looked up.
    dir: Option<PathBuf>,
    roots: Vec<PathBuf>,
}

impl Roots {
    /// Errors: one of the folders does not exist.
    pub(super) fn new(dir: Option<&Path>, roots: &[PathBuf]) -> Result<Roots, (PathBuf, io::Error)> {
        let canonical = |folder: &Path| folder.canonicalize().map_err(|error| (folder.to_owned(), error));
        let dir = dir.map(canonical).transpose()?;
        let roots = roots.iter().map(|root| canonical(root)).chain(dir.clone().map(Ok));
        Ok(Roots { roots: roots.collect::<Result<_, _>>()?, dir })
    }

    /// The root below which a name would be, by its spelling alone.
    pub(super) fn root_of(&self, id: &str) -> &Path {
        let name = Path::new(id);
        let roots = self.roots.iter().filter(|root| name.starts_with(root));
        let named = roots.max_by_key(|root| root.as_os_str().len());
        named.or(self.dir.as_ref()).map_or(Path::new("/"), PathBuf::as_path)
    }

    /// The folder that a reference names, with all links followed.
    pub(super) fn folder(&self, adapter: &Reference) -> Result<PathBuf, SourceError> {
        let name = Path::new(&adapter.id);
        match &self.dir {
            _ if name.is_absolute() => self.canonical(adapter, name),
            Some(dir) => self.canonical(adapter, &dir.join(name)),
            None => Err(SourceError::NotFound { adapter: adapter.clone(), hint: "" }),
        }
    }

    /// Follows all links of a path. Errors: the result does not exist, or may not be read. The answer does not tell
    /// whether something exists outside of the roots.
    pub(super) fn canonical(&self, adapter: &Reference, path: &Path) -> Result<PathBuf, SourceError> {
        let denied = || SourceError::Denied { adapter: adapter.clone(), reason: Denial::Folder };
        match path.canonicalize() {
            Ok(found) if self.allows(&found) => Ok(found),
            Ok(_) => Err(denied()),
            Err(_) if self.leaves(path) => Err(denied()),
            Err(error) => Err(unreadable(adapter, &error)),
        }
    }

    fn allows(&self, path: &Path) -> bool {
        self.roots.iter().any(|root| path.starts_with(root))
    }

    /// Whether a path that leads nowhere does so outside of the roots, or through a link, whose end may be there.
    fn leaves(&self, path: &Path) -> bool {
        let Some(root) = self.roots.iter().find(|root| path.starts_with(root)) else { return true };
        let mut at = root.clone();
        for part in path.strip_prefix(root).unwrap_or(path).components() {
            let Component::Normal(part) = part else { return true };
            at.push(part);
            match fs::symlink_metadata(&at) {
                Ok(data) if data.is_symlink() => match at.canonicalize() {
                    Ok(end) if self.allows(&end) => at = end,
                    _ => return true,
                },
                Ok(_) => {}
                Err(_) => return false,
            }
        }
        false
    }
}
