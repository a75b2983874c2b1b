//! Registered adapters: names that the operator has given to adapters, by which requests ask for them, and pins.
//!
//! A registration neither is needed to use an adapter nor keeps others from being loaded. What was registered over HTTP
//! survives a restart in a [`manifest`]; credentials do not, so a registration that had one asks for it again.

mod manifest;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use config::Config;
use exchange::{Fault, Tenant};
use secrecy::SecretString;
use sources::{NameError, Reference, SourceKind};
use tokio::{
    task::{spawn, spawn_blocking},
    time::{Instant, sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    adapters::{Adapters, Failure, Lease, Pinned, Wanted},
    base_model::{BASE_MODEL, BaseModel},
};
pub use manifest::ManifestError;
use manifest::{Kept, Manifest};

/// The tenant that pins of the start are for. Tenants with keys have small numbers.
const OPERATOR: Tenant = Tenant { id: u64::MAX, weight: 1 };
/// Time between two attempts to pin an adapter, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// The longest name.
const MAX_NAME: usize = 256;
/// A name that no adapter can have, because a route has it where those of adapters stand: `/v1/adapters/capacity`.
const CAPACITY: &str = "capacity";

/// Why an adapter could not be registered, or its registration could not end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegistryError {
    /// The name cannot be one.
    #[error(
        "{0:?} cannot be the name of an adapter: it must have 1 to 256 characters, and not be the base model's or \"{CAPACITY}\""
    )]
    Name(String),
    /// The name is taken.
    #[error("the adapter {0:?} is registered already")]
    Exists(String),
    /// There is no registration of this name.
    #[error("no adapter {0:?} is registered")]
    Unknown(String),
    /// The adapter cannot be had.
    #[error("{fault}")]
    Adapter { reference: Reference, fault: Fault },
    /// What has changed cannot be kept. It was undone.
    #[error("the registrations cannot be kept: {0}")]
    Manifest(#[from] ManifestError),
}

/// An adapter that is to be registered.
#[derive(Debug, Clone)]
pub(crate) struct New {
    pub(crate) id: String,
    pub(crate) reference: Reference,
    /// Shown to the source for all who ask by this name and bring no credential of their own.
    pub(crate) credential: Option<SecretString>,
    pub(crate) pinned: bool,
}

/// A registered adapter.
#[derive(Debug, Clone)]
pub(crate) struct Registered {
    pub(crate) reference: Reference,
    pub(crate) credential: Option<SecretString>,
    /// Whether it had a credential that a restart has forgotten.
    pub(crate) needs_credential: bool,
    pub(crate) pinned: bool,
    pub(crate) created: SystemTime,
    /// Whether a flag has registered it, so that the next start does so again.
    by_flag: bool,
    pin: Option<Arc<Pin>>,
}

/// A pin, and the task that keeps it.
#[derive(Debug)]
struct Pin {
    state: Arc<Mutex<PinState>>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug, Default)]
struct PinState {
    lease: Option<Lease>,
    /// Why there is none.
    failure: Option<Failure>,
    /// There is to be none any more.
    ended: bool,
}

impl Registered {
    /// Why it could not be used last, beside the failures of requests.
    pub(crate) fn failure(&self) -> Option<Failure> {
        if self.needs_credential {
            return Some(Failure { at: self.created, message: FORGOTTEN.into() });
        }
        self.pin.as_ref()?.state().failure.clone()
    }
}

/// What is said of a registration whose credential is gone.
pub(crate) const FORGOTTEN: &str =
    "it was registered with a credential, which is kept in memory only: register it again with one";

/// All registrations.
pub(crate) struct Registry {
    adapters: Adapters,
    base: BaseModel,
    /// The adapter of requests that name none.
    default: Option<String>,
    entries: Mutex<BTreeMap<String, Registered>>,
    manifest: Option<Arc<Manifest>>,
    /// Taken while the manifest is written, so that the last change is written last.
    writing: tokio::sync::Mutex<()>,
}

