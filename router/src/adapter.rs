//! References to adapters, as requests name them, and the credentials that come with them.

use scheduler::{Adapter, CacheSalt};
use secrecy::SecretString;
use tokio::time::timeout;

use crate::{
    api::error::ApiError,
    engine::Engine,
    generation::cache_salt,
    ranks::PrepareError,
    server::{App, accept::Caller},
};

/// A reference to an adapter, as a request names it.
#[derive(Debug, Clone)]
pub(crate) struct AdapterRef {
    /// The field that has the id.
    pub(crate) field: &'static str,
    pub(crate) source: String,
    pub(crate) id: String,
    pub(crate) credential: Credential,
}

/// The tokens that a request brings for the source of its adapter.
#[derive(Debug, Clone, Default)]
pub(crate) struct Credential {
    /// A token that is meant for the source: the body's `api_token`, or the header `x-adapter-token`.
    given: Option<SecretString>,
    /// A bearer token of a server without keys. It may be meant for the source, as LoRAX takes it, or be the
    /// placeholder that some clients cannot do without, so it is shown only to a source that wants to see one.
    fallback: Option<SecretString>,
}

impl Credential {
    /// A header's tokens.
    pub(crate) fn new(given: Option<SecretString>, fallback: Option<SecretString>) -> Credential {
        Credential { given, fallback }
    }

    /// Returns whether the request brought no token.
    fn is_none(&self) -> bool {
        self.given.is_none() && self.fallback.is_none()
    }

    /// The same, but a token in the body goes before those of headers.
    pub(crate) fn or_in_body(&self, api_token: Option<SecretString>) -> Credential {
        Credential { given: api_token.or_else(|| self.given.clone()), fallback: self.fallback.clone() }
    }
}

/// LoRAX's name of the base model where an adapter is named.
const BASE_MODEL: &str = "__base_model__";

impl App {
    /// The adapter that a field of a request names, if it is not the base model.
    pub(crate) fn adapter(
        &self,
        field: &'static str,
        id: Option<String>,
        source: Option<String>,
        credential: Credential,
    ) -> Option<AdapterRef> {
        let id = id.filter(|id| !id.is_empty() && id != BASE_MODEL)?;
        let source = source.unwrap_or_else(|| self.config.router.adapter_source.clone());
        Some(AdapterRef { field, source, id, credential })
    }

    /// The salt of a request in the prefix cache; `narrower` is the request's own salt.
    pub(crate) fn cache_salt(
        &self,
        caller: &Caller,
        adapter: Option<&AdapterRef>,
        narrower: Option<&str>,
    ) -> CacheSalt {
        let public = adapter.is_none_or(|adapter| adapter.credential.is_none());
        cache_salt(self.config.router.prefix_cache_scope, &caller.principal.tenant, public, narrower)
    }

    /// Asks the shards to resolve, read and check an adapter, and returns its identity and size.
    pub(crate) async fn prepare(&self, adapter: &AdapterRef) -> Result<Adapter, ApiError> {
        let limit = self.config.router.prepare_timeout;
        let prepared = timeout(limit, prepare(&self.engine, adapter)).await;
        let prepared = prepared.map_err(|_| ApiError::AdapterTimeout { limit })?;
        prepared.map_err(|error| ApiError::of_adapter(adapter.field, error))
    }
}

async fn prepare(engine: &Engine, adapter: &AdapterRef) -> Result<Adapter, PrepareError> {
    let credential = &adapter.credential;
    let first = engine.prepare(adapter, credential.given.as_ref()).await;
    match (&first, &credential.given, &credential.fallback) {
        (Err(PrepareError::NotFound(_) | PrepareError::Forbidden(_)), None, Some(fallback)) => {
            engine.prepare(adapter, Some(fallback)).await
        }
        _ => first,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_not_printed() {
        let credential = Credential::new(Some("secret-1".into()), Some("secret-2".into()));
        let all = [
            credential.clone(),
            credential.or_in_body(Some("secret-3".into())),
            Credential::default().or_in_body(Some("secret-4".into())),
        ];
        for credential in all {
            let adapter = AdapterRef { field: "model", source: "hub".into(), id: "sql".into(), credential };
            let printed = format!("{adapter:?} {adapter:#?}");
            assert!(printed.contains("sql") && !printed.contains("secret-"), "{printed}");
        }
    }
}
