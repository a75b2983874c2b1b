//! API keys: which tenant a key belongs to, and the file that says so.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};
use tokio::{
    task::{JoinError, spawn_blocking},
    time::timeout,
};

use crate::principal::{Principal, Tenant, TenantId, TenantLimits};

/// Time between two looks at the key file.
const POLL: Duration = Duration::from_secs(1);
/// Time in which it must be read before the log says that it was not.
const READ: Duration = Duration::from_secs(2);

/// The reason that keys were refused.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not JSON of the right shape. The message names a place, not the text there, which may be a key.
    #[error("{}: line {line}, column {column}: not a list of keys", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line of the first fault, from 1.
        line: usize,
        /// Its column, from 1.
        column: usize,
    },
    /// The file is not TOML of the right shape.
    #[error("{}: byte {at}: not a list of keys", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// Position of the first fault.
        at: usize,
    },
    /// The entry has both a key and a hash, or neither.
    #[error("key {0} needs one of `key` and `sha256`")]
    KeyOrHash(usize),
    /// A key is empty.
    #[error("key {0} is empty")]
    Empty(usize),
    /// The hash is not 64 hexadecimal digits.
    #[error("key {0}: `sha256` must have 64 hexadecimal digits")]
    Hash(usize),
    /// The tenant has no name.
    #[error("key {0} has an empty `tenant`")]
    Tenant(usize),
    /// The weight is 0.
    #[error("key {0}: `weight` must be at least 1")]
    Weight(usize),
    /// The key is listed twice.
    #[error("key {1} is key {0} again")]
    Twice(usize, usize),
    /// Two entries say different things of one tenant.
    #[error("tenant {0:?} has different weights or limits in two entries")]
    Conflict(String),
    /// There is a key file, but not one key in it or beside it.
    #[error("no keys: nobody could call the server")]
    None,
}

/// A key file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    keys: Vec<Entry>,
}

/// A key of the file and what it opens.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    key: Option<SecretString>,
    /// SHA-256 of the key in hexadecimal, in place of the key.
    sha256: Option<String>,
    tenant: String,
    #[serde(default = "one")]
    weight: u32,
    #[serde(default)]
    limits: TenantLimits,
}

fn one() -> u32 {
    1
}

type Hash = [u8; 32];

/// Keys that are valid at one time.
#[derive(Default)]
struct Ring {
    keys: Vec<(Hash, Arc<Tenant>)>,
}

impl Ring {
    fn add(&mut self, hash: Hash, tenant: Arc<Tenant>) -> Result<(), KeyError> {
        let number = self.keys.len() + 1;
        if let Some(other) = self.keys.iter().position(|(known, _)| *known == hash) {
            return Err(KeyError::Twice(other + 1, number));
        }
        self.keys.push((hash, tenant));
        Ok(())
    }

    /// The tenant of a key. Compares hashes, each in constant time and all of them, so that the time tells nothing
    /// about valid keys.
    fn find(&self, key: &str) -> Option<Arc<Tenant>> {
        let hash = Hash::from(Sha256::digest(key));
        let mut found = u64::MAX;
        for (index, (known, _)) in (0u64..).zip(&self.keys) {
            found.conditional_assign(&index, known.ct_eq(&hash));
        }
        self.keys.get(usize::try_from(found).ok()?).map(|(_, tenant)| tenant.clone())
    }
}

/// The API keys of the command line and of the key file, and their tenants.
pub struct Keys {
    given: Vec<SecretString>,
    file: Option<PathBuf>,
    ring: RwLock<Ring>,
    /// Numbers of all tenants so far, by name: a tenant that comes back is the same one.
    ids: RwLock<HashMap<String, TenantId>>,
}

impl Keys {
    /// Reads all keys. Without any there is one anonymous tenant, and everybody is let in.
    pub fn load(given: Vec<SecretString>, file: Option<PathBuf>) -> Result<Keys, KeyError> {
        let keys = Keys { given, file, ring: RwLock::default(), ids: RwLock::default() };
        if keys.are_required() {
            let text = keys.read()?;
            keys.replace(text.as_deref())?;
        }
        Ok(keys)
    }

    /// Returns whether callers need a key.
    pub fn are_required(&self) -> bool {
        self.file.is_some() || !self.given.is_empty()
    }

    /// The caller that shows this key; `None` if it is not let in.
    pub fn principal(&self, key: Option<&str>) -> Option<Principal> {
        if !self.are_required() {
            return Some(Principal::anonymous());
        }
        // Nothing panics while it holds the lock.
        let ring = self.ring.read().ok()?;
        Some(Principal { tenant: ring.find(key?)? })
    }