impl Registry {
    /// Takes the registrations of the flags and of the manifest, and begins to load what is pinned.
    pub(crate) fn start(config: &Config, adapters: Adapters) -> Result<Registry, RegistryStartError> {
        let (manifest, kept) = open(config)?;
        let base = BaseModel::new(config);
        let mut entries = BTreeMap::new();
        for (kept, reference) in kept {
            let created = UNIX_EPOCH + Duration::from_secs(kept.created);
            // One that needs a credential cannot be pinned before it has one.
            let pin = kept.pinned && !kept.needs_credential;
            let pin = pin.then(|| Pin::start(&adapters, reference.clone(), None, None));
            let Kept { id, pinned, needs_credential, .. } = kept;
            let entry = Registered {
                reference,
                credential: None,
                needs_credential,
                pinned,
                created,
                by_flag: false,
                pin,
            };
            entries.insert(id, entry);
        }
        let mut registry = Registry {
            adapters,
            base,
            default: config.router.default_adapter().map(str::to_owned),
            entries: Mutex::default(),
            manifest: manifest.map(Arc::new),
            writing: tokio::sync::Mutex::default(),
        };
        for (id, reference, pinned) in by_flags(config)? {
            entries.insert(id, registry.of_flag(reference, pinned));
        }
        registry.entries = Mutex::new(entries);
        Ok(registry)
    }

    /// The registration that a flag asks for. What is not pinned is loaded once, so that the first request need not wait.
    fn of_flag(&self, reference: Reference, pinned: bool) -> Registered {
        let pin = pinned.then(|| Pin::start(&self.adapters, reference.clone(), None, None));
        if !pinned {
            let (adapters, wanted) =
                (self.adapters.clone(), Wanted { reference: reference.clone(), credential: None });
            // A failure is in the book.
            spawn(async move { drop(adapters.ask(wanted, OPERATOR, Instant::now() + PAUSES.1).await) });
        }
        let created = SystemTime::now();
        Registered {
            reference,
            credential: None,
            needs_credential: false,
            pinned,
            created,
            by_flag: true,
            pin,
        }
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Registered>> {
        lock(&self.entries)
    }

    /// The registration of a name.
    pub(crate) fn find(&self, id: &str) -> Option<Registered> {
        self.entries().get(id).cloned()
    }

    /// All registrations, by name.
    pub(crate) fn all(&self) -> Vec<(String, Registered)> {
        self.entries().iter().map(|(id, entry)| (id.clone(), entry.clone())).collect()
    }

    /// The name of the adapter for requests that name none.
    pub(crate) fn default_id(&self) -> Option<&str> {
        self.default.as_deref()
    }

    /// Refuses a name that cannot be registered, or that is taken.
    pub(crate) fn check(&self, id: &str, replace: bool) -> Result<(), RegistryError> {
        let is_name = !id.is_empty() && id.chars().count() <= MAX_NAME && !id.chars().any(char::is_control);
        if !is_name || self.base.is_called(id) || [BASE_MODEL, CAPACITY].contains(&id) {
            return Err(RegistryError::Name(id.chars().take(MAX_NAME).collect()));
        }
        if !replace && self.entries().contains_key(id) {
            return Err(RegistryError::Exists(id.into()));
        }
        Ok(())
    }

    /// Registers an adapter once it is in host memory. With `replace`, in place of one of this name, and whatever is
    /// known of its reference is asked again.
    pub(crate) async fn register(
        &self,
        new: New,
        replace: bool,
        tenant: Tenant,
        deadline: Instant,
    ) -> Result<(), RegistryError> {
        self.check(&new.id, replace)?;
        let New { id, reference, credential, pinned } = new;
        if replace {
            self.adapters.reload(&reference);
        }
        let wanted = Wanted { reference: reference.clone(), credential: credential.clone() };
        let failed = |fault| RegistryError::Adapter { reference: reference.clone(), fault };
        let pin = if pinned {
            let pinned = self.adapters.pin(wanted, tenant, deadline).await.map_err(failed)?;
            Some(Pin::start(&self.adapters, reference.clone(), credential.clone(), Some(pinned)))
        } else {
            // The lease ends here, and the copy stays while there is room.
            drop(self.adapters.ask(wanted, tenant, deadline).await.map_err(failed)?);
            None
        };
        let entry = Registered {
            reference,
            credential,
            needs_credential: false,
            pinned,
            created: SystemTime::now(),
            by_flag: false,
            pin,
        };
        let before = {
            let mut entries = self.entries();
            // Another registration may have come first.
            if !replace && entries.contains_key(&id) {
                return Err(RegistryError::Exists(id));
            }
            entries.insert(id.clone(), entry)
        };
        self.keep(id, before).await
    }

    /// Ends a registration. Requests that run go on.
    pub(crate) async fn unregister(&self, id: &str) -> Result<Registered, RegistryError> {
        let Some(entry) = self.entries().remove(id) else { return Err(RegistryError::Unknown(id.into())) };
        self.keep(id.into(), Some(entry.clone())).await?;
        entry.pin.iter().for_each(|pin| pin.end());
        Ok(entry)
    }

    /// Writes the manifest after a change of one name. If that fails, the name is as it was before.
    async fn keep(&self, id: String, before: Option<Registered>) -> Result<(), RegistryError> {
        let Some(manifest) = self.manifest.clone() else { return Ok(()) };
        let _writing = self.writing.lock().await;
        let kept = self.kept();
        let written = spawn_blocking(move || manifest.write(kept)).await;
        let Ok(Err(error)) = written else { return Ok(()) };
        let mut entries = self.entries();
        match before {
            Some(before) => entries.insert(id, before),
            None => entries.remove(&id),
        };
        Err(error.into())
    }

    /// The registrations that a restart takes up again.
    fn kept(&self) -> Vec<Kept> {
        let entries = self.entries();
        let kept = entries.iter().filter(|(_, entry)| !entry.by_flag).map(|(id, entry)| Kept {
            id: id.clone(),
            adapter_id: entry.reference.to_string(),
            adapter_source: entry.reference.kind.to_string(),
            pinned: entry.pinned,
            needs_credential: entry.needs_credential || entry.credential.is_some(),
            created: entry.created.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        });
        kept.collect()
    }

    /// Waits until no request uses an adapter any more, at most for so long, and then removes its copies from host memory
    /// and from the disk, unless somebody else needs them. Returns the number of requests that still run.
    pub(crate) async fn unload(&self, reference: &Reference, limit: Duration) -> usize {
        let Some(used) = self.adapters.book().of(reference) else { return 0 };
        let drained = timeout(limit, used.counts.drained()).await;
        if drained.is_err() {
            return used.counts.running();
        }
        if let Some(content) = used.content {
            self.adapters.evict(content);
        }
        0
    }
}

impl Pin {
    /// Keeps an adapter in host memory; `pinned` is the pin that it has already. A pin that is lost, or cannot be had, is
    /// asked for again and again.
    fn start(
        adapters: &Adapters,
        reference: Reference,
        credential: Option<SecretString>,
        pinned: Option<Pinned>,
    ) -> Arc<Pin> {
        let state = Arc::new(Mutex::new(PinState::default()));
        let wanted = Wanted { reference, credential };
        let task = keep_pinned(adapters.clone(), wanted, state.clone(), pinned);
        Arc::new(Pin { state, _task: AbortOnDropHandle::new(spawn(task)) })
    }

