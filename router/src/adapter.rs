//! Adapters, as requests name them, and the credentials that come with them.

use exchange::Fault;
use scheduler::CacheSalt;
use secrecy::SecretString;
use sources::{NameError, Reference, SourceKind};
use tokio::time::Instant;

use crate::{
    adapters::{Leased, Wanted},
    api::error::ApiError,
    generation::cache_salt,
    server::{App, accept::Caller},
};

/// An adapter, as a request names it.
#[derive(Debug, Clone)]
pub(crate) struct AdapterRef {
    /// The field that has the id.
    pub(crate) field: &'static str,
    /// The id as it was sent.
    pub(crate) id: String,
    pub(crate) reference: Reference,
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
        source: Option<&str>,
        credential: Credential,
    ) -> Result<Option<AdapterRef>, ApiError> {
        let Some(id) = id.filter(|id| !id.is_empty() && id != BASE_MODEL) else { return Ok(None) };
        let source = source.unwrap_or(&self.config.router.adapter_source);
        let reference = Reference::parse(source, &id).map_err(|error| {
            let field = if matches!(error, NameError::Source(_)) { "adapter_source" } else { field };
            ApiError::AdapterInvalid { field, message: error.to_string() }
        })?;
        Ok(Some(AdapterRef { field, id, reference, credential }))
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

    /// Waits until an adapter is in host memory, where it is kept until its lease is dropped.
    pub(crate) async fn lease(&self, caller: &Caller, adapter: &AdapterRef) -> Result<Leased, ApiError> {
        let limit = self.config.router.prepare_timeout;
        let deadline = Instant::now() + limit;
        let leased = self.lease_until(caller, adapter, deadline).await;
        leased.map_err(|fault| match fault {
            Fault::Slow if Instant::now() >= deadline => ApiError::AdapterTimeout { limit },
            fault => ApiError::of_adapter(adapter, fault),
        })
    }

    async fn lease_until(
        &self,
        caller: &Caller,
        adapter: &AdapterRef,
        deadline: Instant,
    ) -> Result<Leased, Fault> {
        let tenant = caller.principal.tenant.asking();
        let ask = async |credential: Option<&SecretString>| {
            let wanted = Wanted { reference: adapter.reference.clone(), credential: credential.cloned() };
            self.adapters.ask(wanted, tenant, deadline).await
        };
        // A folder wants to see no token, so that all who name it share one question.
        if adapter.reference.kind == SourceKind::Local {
            return ask(None).await;
        }
        let Credential { given, fallback } = &adapter.credential;
        let first = ask(given.as_ref()).await;
        match (&first, given, fallback) {
            (Err(Fault::NotFound(_) | Fault::Denied(_)), None, Some(fallback)) => ask(Some(fallback)).await,
            _ => first,
        }
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
            let reference = Reference::parse("hub", "sql").unwrap();
            let wanted = Wanted { reference: reference.clone(), credential: credential.given.clone() };
            let adapter = AdapterRef { field: "model", id: "sql".into(), reference, credential };
            let printed = format!("{adapter:?} {adapter:#?} {wanted:?}");
            assert!(printed.contains("sql") && !printed.contains("secret-"), "{printed}");
        }
    }
}
