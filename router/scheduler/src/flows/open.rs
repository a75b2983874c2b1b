//! Flows, tenants and adapters come to be known with their first request, and are forgotten when neither requests nor
//! debts are left.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{AdapterState, Flow, FlowId, Flows, MAX_WEIGHT, Residency, TenantId, TenantState, level::Level};
use crate::{AdapterKey, Adapters, Tenant};

impl<P> Flows<P> {
    /// The flow of a tenant and a list of adapters, whose `residency` is told of those that are not known yet.
    pub(crate) fn open(
        &mut self,
        tenant: Tenant,
        adapters: &Adapters,
        residency: impl Fn(AdapterKey) -> Residency,
    ) -> FlowId {
        let tenant = self.open_tenant(tenant);
        let keys: Vec<_> = adapters.keys().collect();
        if let Some(&id) = self.by_keys.get(&(tenant, keys.clone())) {
            return id;
        }
        let service = self.tenant(tenant).flows.virtual_time();
        let since = Duration::ZERO;
        let flow =
            Flow { tenant, adapters: adapters.clone(), waiting: BTreeMap::new(), service, since, users: 0 };
        let id = insert(&mut self.flows, &mut self.closed_flows, flow);
        self.by_keys.insert((tenant, keys.clone()), id);
        for key in keys {
            let new = || AdapterState { residency: residency(key), flows: BTreeSet::new(), waiting: 0 };
            self.adapters.entry(key).or_insert_with(new).flows.insert(id);
        }
        id
    }

    fn open_tenant(&mut self, tenant: Tenant) -> TenantId {
        let tenant = Tenant { weight: tenant.weight.clamp(1, MAX_WEIGHT), ..tenant };
        if let Some(&id) = self.tenants_by_id.get(&tenant.id) {
            self.tenants[id as usize].tenant = tenant;
            return id;
        }
        let state = TenantState {
            tenant,
            service: self.level.virtual_time(),
            since: Duration::ZERO,
            waiting: 0,
            users: 0,
            flows: Level::default(),
        };
        let id = insert(&mut self.tenants, &mut self.closed_tenants, state);
        self.tenants_by_id.insert(tenant.id, id);
        id
    }

    /// Resets debts where nobody waits, and closes what has none any more; `id` is the flow that has changed.
    pub(super) fn close_settled(&mut self, id: FlowId) {
        let tenant = self.get(id).tenant;
        if self.tenant(tenant).waiting == 0 {
            self.tenants[tenant as usize].flows.reset_debts();
        }
        while let Some(flow) = self.tenants[tenant as usize].flows.pop_settled() {
            self.close(flow);
        }
        if self.submitted.is_empty() {
            self.level.reset_debts();
        }
        while let Some(tenant) = self.level.pop_settled() {
            self.close_tenant(tenant);
        }
    }

    /// Closes a flow without requests, and its tenant if it has none either, unless their service still counts.
    pub(super) fn close_if_idle(&mut self, id: FlowId) {
        let flow = self.get(id);
        let (tenant, service) = (flow.tenant, flow.service);
        if flow.users > 0 || !flow.waiting.is_empty() {
            return;
        }
        if self.tenants[tenant as usize].flows.leave(id, service) {
            self.close(id);
        }
        let state = self.tenant(tenant);
        if state.users == 0 && state.waiting == 0 && self.level.leave(tenant, self.tenant(tenant).service) {
            self.close_tenant(tenant);
        }
    }

    fn close(&mut self, id: FlowId) {
        let flow = self.get(id);
        let (tenant, keys) = (flow.tenant, flow.keys());
        self.by_keys.remove(&(tenant, keys.clone()));
        self.closed_flows.push(id);
        for key in keys {
            let Some(adapter) = self.adapters.get_mut(&key) else { continue };
            adapter.flows.remove(&id);
            if adapter.flows.is_empty() {
                self.adapters.remove(&key);
            }
        }
    }

    fn close_tenant(&mut self, id: TenantId) {
        let tenant = self.tenant(id).tenant.id;
        self.tenants_by_id.remove(&tenant);
        self.closed_tenants.push(id);
    }
}

/// Puts an entry into the place of a closed one, or at the end. Returns its index.
fn insert<T>(entries: &mut Vec<T>, closed: &mut Vec<u32>, entry: T) -> u32 {
    if let Some(id) = closed.pop() {
        entries[id as usize] = entry;
        return id;
    }
    entries.push(entry);
    (entries.len() - 1) as u32
}
