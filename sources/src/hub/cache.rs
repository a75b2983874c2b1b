//! The cache that the hub's clients share: contents once, under the hash that the hub gives them, and a folder of links
//! to them for every commit.
//!
//! ```text
//! models--org--name/
//!   blobs/<etag>              the content of a file
//!   blobs/<etag>.incomplete   as much of it as has come
//!   snapshots/<commit>/<file> a link to the content
//!   refs/<revision>           the commit that the revision led to last
//!   trees/<commit>.json       the names, sizes and hashes of all files of a commit
//! .locks/models--org--name/<etag>.lock
//! ```
//!
//! The layout is that of `huggingface_hub` (<https://huggingface.co/docs/huggingface_hub/guides/manage-cache>), locks
//! included.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Component, Path, PathBuf},
};

use super::{HubError, listing::Listing};

/// The part of the cache that belongs to one repository.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
    locks: PathBuf,
}

impl Cache {
    /// Of the model `id` in the cache at `root`.
    pub fn of_model(root: &Path, id: &str) -> Cache {
        let name = format!("models--{}", id.replace('/', "--"));
        Cache { folder: root.join(&name), locks: root.join(".locks").join(name) }
    }

    /// The commit that a revision led to when it was last asked for.
    pub fn commit(&self, revision: &str) -> Option<String> {
        let named =
            is_plain(revision).then(|| fs::read_to_string(self.folder.join("refs").join(revision)).ok());
        let commit = named.flatten().map_or_else(|| revision.to_owned(), |commit| commit.trim().to_owned());
        (is_plain(&commit) && self.snapshot(&commit).is_dir()).then_some(commit)
    }

    /// The folder of a commit's files.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// Remembers the commit that a revision leads to.
    pub(crate) fn remember(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if !is_plain(revision) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        // A cache that needs no change may be one that cannot be changed.
        if fs::read_to_string(&path).is_ok_and(|known| known.trim() == commit) {
            return Ok(());
        }
        in_place(&path, |path| fs::write(path, commit))
    }

    /// Keeps the list of a commit's files, as `huggingface_hub` does.
    pub(super) fn keep_listing(&self, listing: &Listing) -> Result<(), HubError> {
        let path = self.listing_path(&listing.sha);
        let Some(text) = listing.to_kept().filter(|_| !path.exists()) else { return Ok(()) };
        // Others may read it meanwhile.
        let new = path.with_extension(format!("{}.tmp", std::process::id()));
        in_place(&new, |new| fs::write(new, text))?;
        in_place(&path, |path| fs::rename(&new, path))
    }

    /// The names of all files of a commit, if its list was kept.
    pub(crate) fn listed(&self, commit: &str) -> Option<Vec<String>> {
        Listing::names_in_kept(&fs::read(self.listing_path(commit)).ok()?)
    }

    fn listing_path(&self, commit: &str) -> PathBuf {
        self.folder.join("trees").join(format!("{commit}.json"))
    }

    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    pub(crate) fn lock(&self, etag: &str) -> PathBuf {
        self.locks.join(format!("{etag}.lock"))
    }

    /// Lets a file of a commit lead to its content; returns where it is.
    pub(crate) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<PathBuf, HubError> {
        let path = self.snapshot(commit).join(file);
        // From the folder of the file up to that of the repository.
        let depth = Path::new(file).components().count() + 1;
        let blob = Path::new(&"../".repeat(depth)).join("blobs").join(etag);
        in_place(&path, |path| {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            symlink(&blob, path)
        })?;
        Ok(path)
    }
}

/// Does something with a path whose folder is made first.
pub(crate) fn in_place<T>(path: &Path, work: impl FnOnce(&Path) -> io::Result<T>) -> Result<T, HubError> {
    let made = path.parent().map_or(Ok(()), fs::create_dir_all);
    made.and_then(|()| work(path)).map_err(|source| HubError::Cache { path: path.into(), source })
}

/// Returns whether a name that somebody else chose stays within the folder that it is put in.
pub(crate) fn is_plain(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_leave_their_folder_are_not_plain() {
        for good in ["main", "refs/pr/1", "a.b-c_d", "onnx/model.onnx", "..."] {
            assert!(is_plain(good), "{good}");
        }
        for bad in ["", "/", "/etc/passwd", "..", "../x", "a/../b", "./a", "a/.."] {
            assert!(!is_plain(bad), "{bad}");
        }
    }

    #[test]
    fn links_lead_to_contents() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::of_model(root.path(), "org/name");
        in_place(&cache.blob("e1"), |path| fs::write(path, "one")).unwrap();
        in_place(&cache.blob("e2"), |path| fs::write(path, "two")).unwrap();
        for file in ["config.json", "deep/er/file"] {
            for (etag, text) in [("e1", "one"), ("e2", "two"), ("e2", "two")] {
                let path = cache.link("c0", file, etag).unwrap();
                assert_eq!(fs::read_to_string(path).unwrap(), text);
            }
        }
        assert_eq!(cache.commit("main"), None);
        cache.remember("main", "c0").unwrap();
        cache.remember("refs/pr/1", "c0").unwrap();
        cache.remember("../../../outside", "c0").unwrap();
        for revision in ["main", "refs/pr/1", "c0"] {
            assert_eq!(cache.commit(revision).as_deref(), Some("c0"), "{revision}");
        }
        for revision in ["c1", "", "..", "../../../outside"] {
            assert_eq!(cache.commit(revision), None, "{revision}");
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "nothing is written elsewhere");
    }
}
