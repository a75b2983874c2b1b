//! Adapters, as requests name them, and the credentials that come with them.

use std::sync::Arc;

use exchange::{Content, Fault};
use scheduler::{Adapter, AdapterKey, Adapters, CacheSalt};
use secrecy::SecretString;
use sources::{NameError, Reference, SourceKind};
use tokio::time::Instant;

use crate::{
    adapters::{InUse, Leased, Leases, Recipe, Wanted},
    api::{
        ensemble::{Ensemble, FIELD as ENSEMBLE, Several},
        error::ApiError,
        merged::{FIELD as MERGED, MergedAdapters, check_alone},
    },
    base_model::BASE_MODEL,
    generation::cache_salt,
    registry::{FORGOTTEN, Registered},
    server::{App, accept::Caller},
    text_side::{Read, TextSide},
};

/// One adapter or several, as a request names them.
#[derive(Debug, Clone)]
pub(crate) struct AdapterRef {
    /// The field that has the id.
    pub(crate) field: &'static str,
    /// The id as it was sent; those of several with commas between them.
    pub(crate) id: String,
    /// At least one.
    parts: Vec<Part>,
    kind: Kind,
}

/// An adapter, alone or with others.
#[derive(Debug, Clone)]
struct Part {
    reference: Reference,
    /// 1 of an adapter that is alone.
    weight: f64,
    /// The request's tokens, or that of the part's registration.
    credential: Credential,
}

/// What a request makes of its parts.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// The only part.
    One,
    /// An adapter that is merged of them.
    Merge(Recipe),
    /// Their weighted sum, which is taken in the batch.
    Ensemble,
}

/// The adapters of a request, and the leases that keep them in host memory.
#[derive(Debug, Default)]
pub(crate) struct LeasedAll {
    pub(crate) adapters: Adapters,
    /// The weight of each of them.
    pub(crate) weights: Vec<f32>,
    /// The tokens at which they begin to act; `None` if they act from the first row on.
    pub(crate) invocation: Option<Arc<[u32]>>,
    pub(crate) leases: Leases,
}

impl From<Leased> for LeasedAll {
    fn from(leased: Leased) -> LeasedAll {
        let Leased { adapter, invocation, lease } = leased;
        let (adapters, leases) = (Some(adapter).into(), [lease].into_iter().collect());
        LeasedAll { adapters, weights: vec![1.0], invocation, leases }
    }
}

impl LeasedAll {
    /// An ensemble, or the number of a member that cannot be in one, because it does not act from the first row on. An
    /// adapter that is in it under several names has the sum of their weights.
    fn ensemble(members: Vec<(Leased, f64)>) -> Result<LeasedAll, usize> {
        if let Some(number) = members.iter().position(|(leased, _)| leased.invocation.is_some()) {
            return Err(number);
        }
        let mut distinct: Vec<(Adapter, f64)> = Vec::new();
        for (leased, weight) in &members {
            match distinct.iter_mut().find(|(adapter, _)| adapter.key == leased.adapter.key) {
                Some((_, sum)) => *sum += weight,
                None => distinct.push((leased.adapter, *weight)),
            }
        }
        let distinct = distinct.into_iter().map(|(adapter, weight)| (adapter, weight as f32));
        let (list, weights): (Vec<_>, Vec<_>) = distinct.unzip();
        let adapters = match (&list[..], &weights[..]) {
            ([adapter], [1.0]) => Some(*adapter).into(),
            _ => Adapters::ensemble(variant(&list, &weights), &list),
        };
        let leases = members.into_iter().map(|(leased, _)| leased.lease).collect();
        Ok(LeasedAll { adapters, weights, invocation: None, leases })
    }
}

/// The adapters that act in a prompt, and the position from which on they do: the last occurrence of their invocation, if
/// they have one. A prompt without it is the base model's.
pub(crate) fn acting(adapters: &Adapters, invocation: Option<&[u32]>, prompt: &[u32]) -> (Adapters, u32) {
    let Some(invocation) = invocation else { return (adapters.clone(), 0) };
    match prompt.windows(invocation.len()).rposition(|window| window == invocation) {
        Some(first) => (adapters.clone(), first as u32),
        None => (Adapters::default(), 0),
    }
}

/// Says what is hashed, so that no variant of another kind is equal to that of an ensemble.
const VARIANT: &str = "lorax ensemble of adapters, version 1";

/// Names what an ensemble makes of the model: its adapters and their weights, in order.
fn variant(list: &[Adapter], weights: &[f32]) -> AdapterKey {
    let mut hasher = blake3::Hasher::new_derive_key(VARIANT);
    for (adapter, weight) in list.iter().zip(weights) {
        hasher.update(&adapter.key.0);
        hasher.update(&weight.to_bits().to_le_bytes());
    }
    AdapterKey(hasher.finalize().into())
}

impl AdapterRef {
    /// Its source; that of the first of several.
    pub(crate) fn source(&self) -> Option<SourceKind> {
        self.references().next().map(|reference| reference.kind)
    }