    /// Reads the key file again whenever its text changes, for ever; without a file, waits for ever. A file that
    /// cannot be used leaves the keys as they are.
    pub(crate) async fn watch(self: Arc<Keys>) {
        let Some(file) = &self.file else { return std::future::pending().await };
        let mut seen = None;
        let mut ticks = tokio::time::interval(POLL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // Reading has panicked, or the runtime shuts down.
            let Ok(read) = self.read_aside(file).await else { return };
            let text = read.as_ref().ok().cloned().flatten();
            if text == seen {
                continue;
            }
            seen = text.clone();
            match read.and_then(|_| self.replace(text.as_deref())) {
                Ok(keys) => tracing::info!("api-key-file: {keys} keys are valid now"),
                Err(error) => tracing::error!("api-key-file: {error}; {} is not used", file.display()),
            }
        }
    }

    /// Reads the file on a thread of its own. A file system that does not answer is told of, and waited for.
    async fn read_aside(
        self: &Arc<Keys>,
        file: &Path,
    ) -> Result<Result<Option<Vec<u8>>, KeyError>, JoinError> {
        let keys = self.clone();
        let mut reading = spawn_blocking(move || keys.read());
        if let Ok(read) = timeout(READ, &mut reading).await {
            return read;
        }
        let (file, limit) = (file.display(), READ.as_secs());
        tracing::error!(
            "key file watcher: {file} has not been read within {limit} s; the keys stay as they are"
        );
        reading.await
    }

    fn read(&self) -> Result<Option<Vec<u8>>, KeyError> {
        let Some(path) = &self.file else { return Ok(None) };
        fs::read(path).map(Some).map_err(|source| KeyError::Io { path: path.clone(), source })
    }

    /// Makes these the valid keys, and returns how many they are.
    fn replace(&self, text: Option<&[u8]>) -> Result<usize, KeyError> {
        let mut ring = Ring::default();
        let mut tenants: HashMap<String, Arc<Tenant>> = HashMap::new();
        for (number, key) in (1..).zip(&self.given) {
            let tenant = self.tenant(format!("api-key-{number}"), 1, TenantLimits::default());
            tenants.insert(tenant.name.clone(), tenant.clone());
            ring.add(hash(key, number)?, tenant)?;
        }
        let entries = match (&self.file, text) {
            (Some(path), Some(text)) => parse(path, text)?,
            _ => Vec::new(),
        };
        for entry in entries {
            let number = ring.keys.len() + 1;
            let hash = entry.hash(number)?;
            let tenant = self.tenant(entry.tenant, entry.weight, entry.limits);
            let known = tenants.entry(tenant.name.clone()).or_insert_with(|| tenant.clone());
            if **known != *tenant {
                return Err(KeyError::Conflict(tenant.name.clone()));
            }
            ring.add(hash, known.clone())?;
        }
        let count = ring.keys.len();
        if count == 0 {
            return Err(KeyError::None);
        }
        if let Ok(mut current) = self.ring.write() {
            *current = ring;
        }
        Ok(count)
    }

    fn tenant(&self, name: String, weight: u32, limits: TenantLimits) -> Arc<Tenant> {
        // 0 is the anonymous tenant.
        let id = self.ids.write().map_or(TenantId(0), |mut ids| {
            let next = TenantId(ids.len() as u64 + 1);
            *ids.entry(name.clone()).or_insert(next)
        });
        Arc::new(Tenant { id, name, weight, limits })
    }
}

impl Entry {
    /// Checks the entry and returns the hash of its key.
    fn hash(&self, number: usize) -> Result<Hash, KeyError> {
        if self.tenant.is_empty() {
            return Err(KeyError::Tenant(number));
        }
        if self.weight == 0 {
            return Err(KeyError::Weight(number));
        }
        match (&self.key, &self.sha256) {
            (Some(key), None) => hash(key, number),
            (None, Some(digits)) => unhex(digits).ok_or(KeyError::Hash(number)),
            _ => Err(KeyError::KeyOrHash(number)),
        }
    }
}

fn hash(key: &SecretString, number: usize) -> Result<Hash, KeyError> {
    let key = key.expose_secret();
    if key.is_empty() { Err(KeyError::Empty(number)) } else { Ok(Sha256::digest(key).into()) }
}

fn unhex(digits: &str) -> Option<Hash> {
    if digits.len() != 64 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let mut hash = Hash::default();
    for (byte, at) in hash.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(&digits[at..at + 2], 16).ok()?;
    }
    Some(hash)
}

/// Reads a key file: TOML if its name ends so, else JSON.
fn parse(path: &Path, text: &[u8]) -> Result<Vec<Entry>, KeyError> {
    let file: KeyFile = if path.extension().is_some_and(|extension| extension == "toml") {
        toml::from_slice(text).map_err(|error| KeyError::Toml {
            path: path.into(),
            at: error.span().map_or(0, |span| span.start),
        })?
    } else {
        serde_json::from_slice(text).map_err(|error| KeyError::Json {
            path: path.into(),
            line: error.line(),
            column: error.column(),
        })?
    };
    Ok(file.keys)
}
