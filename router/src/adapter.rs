//! Adapters, as requests name them, and the credentials that come with them.

use exchange::Fault;
use scheduler::CacheSalt;
use secrecy::SecretString;
use sources::{NameError, Reference, SourceKind};
use tokio::time::Instant;

use crate::{
    adapters::{Leased, Recipe, Wanted},
    api::{
        error::ApiError,
        merged::{self, FIELD as MERGED, MergedAdapters},
    },
    base_model::BASE_MODEL,
    generation::cache_salt,
    registry::{FORGOTTEN, Registered},
    server::{App, accept::Caller},
};

/// An adapter, as a request names it.
#[derive(Debug, Clone)]
pub(crate) struct AdapterRef {
    /// The field that has the id.
    pub(crate) field: &'static str,
    /// The id as it was sent; those of a merge with commas between them.
    pub(crate) id: String,
    named: Named,
    credential: Credential,
}

/// What a request names.
#[derive(Debug, Clone)]
enum Named {
    One(Reference),
    Merged(Vec<Part>, Recipe),
}

/// An adapter that is merged with others.
#[derive(Debug, Clone)]
struct Part {
    reference: Reference,
    weight: f64,
    /// The request's tokens, or that of the part's registration.
    credential: Credential,
}

impl AdapterRef {
    /// Its source; that of the first part of a merge.
    pub(crate) fn source(&self) -> Option<SourceKind> {
        match &self.named {
            Named::One(reference) => Some(reference.kind),
            Named::Merged(parts, _) => parts.first().map(|part| part.reference.kind),
        }
    }

    /// The adapter, or the parts of a merge.
    pub(crate) fn references(&self) -> impl Iterator<Item = &Reference> {
        let (one, parts) = match &self.named {
            Named::One(reference) => (Some(reference), &[][..]),
            Named::Merged(parts, _) => (None, &parts[..]),
        };
        one.into_iter().chain(parts.iter().map(|part| &part.reference))
    }

    /// The adapter itself, or a part of a merge, as errors name it.
    fn name(&self, part: Option<usize>) -> String {
        match (&self.named, part) {
            (Named::One(reference), _) => reference.to_string(),
            (Named::Merged(parts, _), Some(part)) => parts[part].reference.to_string(),
            (Named::Merged(..), None) => self.id.clone(),
        }
    }
}

/// The tokens that a request brings for the source of its adapter.
#[derive(Debug, Clone, Default)]
pub(crate) struct Credential {
    /// A token that is meant for the source: the body's `api_token`, or the header `x-adapter-token`.
    given: Option<SecretString>,
    /// A bearer token of a server without keys. It may be meant for the source, as LoRAX takes it, or be the
    /// placeholder that some clients cannot do without, so it is shown only to a source that wants to see one.
    fallback: Option<SecretString>,
    /// The token with which the adapter was registered, for all who ask for it by that name.
    registered: Option<SecretString>,
}

impl Credential {
    /// A header's tokens.
    pub(crate) fn new(given: Option<SecretString>, fallback: Option<SecretString>) -> Credential {
        Credential { given, fallback, registered: None }
    }

    /// The token that was meant for the source.
    pub(crate) fn into_given(self) -> Option<SecretString> {
        self.given
    }

    /// Returns whether the request brought no token.
    fn is_none(&self) -> bool {
        self.given.is_none() && self.fallback.is_none()
    }

    /// The token that a source is shown first. A folder wants to see none, so that all who name it share one question.
    fn first(&self, reference: &Reference) -> Option<&SecretString> {
        self.given.as_ref().or(self.registered.as_ref()).filter(|_| reference.kind != SourceKind::Local)
    }

    /// The token that is shown next, after a source has said no to the one that was shown.
    fn next(
        &self,
        reference: &Reference,
        shown: Option<&SecretString>,
        fault: &Fault,
    ) -> Option<&SecretString> {
        let is_refusal = matches!(fault, Fault::NotFound(_) | Fault::Denied(_));
        let may_show = shown.is_none() && reference.kind != SourceKind::Local;
        self.fallback.as_ref().filter(|_| is_refusal && may_show)
    }

    /// The same, but a token in the body goes before those of headers.
    pub(crate) fn or_in_body(&self, api_token: Option<SecretString>) -> Credential {
        Credential { given: api_token.or_else(|| self.given.clone()), ..self.clone() }
    }
}

/// Whether the base model is meant.
pub(crate) fn is_base_model(id: &str) -> bool {
    id.is_empty() || id == BASE_MODEL
}