    /// The adapter, the parts of a merge, or the members of an ensemble.
    pub(crate) fn references(&self) -> impl Iterator<Item = &Reference> {
        self.parts.iter().map(|part| &part.reference)
    }

    /// One of the parts, or all of them, as errors name it.
    fn name(&self, part: Option<usize>) -> String {
        part.map_or_else(|| self.id.clone(), |part| self.parts[part].reference.to_string())
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
    /// What a request names, if it is not the base model: an adapter in a field, a merge, or an ensemble. A request that names
    /// none has that of `--adapter-id`.
    pub(crate) fn adapter(
        &self,
        (field, id): (&'static str, Option<String>),
        several: Several,
        source: Option<&str>,
        credential: Credential,
    ) -> Result<Option<AdapterRef>, ApiError> {
        match several {
            Several { merged: None, ensemble: None } => self.one_adapter((field, id), source, credential),
            Several { merged: Some(_), ensemble: Some(_) } => {
                Err(ApiError::invalid(ENSEMBLE, format!("cannot be given beside `{MERGED}`")))
            }
            Several { merged: Some(merged), ensemble: None } => {
                check_alone(MERGED, field, id.as_deref())?;
                self.merged_adapter(merged, source, credential).map(Some)
            }
            Several { merged: None, ensemble: Some(ensemble) } => {
                check_alone(ENSEMBLE, field, id.as_deref())?;
                self.ensemble(ensemble, source, credential).map(Some)
            }
        }
    }

    /// An adapter that is alone: a registered one by its name, or any by its reference.
    fn one_adapter(
        &self,
        (field, id): (&'static str, Option<String>),
        source: Option<&str>,
        credential: Credential,
    ) -> Result<Option<AdapterRef>, ApiError> {
        let id = id.filter(|id| !id.is_empty());
        let Some(id) = id.or_else(|| Some(self.registry.default_id()?.to_owned())) else { return Ok(None) };
        if id == BASE_MODEL || self.is_merged(&id, source) {
            return Ok(None);
        }
        let (reference, credential) = self.named(field, &id, source, credential)?;
        let parts = vec![Part { reference, weight: 1.0, credential }];
        Ok(Some(AdapterRef { field, id, parts, kind: Kind::One }))
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
        let problem = "the base model cannot be merged with adapters";
        self.several(MERGED, (parts, Kind::Merge(recipe)), problem, (source, credential))
    }

    /// The adapters that are added for a request.
    fn ensemble(
        &self,
        ensemble: Ensemble,
        source: Option<&str>,
        credential: Credential,
    ) -> Result<AdapterRef, ApiError> {
        let problem = "the base model is part of every ensemble";
        self.several(ENSEMBLE, (ensemble.checked()?, Kind::Ensemble), problem, (source, credential))
    }

    /// Several adapters of a field, which are not the base model. The problem is told if one is.
    fn several(
        &self,
        field: &'static str,
        (parts, kind): (Vec<(String, f64)>, Kind),
        problem: &str,
        (source, credential): (Option<&str>, Credential),
    ) -> Result<AdapterRef, ApiError> {
        if let Some((id, _)) = parts.iter().find(|(id, _)| is_base_model(id) || self.is_merged(id, source)) {
            return Err(ApiError::invalid(format!("{field}.ids"), format!("has {id:?}: {problem}")));
        }
        let ids: Vec<&str> = parts.iter().map(|(id, _)| &**id).collect();
        let id = ids.join(",");
        let parts = parts.iter().map(|(id, weight)| {
            let (reference, credential) = self.named(field, id, source, credential.clone())?;
            Ok(Part { reference, weight: *weight, credential })
        });
        Ok(AdapterRef { field, id, parts: parts.collect::<Result<_, ApiError>>()?, kind })
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
        let public = adapter.is_none_or(|adapter| adapter.parts.iter().all(|part| part.credential.is_none()));
        cache_salt(self.config.router.prefix_cache_scope, &caller.principal.tenant, public, narrower)
    }

    /// Begins to count a request for its tenant and for its adapters.
    pub(crate) fn begin_use(&self, caller: &Caller, adapter: Option<&AdapterRef>) -> Arc<InUse> {
        let tenant = self.metrics.tenants().of(&caller.principal.tenant.name);
        self.adapters.book().begin(adapter.into_iter().flat_map(AdapterRef::references), tenant)
    }

    /// Waits until the adapters of a request are in host memory, where they are kept until the leases are dropped, and
    /// until it is known how texts become their tokens.
    pub(crate) async fn lease(
        &self,
        caller: &Caller,
        adapter: &AdapterRef,
    ) -> Result<(LeasedAll, Arc<TextSide>), ApiError> {
        let limit = self.config.router.prepare_timeout;
        let deadline = Instant::now() + limit;
        let parts = &adapter.parts;
        let mut shown: Vec<_> = parts.iter().map(|part| part.credential.first(&part.reference)).collect();
        let leased = loop {
            let wanted = parts.iter().zip(&shown).map(|(part, shown)| Wanted {
                reference: part.reference.clone(),
                credential: shown.cloned(),
            });
            let leased = self.ask_for(caller, adapter, wanted.collect(), deadline).await;
            match &leased {
                Err((Some(number), fault))
                    if let part = &parts[*number]
                        && let Some(next) = part.credential.next(&part.reference, shown[*number], fault) =>
                {
                    shown[*number] = Some(next);
                }
                _ => break leased,
            }
        };
        let failed = |(part, fault)| match fault {
            Fault::Slow if Instant::now() >= deadline => ApiError::AdapterTimeout { limit },
            fault => ApiError::of_adapter(adapter.field, &adapter.name(part), fault),
        };
        let (leased, contents) = leased.map_err(failed)?;
        let mut sides = Vec::new();
        for (number, (part, content)) in parts.iter().zip(contents).enumerate() {
            let wanted = || Wanted { reference: part.reference.clone(), credential: shown[number].cloned() };
            let side = self.text_side(caller, content, wanted, deadline).await;
            sides.push(side.map_err(|fault| failed((Some(number), fault)))?);
        }
        let side = match &sides[..] {
            [Err(error)] => {
                let message = format!("adapter \"{}\": {error}", adapter.name(Some(0)));
                return Err(ApiError::AdapterInvalid { field: adapter.field, message });
            }
            [Ok(first), others @ ..]
                if others.iter().all(|other| other.as_ref().is_ok_and(|other| other.is_same(first))) =>
            {
                first.clone()
            }
            // No tokens are right for all of them but the model's.
            _ => self.text_sides.base().clone(),
        };
        Ok((leased, side))
    }

    /// The text side of an adapter whose copy in host memory is leased.
    async fn text_side(
        &self,
        caller: &Caller,
        content: Content,
        wanted: impl Fn() -> Wanted,
        deadline: Instant,
    ) -> Result<Read, Fault> {
        let read = async || {
            if let Some(read) = self.read_text_side(caller, content, wanted().reference).await? {
                return Ok(read);
            }
            // Its files have left the disk since it was copied into host memory.
            let wanted = wanted();
            let (reference, tenant) = (wanted.reference.clone(), caller.principal.tenant.asking());
            let _on_disk = self.adapters.ask_for_files(wanted, tenant, deadline).await?;
            self.read_text_side(caller, content, reference).await?.ok_or(Fault::Changed)
        };
        self.text_sides.get(content, read).await
    }

    /// Reads the files of an adapter on one of the threads for such work. `None` if they are not on this machine any more.
    async fn read_text_side(
        &self,
        caller: &Caller,
        content: Content,
        reference: Reference,
    ) -> Result<Option<Read>, Fault> {
        let (adapters, sides) = (self.adapters.clone(), self.text_sides.clone());
        let work = move || Ok(adapters.text_files(content, &reference)?.map(|files| sides.read(&files)));
        let done = self.workers.run("reading an adapter's tokenizer", &caller.principal, work).await;
        done.map_err(|error| Fault::Unavailable(error.to_string().into()))?
    }

    /// Asks for the parts, with a credential for each, and returns the content of each. A fault has the number of the part
    /// that it is about.
    async fn ask_for(
        &self,
        caller: &Caller,
        adapter: &AdapterRef,
        mut wanted: Vec<Wanted>,
        deadline: Instant,
    ) -> Result<(LeasedAll, Vec<Content>), (Option<usize>, Fault)> {
        let content = |leased: &Leased| Content(leased.adapter.key.0);
        let tenant = caller.principal.tenant.asking();
        let weights = adapter.parts.iter().map(|part| part.weight);
        match adapter.kind {
            Kind::One => {
                let leased = self.adapters.ask(wanted.swap_remove(0), tenant, deadline).await;
                let leased = leased.map_err(|fault| (Some(0), fault))?;
                let contents = vec![content(&leased)];
                Ok((leased.into(), contents))
            }
            Kind::Merge(recipe) => {
                let parts = wanted.into_iter().zip(weights).collect();
                let (leased, contents) = self.adapters.ask_merged(parts, recipe, tenant, deadline).await?;
                Ok((leased.into(), contents))
            }
            Kind::Ensemble => {
                let leased = self.adapters.ask_ensemble(wanted, tenant, deadline).await?;
                let contents = leased.iter().map(content).collect();
                let all = LeasedAll::ensemble(leased.into_iter().zip(weights).collect());
                let all = all.map_err(|number| {
                    let name = adapter.name(Some(number));
                    let problem = "has alora_invocation_tokens, so that it cannot be a member of an ensemble";
                    (Some(number), Fault::Invalid(format!("adapter \"{name}\" {problem}").into()))
                })?;
                Ok((all, contents))
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
            let parts = vec![Part { reference, weight: 1.0, credential }];
            let adapter = AdapterRef { field: "model", id: "sql".into(), parts, kind: Kind::One };
            let printed = format!("{adapter:?} {adapter:#?} {wanted:?}");
            assert!(printed.contains("sql") && !printed.contains("secret-"), "{printed}");
        }
    }
}
