//! The files of a repository at a commit, as a hub tells them and as its clients keep them beside the cache.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::is_plain;

/// The format of `huggingface_hub`'s files of lists (`_tree_cache.py`).
const FORMAT: u32 = 1;

/// A repository at a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listing {
    /// The hash of the commit.
    pub(crate) sha: String,
    /// Whether its files may be kept from those who may see the list.
    pub(crate) is_gated: bool,
    pub(crate) files: Vec<Listed>,
}

/// A file in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Its path.
    pub(crate) name: String,
    pub(crate) size: Option<u64>,
    /// The hash that git gives it, or the file that stands for it there.
    pub(crate) blob: Option<String>,
    /// The SHA-256 of the content of a large file, and its size.
    pub(crate) lfs: Option<(String, u64)>,
}

impl Listed {
    /// The hash of a large file, which the hub gives as its entity tag.
    pub(super) fn sha256(&self) -> Option<String> {
        self.lfs.as_ref().map(|(sha256, _)| sha256.clone())
    }
}

/// What the hub tells of a repository.
#[derive(Deserialize)]
struct Info {
    sha: String,
    /// `false`, or how access is given. The list of a gated repository is public.
    #[serde(default)]
    gated: Option<Value>,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

/// What is kept.
#[derive(Serialize, Deserialize)]
struct Kept {
    format_version: u32,
    files: BTreeMap<String, KeptFile>,
}

#[derive(Serialize, Deserialize)]
struct KeptFile {
    size: u64,
    blob_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_sha256: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_size: Option<u64>,
}

impl Listing {
    /// Reads the hub's answer.
    pub(super) fn parse(body: &[u8]) -> Result<Listing, String> {
        let info: Info = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        let names = info.siblings.iter().map(|file| &file.rfilename).chain([&info.sha]);
        if let Some(name) = names.into_iter().find(|name| !is_plain(name)) {
            return Err(format!("{name:?} is not a name"));
        }
        let listed = |Sibling { rfilename, size, blob_id, lfs }| {
            let lfs = lfs.and_then(|lfs| Some((lfs.sha256?, lfs.size.or(size)?)));
            Listed {
                name: rfilename,
                size: lfs.as_ref().map(|lfs: &(String, u64)| lfs.1).or(size),
                blob: blob_id,
                lfs,
            }
        };
        let is_gated = info.gated != Some(Value::Bool(false));
        Ok(Listing { sha: info.sha, is_gated, files: info.siblings.into_iter().map(listed).collect() })
    }

    /// The text that is kept; `None` if the hub has not told what is needed for it.
    pub(super) fn to_kept(&self) -> Option<String> {
        let kept = |file: &Listed| {
            let (lfs_sha256, lfs_size) = file.lfs.clone().unzip();
            let kept = KeptFile { size: file.size?, blob_id: file.blob.clone()?, lfs_sha256, lfs_size };
            Some((file.name.clone(), kept))
        };
        let files = self.files.iter().map(kept).collect::<Option<_>>()?;
        serde_json::to_string_pretty(&Kept { format_version: FORMAT, files }).ok()
    }

    /// The names of the files of a list that is kept; `None` if it is broken or of another format.
    pub(super) fn names_in_kept(text: &[u8]) -> Option<Vec<String>> {
        let kept: Kept = serde_json::from_slice(text).ok()?;
        let names: Vec<String> = kept.files.into_keys().collect();
        (kept.format_version == FORMAT && names.iter().all(|name| is_plain(name))).then_some(names)
    }
}
