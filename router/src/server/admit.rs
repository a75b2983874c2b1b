//! Admission of requests, with permits for their sequences.

use super::{App, accept::Caller};
use crate::{
    adapter::AdapterRef,
    admission::Asked,
    api::error::ApiError,
    permits::Permit,
    principal::{Tenant, TenantLimits},
};

/// Permits of a request on its way to the engine.
pub(crate) enum Entry {
    /// Permits of `--max-concurrent-requests`.
    Admitted(Vec<Permit>),
    /// Permits of the pool for preparation, which are held until the adapter is ready.
    Preparing(Vec<Permit>),
}

impl App {
    /// Refuses a list of more prompts than could ever run at the same time: to try again would not help. `field` is
    /// the list's name.
    pub(crate) fn check_sequences(
        &self,
        caller: &Caller,
        field: &'static str,
        sequences: usize,
    ) -> Result<(), ApiError> {
        let (most, whose) = self.most_sequences(caller);
        // One sequence is no list; a tenant that may have none now may have one when the keys are read again.
        if sequences > most.max(1) {
            let problem = format!(
                "must have at most {most} elements: each is a request of its own, and {whose} may run {most} at the same \
                 time. Given: {sequences}"
            );
            return Err(ApiError::invalid(field, problem));
        }
        Ok(())
    }

    /// The number of sequences that may run at the same time, and whose limit it is.
    fn most_sequences(&self, caller: &Caller) -> (usize, &'static str) {
        let all = self.config.router.max_concurrent_requests;
        match caller.principal.tenant.limits.max_concurrent_requests {
            Some(own) if own < all => (own, "the tenant"),
            _ => (all, "the server"),
        }
    }

    /// The number of sequences that one request may run at the same time if it has more of them: half of what its caller may,
    /// so that others get in beside it.
    pub(crate) fn most_at_once(&self, caller: &Caller) -> usize {
        (self.most_sequences(caller).0 / 2).max(1)
    }

    /// Lets a request in, with a permit for each of its sequences. One that needs an adapter gets those of
    /// `--max-concurrent-requests` only when the adapter is there, for that may take long; it is refused at once if
    /// it would not get them now.
    pub(crate) fn admit(
        &self,
        caller: &Caller,
        adapter: Option<&AdapterRef>,
        sequences: usize,
    ) -> Result<Entry, ApiError> {
        let asked = caller.asked(adapter, sequences);
        if adapter.is_none() {
            return Ok(Entry::Admitted(self.permits.take(&caller.request, asked)?));
        }
        self.permits.check(asked)?;
        // The tenant's own limits are those of the other permits.
        let tenant = Tenant { limits: TenantLimits::default(), ..Tenant::clone(asked.tenant) };
        let asked = Asked { tenant: &tenant, ..asked };
        Ok(Entry::Preparing(self.preparing.take(&caller.request, asked)?))
    }

    /// The permits of a request whose adapter is there.
    pub(crate) fn admit_prepared(
        &self,
        caller: &Caller,
        adapter: Option<&AdapterRef>,
        entry: Entry,
    ) -> Result<Vec<Permit>, ApiError> {
        match entry {
            Entry::Admitted(permits) => Ok(permits),
            Entry::Preparing(permits) => {
                Ok(self.permits.take(&caller.request, caller.asked(adapter, permits.len()))?)
            }
        }
    }
}

impl Caller {
    fn asked<'a>(&'a self, adapter: Option<&'a AdapterRef>, sequences: usize) -> Asked<'a> {
        Asked { tenant: &self.principal.tenant, adapter: adapter.map(|adapter| &*adapter.id), sequences }
    }
}
