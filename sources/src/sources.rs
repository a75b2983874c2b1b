//! All sources behind one interface.

use secrecy::SecretString;

use crate::{
    Destination, Found, Reference, SettingsError, SourceError, SourceKind, SourceSettings, local::Local,
};

/// The sources of adapters.
#[derive(Debug)]
pub struct Sources {
    local: Local,
}

impl Sources {
    /// The sources that these settings lead to. Errors: a folder cannot be read.
    pub fn new(settings: SourceSettings) -> Result<Sources, SettingsError> {
        let local = Local::new(settings.adapter_dir.as_deref(), &settings.adapter_roots);
        let local = local.map_err(|(path, source)| SettingsError::Folder { path, source })?;
        Ok(Sources { local })
    }

    /// What an adapter's source fails together with: a hub's address, a bucket, a folder of folders.
    pub fn place(&self, adapter: &Reference) -> String {
        match adapter.kind {
            SourceKind::Local => format!("local {}", self.local.root_of(&adapter.id).display()),
            kind => kind.name().into(),
        }
    }

    /// Asks which version a reference leads to, and whether this credential may read it.
    pub async fn lookup(
        &self,
        adapter: &Reference,
        credential: Option<&SecretString>,
    ) -> Result<Found, SourceError> {
        let _ = credential;
        match adapter.kind {
            SourceKind::Local => self.local.lookup(adapter).await,
            kind => Err(SourceError::NotConfigured { kind, needs: "a newer server" }),
        }
    }

    /// Writes the files of a version into a folder. Nothing is done for one that is read in place.
    pub async fn fetch(
        &self,
        adapter: &Reference,
        found: &Found,
        credential: Option<&SecretString>,
        into: Destination<'_>,
    ) -> Result<(), SourceError> {
        let _ = credential;
        if found.in_place.is_some() {
            return Ok(());
        }
        if found.bytes > into.max_bytes {
            let (adapter, bytes) = (adapter.clone(), found.bytes);
            return Err(SourceError::TooLarge { adapter, bytes, limit: into.max_bytes });
        }
        Err(SourceError::NotConfigured { kind: adapter.kind, needs: "a newer server" })
    }
}
