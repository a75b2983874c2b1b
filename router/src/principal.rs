//! Principals and tenants: every request has a principal, which names the tenant that the request counts for.

use std::sync::Arc;

use serde::Deserialize;

/// A tenant's number in this process. Tenants keep theirs when keys are read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(pub u64);

/// Limits of a tenant. `None` means that the tenant has no such limit of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TenantLimits {
    /// Sequences at the same time.
    pub max_concurrent_requests: Option<usize>,
    /// Requests that may begin in a minute.
    pub requests_per_minute: Option<u32>,
    /// Tokens of prompts and answers in a minute.
    pub tokens_per_minute: Option<u32>,
}

/// A party that shares the server with others: it has a weight and limits, and its requests compete with each other
/// before they compete with those of other tenants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Tells it apart from the others.
    pub id: TenantId,
    /// Its name in logs.
    pub name: String,
    /// Its share of the server, relative to the others' weights; at least 1.
    pub weight: u32,
    /// Its limits.
    pub limits: TenantLimits,
}

impl Tenant {
    /// The tenant as the exchange of adapters knows it.
    pub(crate) fn asking(&self) -> exchange::Tenant {
        exchange::Tenant { id: self.id.0, weight: self.weight }
    }

    /// The tenant as the scheduler knows it.
    pub(crate) fn scheduled(&self) -> scheduler::Tenant {
        scheduler::Tenant { id: self.id.0, weight: self.weight }
    }
}

/// The caller of a request.
#[derive(Debug, Clone)]
pub struct Principal {
    /// The tenant that its requests count for.
    pub tenant: Arc<Tenant>,
}

impl Principal {
    /// The only caller of a server without keys.
    pub fn anonymous() -> Principal {
        let tenant =
            Tenant { id: TenantId(0), name: "anonymous".into(), weight: 1, limits: TenantLimits::default() };
        Principal { tenant: Arc::new(tenant) }
    }
}