    fn state(&self) -> MutexGuard<'_, PinState> {
        lock(&self.state)
    }

    /// Gives the lease back. What is evicted after this call is not pinned any more.
    fn end(&self) {
        let mut state = self.state();
        state.ended = true;
        state.lease = None;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks for a pin whenever there is none.
async fn keep_pinned(
    adapters: Adapters,
    wanted: Wanted,
    state: Arc<Mutex<PinState>>,
    mut pinned: Option<Pinned>,
) {
    let mut pause = PAUSES.0;
    loop {
        let got = match pinned.take() {
            Some(pinned) => Ok(pinned),
            None => adapters.pin(wanted.clone(), OPERATOR, Instant::now() + PAUSES.1).await,
        };
        let fault = match got {
            Ok(Pinned { lease, lost }) => {
                {
                    let mut state = lock(&state);
                    if state.ended {
                        return;
                    }
                    (state.lease, state.failure) = (Some(lease), None);
                }
                pause = PAUSES.0;
                lost.wait().await
            }
            Err(fault) => fault,
        };
        tracing::warn!("the adapter {} is not pinned: {fault}", wanted.reference);
        {
            let mut state = lock(&state);
            state.lease = None;
            state.failure = Some(Failure { at: SystemTime::now(), message: fault.to_string() });
        }
        sleep(pause).await;
        pause = (2 * pause).min(PAUSES.1);
    }
}

/// Why the registrations could not be taken up.
#[derive(Debug, thiserror::Error)]
pub enum RegistryStartError {
    /// The file that keeps them.
    #[error("--adapter-manifest {0}")]
    Manifest(#[from] ManifestError),
    /// A name in a flag is none.
    #[error("the registered adapter {id:?}: {error}")]
    Name {
        /// The name.
        id: String,
        /// What is wrong with it.
        error: NameError,
    },
    /// An entry of `--lora-modules` is not of its form.
    #[error("--lora-modules {0:?}: it must be NAME=PATH, or an object with `name` and `path`")]
    Module(String),
}

/// A manifest, if there is one, and the registrations in it.
type Opened = (Option<Manifest>, Vec<(Kept, Reference)>);

/// Opens the manifest that the flag names, or one beside the sockets of the shards: there it lives as long as the
/// launcher does, whatever becomes of the router.
fn open(config: &Config) -> Result<Opened, ManifestError> {
    let named = config.router.adapter_manifest.clone();
    let beside = || Some(config.shards.uds.first()?.parent()?.join("adapters.json"));
    let is_named = named.is_some();
    let Some(path) = named.or_else(beside) else { return Ok((None, Vec::new())) };
    match Manifest::open(&path) {
        Err(error @ (ManifestError::Io { .. } | ManifestError::Busy { .. })) if !is_named => {
            tracing::warn!("registered adapters will be forgotten when the router ends: {error}");
            Ok((None, Vec::new()))
        }
        opened => opened.map(|(manifest, kept)| (Some(manifest), kept)),
    }
}

/// An entry of `--lora-modules` in vLLM's newer form.
#[derive(serde::Deserialize)]
struct Module {
    name: String,
    path: String,
}

/// The registrations that flags ask for: names, adapters, and whether they are pinned.
fn by_flags(all: &Config) -> Result<Vec<(String, Reference, bool)>, RegistryStartError> {
    let named = |id: &str, reference: Result<Reference, NameError>, pinned| {
        let failed = |error| RegistryStartError::Name { id: id.into(), error };
        Ok((id.to_owned(), reference.map_err(failed)?, pinned))
    };
    let (config, own_source) = (&all.router, all.adapter_source());
    let source = config.preloaded_adapter_source.as_deref().unwrap_or(own_source);
    let own = config.default_adapter().map(|id| (id, own_source));
    let preloaded = config.preloaded_adapter_ids.iter().map(|id| (&**id, source));
    let mut found = own
        .into_iter()
        .chain(preloaded)
        .filter(|(id, _)| !id.is_empty())
        .map(|(id, source)| named(id, Reference::parse(source, id), true))
        .collect::<Result<Vec<_>, RegistryStartError>>()?;
    for text in &config.lora_modules {
        let malformed = || RegistryStartError::Module(text.clone());
        let (name, path) = if text.trim_start().starts_with('{') {
            let module: Module = serde_json::from_str(text).map_err(|_| malformed())?;
            (module.name, module.path)
        } else {
            let (name, path) = text.split_once('=').ok_or_else(malformed)?;
            (name.to_owned(), path.to_owned())
        };
        if name.is_empty() || path.is_empty() {
            return Err(malformed());
        }
        // The first place: whether the adapter is there is not known before the server runs.
        let first = places(all.default_adapter_source(), &path).into_iter().take(1);
        for place in first {
            found.push(named(&name, place, false)?);
        }
    }
    Ok(found)
}

/// The places that vLLM and its controllers may mean by the path of an adapter, the first of them first: an absolute path
/// is a folder, an address names its source, and anything else is in the source of `--adapter-source` or, if that is the
/// folders of this machine, on the hub.
pub(crate) fn places(source: &str, path: &str) -> Vec<Result<Reference, NameError>> {
    let (local, hub) = (SourceKind::Local.name(), SourceKind::Hub.name());
    let path = path.strip_prefix("file://").unwrap_or(path);
    let sources = match source {
        _ if path.starts_with('/') => vec![local],
        _ if path.contains("://") => vec![source],
        source if source == local => vec![local, hub],
        source => vec![source],
    };
    let parse = |source| match (Reference::parse(source, path), path.split_once("://")) {
        // The beginning of an address that no source has is not the name of a folder.
        (Ok(Reference { kind: SourceKind::Local, .. }), Some((scheme, _))) => {
            Err(NameError::Source(scheme.chars().take(MAX_NAME).collect()))
        }
        (parsed, _) => parsed,
    };
    sources.into_iter().map(parse).collect()
}