impl App {
    /// The adapter that a field of a request names, if it is not the base model: a registered one by its name, or any by
    /// its reference. A request that names none has that of `--adapter-id`.
    pub(crate) fn adapter(
        &self,
        (field, id): (&'static str, Option<String>),
        merged: Option<MergedAdapters>,
        source: Option<&str>,
        credential: Credential,
    ) -> Result<Option<AdapterRef>, ApiError> {
        if let Some(merged) = merged {
            merged::check_alone(field, id.as_deref())?;
            return self.merged_adapter(merged, source, credential).map(Some);
        }
        let id = id.filter(|id| !id.is_empty());
        let Some(id) = id.or_else(|| Some(self.registry.default_id()?.to_owned())) else { return Ok(None) };
        if id == BASE_MODEL || self.is_merged(&id, source) {
            return Ok(None);
        }
        let (reference, credential) = self.named(field, &id, source, credential)?;
        Ok(Some(AdapterRef { field, id, named: Named::One(reference), credential }))
    }

    /// The adapter of a name, which may be that of a registration, and the tokens for it.
    fn named(
        &self,
        field: &'static str,
        id: &str,
        source: Option<&str>,
        credential: Credential,
    ) -> Result<(Reference, Credential), ApiError> {
        match self.registry.find(id).filter(|_| source.is_none()) {
            Some(registered) => registered_adapter(field, id, registered, credential),
            None => Ok((self.reference(field, id, source)?, credential)),
        }
    }

    /// Whether this is the adapter that is in the model's weights, so that the model itself is meant.
    fn is_merged(&self, id: &str, source: Option<&str>) -> bool {
        let config = &self.config.router;
        config.merged_adapter() == Some(id)
            && source.is_none_or(|source| source == self.config.adapter_source())
    }

    /// The adapter that is merged for a request.
    fn merged_adapter(
        &self,
        merged: MergedAdapters,
        source: Option<&str>,
        credential: Credential,
    ) -> Result<AdapterRef, ApiError> {
        let (parts, recipe) = merged.checked()?;
        if let Some((id, _)) = parts.iter().find(|(id, _)| is_base_model(id) || self.is_merged(id, source)) {
            let problem = format!("has {id:?}: the base model cannot be merged with adapters");
            return Err(ApiError::invalid(format!("{MERGED}.ids"), problem));
        }
        let ids: Vec<&str> = parts.iter().map(|(id, _)| &**id).collect();
        let id = ids.join(",");
        let parts = parts.iter().map(|(id, weight)| {
            let (reference, credential) = self.named(MERGED, id, source, credential.clone())?;
            Ok(Part { reference, weight: *weight, credential })
        });
        let named = Named::Merged(parts.collect::<Result<_, ApiError>>()?, recipe);
        Ok(AdapterRef { field: MERGED, id, named, credential })
    }

    /// The reference that a field names, at a source or at that of the flag.
    pub(crate) fn reference(
        &self,
        field: &'static str,
        id: &str,
        source: Option<&str>,
    ) -> Result<Reference, ApiError> {
        let source = source.unwrap_or_else(|| self.config.default_adapter_source());
        Reference::parse(source, id).map_err(|error| {
            let field = if matches!(error, NameError::Source(_)) { "adapter_source" } else { field };
            ApiError::AdapterInvalid { field, message: error.to_string() }
        })
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
        let leased = match &adapter.named {
            Named::One(reference) => {
                let leased = self.lease_one(caller, reference, &adapter.credential, deadline).await;
                leased.map_err(|fault| (None, fault))
            }
            Named::Merged(parts, recipe) => self.lease_merged(caller, (parts, *recipe), deadline).await,
        };
        leased.map_err(|(part, fault)| match fault {
            Fault::Slow if Instant::now() >= deadline => ApiError::AdapterTimeout { limit },
            fault => ApiError::of_adapter(adapter.field, &adapter.name(part), fault),
        })
    }

    async fn lease_one(
        &self,
        caller: &Caller,
        reference: &Reference,
        credential: &Credential,
        deadline: Instant,
    ) -> Result<Leased, Fault> {
        let tenant = caller.principal.tenant.asking();
        let mut shown = credential.first(reference);
        loop {
            let wanted = Wanted { reference: reference.clone(), credential: shown.cloned() };
            let leased = self.adapters.ask(wanted, tenant, deadline).await;
            match &leased {
                Err(fault) if let Some(next) = credential.next(reference, shown, fault) => shown = Some(next),
                _ => return leased,
            }
        }
    }

    /// As [`Self::lease_one`], of a merge.
    async fn lease_merged(
        &self,
        caller: &Caller,
        (parts, recipe): (&[Part], Recipe),
        deadline: Instant,
    ) -> Result<Leased, (Option<usize>, Fault)> {
        let tenant = caller.principal.tenant.asking();
        let mut shown: Vec<_> = parts.iter().map(|part| part.credential.first(&part.reference)).collect();
        loop {
            let wanted = parts.iter().zip(&shown).map(|(part, shown)| {
                (Wanted { reference: part.reference.clone(), credential: shown.cloned() }, part.weight)
            });
            let leased = self.adapters.ask_merged(wanted.collect(), recipe, tenant, deadline).await;
            match &leased {
                Err((Some(part), fault))
                    if let Some(next) =
                        parts[*part].credential.next(&parts[*part].reference, shown[*part], fault) =>
                {
                    shown[*part] = Some(next);
                }
                _ => return leased,
            }
        }
    }
}

/// A registered adapter, as a request names it. A request's own token goes before that of the registration.
fn registered_adapter(
    field: &'static str,
    id: &str,
    registered: Registered,
    credential: Credential,
) -> Result<(Reference, Credential), ApiError> {
    if registered.needs_credential && credential.given.is_none() {
        let message = format!("adapter {id:?}: {FORGOTTEN}");
        return Err(ApiError::AdapterForbidden { field, message });
    }
    let credential = Credential { registered: registered.credential, ..credential };
    Ok((registered.reference, credential))
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
            let named = Named::One(reference);
            let adapter = AdapterRef { field: "model", id: "sql".into(), named, credential };
            let printed = format!("{adapter:?} {adapter:#?} {wanted:?}");
            assert!(printed.contains("sql") && !printed.contains("secret-"), "{printed}");
        }
    }
}
