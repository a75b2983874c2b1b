//! The names of adapters, as requests spell them.

use std::{
    fmt,
    path::{Component, Path},
    str::FromStr,
};

use crate::{hub::is_plain, model_name::is_repository};

/// A kind of place that adapters come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceKind {
    /// Folders of this machine.
    Local,
    /// The Hugging Face Hub, or another server with its interface.
    Hub,
    /// Buckets with the interface of Amazon S3.
    S3,
    /// Buckets of Google Cloud Storage.
    Gs,
    /// Containers of Azure Blob Storage.
    Az,
    /// Repositories of Predibase.
    Pbase,
}

impl SourceKind {
    /// All of them.
    pub const ALL: [SourceKind; 6] = [
        SourceKind::Local,
        SourceKind::Hub,
        SourceKind::S3,
        SourceKind::Gs,
        SourceKind::Az,
        SourceKind::Pbase,
    ];

    /// The value of `adapter_source`.
    pub fn name(self) -> &'static str {
        match self {
            SourceKind::Local => "local",
            SourceKind::Hub => "hub",
            SourceKind::S3 => "s3",
            SourceKind::Gs => "gs",
            SourceKind::Az => "az",
            SourceKind::Pbase => "pbase",
        }
    }

    /// Whether its references name a bucket and a prefix in it.
    pub fn is_bucket(self) -> bool {
        matches!(self, SourceKind::S3 | SourceKind::Gs | SourceKind::Az)
    }
}

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SourceKind {
    type Err = NameError;

    fn from_str(name: &str) -> Result<SourceKind, NameError> {
        let found = SourceKind::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| NameError::Source(shown(name)))
    }
}

/// Schemes of addresses, and the sources that they stand for. `huggingface://` is what AIBrix writes and `hf://` what
/// KServe writes; both mean the hub.
const SCHEMES: [(&str, SourceKind); 6] = [
    ("s3://", SourceKind::S3),
    ("gs://", SourceKind::Gs),
    ("az://", SourceKind::Az),
    ("hf://", SourceKind::Hub),
    ("huggingface://", SourceKind::Hub),
    ("pbase://", SourceKind::Pbase),
];

/// Longest name that is accepted, in bytes: Linux's limit for a path.
const MAX_NAME: usize = 4096;

/// Why a text cannot name an adapter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is no such source.
    #[error("adapter source {0:?} is not supported, only local, hub, s3, gs, az and pbase are")]
    Source(String),
    /// The source has no such names.
    #[error("adapter id {id:?} {fault}")]
    Id {
        /// The name, of which a long one is cut.
        id: String,
        /// The fault.
        fault: &'static str,
    },
}

/// An adapter, as a request names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// The source.
    pub kind: SourceKind,
    /// The adapter's name there: a path, a repository, or `BUCKET/PREFIX`.
    pub id: String,
    /// The revision or version that was asked for.
    pub revision: Option<String>,
}

impl Reference {
    /// Reads the name of an adapter. An address such as `s3://BUCKET/PREFIX` names its source itself, whatever `source`
    /// says.
    pub fn parse(source: &str, id: &str) -> Result<Reference, NameError> {
        let kind: SourceKind = source.parse()?;
        let refuse = |fault| Err(NameError::Id { id: shown(id), fault });
        if id.is_empty() {
            return refuse("is empty");
        }
        if id.len() > MAX_NAME {
            return refuse("is too long");
        }
        if id.chars().any(char::is_control) {
            return refuse("has control characters");
        }
        let scheme = SCHEMES.iter().find_map(|(scheme, kind)| Some((*kind, id.strip_prefix(scheme)?)));
        let (kind, name) = scheme.unwrap_or((kind, id));
        let parsed = match kind {
            SourceKind::Local => local(name),
            SourceKind::Hub => repository(name),
            // LoRAX's form without a bucket: a key in the bucket of PREDIBASE_MODEL_BUCKET.
            SourceKind::S3 if scheme.is_none() => key(name).map(|()| (format!("/{name}"), None)),
            SourceKind::S3 | SourceKind::Gs | SourceKind::Az => bucket(name),
            SourceKind::Pbase => versioned(name),
        };
        match parsed {
            Ok((id, revision)) => Ok(Reference { kind, id, revision }),
            Err(fault) => refuse(fault),
        }
    }
}

impl fmt::Display for Reference {
    /// The name as people write it, of which a long one is cut.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = shown(&self.id);
        match (self.kind, self.revision.as_deref().map(shown)) {
            (SourceKind::Pbase, Some(version)) => write!(f, "{id}/{version}"),
            (SourceKind::S3, None) if id.starts_with('/') => f.write_str(&id[1..]),
            (kind, None) if kind.is_bucket() => write!(f, "{kind}://{id}"),
            (_, Some(revision)) => write!(f, "{id}@{revision}"),
            (_, None) => f.write_str(&id),
        }
    }
}

/// The beginning of a name that somebody else chose, for messages.
fn shown(name: &str) -> String {
    name.chars().take(200).collect()
}

type Parsed = Result<(String, Option<String>), &'static str>;

fn local(name: &str) -> Parsed {
    if Path::new(name).components().any(|part| part == Component::ParentDir) {
        return Err("has a parent folder in it");
    }
    Ok((name.into(), None))
}

/// `OWNER/NAME` or `NAME`, with a revision behind `@`.
fn repository(name: &str) -> Parsed {
    let (id, revision) = name.split_once('@').map_or((name, None), |(id, revision)| (id, Some(revision)));
    if !is_repository(id) {
        return Err("is not the name of a repository");
    }
    // An empty one, as of a variable without a value, is none.
    let revision = revision.filter(|revision| !revision.is_empty());
    if revision.is_some_and(|revision| !is_plain(revision)) {
        return Err("has a revision that is not one");
    }
    Ok((id.into(), revision.map(str::to_owned)))
}

/// `BUCKET/PREFIX`; the prefix may end with a slash.
fn bucket(name: &str) -> Parsed {
    let Some((bucket, prefix)) = name.split_once('/') else { return Err("has no prefix behind its bucket") };
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if bucket.is_empty() || bucket.starts_with('.') || !bucket.chars().all(is_name) {
        return Err("has no bucket that can be one");
    }
    key(prefix)?;
    Ok((format!("{bucket}/{}", prefix.trim_end_matches('/')), None))
}

fn key(prefix: &str) -> Result<(), &'static str> {
    let is_part = |part: &str| !["", ".", ".."].contains(&part);
    // One name in two spellings would be two adapters.
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    if prefix.split('/').all(is_part) {
        Ok(())
    } else {
        Err("has a prefix with an empty part, \".\" or \"..\"")
    }
}

/// `REPOSITORY/VERSION` or `REPOSITORY`.
fn versioned(name: &str) -> Parsed {
    let (repository, version) =
        name.split_once('/').map_or((name, None), |(repository, version)| (repository, Some(version)));
    let is_part = |part: &str| is_plain(part) && !part.contains('/');
    if !is_part(repository) || version.is_some_and(|version| !is_part(version)) {
        return Err("is not REPOSITORY/VERSION");
    }
    Ok((repository.into(), version.map(str::to_owned)))
}

#[cfg(test)]
mod tests;
