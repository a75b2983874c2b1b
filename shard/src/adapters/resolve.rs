//! Resolves a reference to an adapter to its folder, and checks that it may be read.

use std::{
    io,
    path::{Component, Path, PathBuf},
};

use model::adapter;

/// Why a reference was refused.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// The server does not read from this source.
    #[error("adapter source {0:?} is not supported, only \"local\" is")]
    Source(String),
    /// The name cannot be that of a folder.
    #[error("adapter id {id:?} {fault}")]
    Name {
        /// The name.
        id: String,
        /// The fault.
        fault: &'static str,
    },
    /// There is no such folder.
    #[error("adapter {0:?} does not exist")]
    NotFound(String),
    /// The folder is outside of those that may be read.
    #[error("adapter {0:?} is outside of the folders that adapters may be read from")]
    Forbidden(String),
    /// The folder exists, but cannot be read.
    #[error("adapter {id:?}: {source}")]
    Io {
        /// The name.
        id: String,
        /// The cause.
        source: io::Error,
    },
}

/// Longest name that is accepted, in bytes: Linux's limit for a path.
const MAX_NAME: usize = 4096;

/// The folders that adapters may be read from.
#[derive(Debug, Clone, Default)]
pub struct Roots {
    /// The folder below which relative names are looked up.
    dir: Option<PathBuf>,
    roots: Vec<PathBuf>,
}

impl Roots {
    /// Relative names are looked up below `dir`. Absolute names may lie below `dir` or any of `roots`. Errors: one of
    /// these folders does not exist.
    pub fn new(dir: Option<&Path>, roots: &[PathBuf]) -> io::Result<Roots> {
        let dir = dir.map(Path::canonicalize).transpose()?;
        let roots = roots.iter().map(|root| root.canonicalize()).chain(dir.clone().map(Ok));
        Ok(Roots { roots: roots.collect::<io::Result<_>>()?, dir })
    }

    /// The folder of an adapter, with all links followed.
    pub fn resolve(&self, source: &str, id: &str) -> Result<PathBuf, ResolveError> {
        if source != "local" {
            return Err(ResolveError::Source(source.into()));
        }
        let refuse = |fault| Err(ResolveError::Name { id: id.chars().take(100).collect(), fault });
        if id.is_empty() {
            return refuse("is empty");
        }
        if id.len() > MAX_NAME {
            return refuse("is too long");
        }
        if id.chars().any(char::is_control) {
            return refuse("has control characters");
        }
        let name = Path::new(id);
        if name.components().any(|part| part == Component::ParentDir) {
            return refuse("has a parent folder in it");
        }
        let path = match &self.dir {
            _ if name.is_absolute() => name.to_owned(),
            Some(dir) => dir.join(name),
            None => return Err(ResolveError::NotFound(id.into())),
        };
        self.canonical(&path, id)
    }

    /// The folder with an adapter's files, which is a subfolder for Ludwig's adapters, with all links followed.
    pub fn resolve_adapter(&self, source: &str, id: &str) -> Result<PathBuf, ResolveError> {
        self.canonical(&adapter::files_folder(&self.resolve(source, id)?), id)
    }

    /// Follows all links of a path. Errors: the result does not exist, or may not be read.
    fn canonical(&self, path: &Path, id: &str) -> Result<PathBuf, ResolveError> {
        let allowed = |path: &Path| self.roots.iter().any(|root| path.starts_with(root));
        match path.canonicalize() {
            Ok(folder) if allowed(&folder) => Ok(folder),
            // The answer must not tell whether something exists outside of the roots.
            Ok(_) => Err(ResolveError::Forbidden(id.into())),
            Err(_) if !allowed(path) => Err(ResolveError::Forbidden(id.into())),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Err(ResolveError::NotFound(id.into())),
            Err(source) => Err(ResolveError::Io { id: id.into(), source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_folders_under_the_roots_are_found() {
        let all = tempfile::tempdir().unwrap();
        let at = |name: &str| all.path().join(name);
        for folder in ["adapters/one", "shared/two", "secret/three"] {
            std::fs::create_dir_all(at(folder)).unwrap();
        }
        symlink(at("secret/three"), at("adapters/escape")).unwrap();
        symlink(at("shared/two"), at("adapters/within")).unwrap();
        let roots = Roots::new(Some(&at("adapters")), &[at("shared")]).unwrap();
        let find = |id: &str| roots.resolve("local", id);
        assert!(find("one").unwrap().ends_with("adapters/one"));
        assert!(find("within").unwrap().ends_with("shared/two"));
        assert!(find(at("shared/two").to_str().unwrap()).is_ok());
        assert!(matches!(find("nothing"), Err(ResolveError::NotFound(_))));
        assert!(matches!(find("escape"), Err(ResolveError::Forbidden(_))));
        for outside in [at("secret/three"), at("secret/nothing"), "/etc".into()] {
            assert!(matches!(find(outside.to_str().unwrap()), Err(ResolveError::Forbidden(_))));
        }
        for bad in ["", "../secret/three", "one/../../secret/three", "o\nne", "o\0ne", &"x".repeat(5000)] {
            assert!(matches!(find(bad), Err(ResolveError::Name { .. })), "{bad:?}");
        }
        assert!(matches!(roots.resolve("hub", "one"), Err(ResolveError::Source(_))));
        assert!(Roots::new(Some(&at("missing")), &[]).is_err());
    }
}
