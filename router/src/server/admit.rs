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
