//! All sources behind one interface.

use secrecy::SecretString;

use crate::{
    Destination, Found, Reference, SettingsError, SourceError, SourceKind, SourceSettings,
    bucket::{Buckets, Place},
    hub::Hub,
    local::Local,
    predibase::Predibase,
};

/// The sources of adapters.
#[derive(Debug)]
pub struct Sources {
    local: Local,
    hub: Hub,
    buckets: Buckets,
    predibase: Predibase,
    /// Whether the hub's own token stands in for a credential that is missing.
    use_hub_token: bool,
}

impl Sources {
    /// The sources that these settings lead to. Errors: a folder cannot be read.
    pub fn new(settings: SourceSettings) -> Result<Sources, SettingsError> {
        let local = Local::new(settings.adapter_dir.as_deref(), &settings.adapter_roots);
        let local = local.map_err(|(path, source)| SettingsError::Folder { path, source })?;
        let hub = Hub::new(settings.hub)?;
        let predibase = Predibase::new(hub.client().clone(), &settings.buckets.variables)?;
        let buckets = Buckets::new(settings.buckets);
        Ok(Sources { local, hub, buckets, predibase, use_hub_token: settings.use_hub_token })
    }

    /// What an adapter's source fails together with: a hub's address, a bucket, a folder of folders.
    pub fn place(&self, adapter: &Reference) -> String {
        match adapter.kind {
            SourceKind::Local => format!("local {}", self.local.root_of(&adapter.id).display()),
            SourceKind::Hub => format!("hub {}", self.hub.endpoint()),
            SourceKind::S3 | SourceKind::Gs | SourceKind::Az => {
                let place = Place::of(adapter, self.buckets.default_bucket());
                place.map_or_else(|| adapter.kind.to_string(), |place| place.to_string())
            }
            SourceKind::Pbase => format!("pbase {}", self.predibase.gateway()),
        }
    }

    /// Asks which version a reference leads to, and whether this credential may read it.
    pub async fn lookup(
        &self,
        adapter: &Reference,
        credential: Option<&SecretString>,
    ) -> Result<Found, SourceError> {
        match adapter.kind {
            SourceKind::Local => self.local.lookup(adapter).await,
            SourceKind::Hub => self.hub.find_adapter(adapter, self.hub_token(credential)).await,
            SourceKind::S3 | SourceKind::Gs | SourceKind::Az => {
                self.buckets.find_adapter(adapter, &self.buckets.allowed(adapter)?).await
            }
            SourceKind::Pbase => {
                let place = self.predibase.resolve(adapter, credential, &self.buckets).await?;
                self.buckets.find_adapter(adapter, &place).await
            }
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
        if found.in_place.is_some() {
            return Ok(());
        }
        if found.bytes > into.max_bytes {
            let (adapter, bytes) = (adapter.clone(), found.bytes);
            return Err(SourceError::TooLarge { adapter, bytes, limit: into.max_bytes });
        }
        match adapter.kind {
            SourceKind::Local => Ok(()),
            SourceKind::Hub => self.hub.fetch_adapter(adapter, found, self.hub_token(credential), into).await,
            SourceKind::S3 | SourceKind::Gs | SourceKind::Az => {
                self.buckets.fetch_adapter(adapter, &self.buckets.allowed(adapter)?, found, into).await
            }
            SourceKind::Pbase => {
                let place = self.predibase.resolve(adapter, credential, &self.buckets).await?;
                self.buckets.fetch_adapter(adapter, &place, found, into).await
            }
        }
    }

    /// The server's own token is an operator's, and opens what the request's sender might not read.
    fn hub_token<'a>(&'a self, credential: Option<&'a SecretString>) -> Option<&'a SecretString> {
        credential.or_else(|| self.hub.token().filter(|_| self.use_hub_token))
    }
}
