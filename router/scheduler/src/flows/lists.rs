//! Keeps the orders of flows and tenants, and the counts of waiting requests, in step with their flows.

use super::{AdapterState, FlowId, Flows, Residency, TenantId};
use crate::{AdapterKey, sequence::Arrival};

impl<P> Flows<P> {
    pub(crate) fn set_residency(&mut self, key: AdapterKey, residency: Residency) {
        let Some(adapter) = self.adapters.get(&key) else { return };
        let flows: Vec<FlowId> = adapter.flows.iter().copied().collect();
        flows.iter().for_each(|&id| self.unlist(id));
        if let Some(adapter) = self.adapters.get_mut(&key) {
            self.absent -= adapter.counts_as_absent();
            adapter.residency = residency;
            self.absent += adapter.counts_as_absent();
        }
        flows.iter().for_each(|&id| self.list(id));
    }

    /// Takes a flow out of all orders. To be called before what they order by changes; `list` must follow.
    pub(super) fn unlist(&mut self, id: FlowId) {
        let flow = &self.flows[id as usize];
        let tenant = &mut self.tenants[flow.tenant as usize];
        self.longest_ready.remove(&(flow.since, id));
        self.longest_absent.remove(&(flow.since, id));
        for residency in [Residency::Ready, Residency::Absent] {
            tenant.flows.order(residency).into_iter().for_each(|order| order.remove(id));
        }
    }

    /// Puts a flow with waiting requests into the orders that it belongs to, and its tenant into those of tenants.
    pub(super) fn list(&mut self, id: FlowId) {
        let residency = self.residency(self.get(id));
        let flow = &self.flows[id as usize];
        let tenant = &mut self.tenants[flow.tenant as usize];
        if let Some(order) = tenant.flows.order(residency)
            && !flow.waiting.is_empty()
        {
            order.insert(id, flow.service, flow.since);
            match residency {
                Residency::Ready => self.longest_ready.insert((flow.since, id)),
                _ => self.longest_absent.insert((flow.since, id)),
            };
        }
        self.list_tenant(self.get(id).tenant);
    }

    pub(super) fn list_tenant(&mut self, id: TenantId) {
        let tenant = &mut self.tenants[id as usize];
        for residency in [Residency::Ready, Residency::Absent] {
            let waits = tenant.flows.order(residency).is_some_and(|order| !order.is_empty());
            let order = self.level.order(residency);
            order.into_iter().for_each(|order| order.set(id, waits, tenant.service, tenant.since));
            if residency == Residency::Ready {
                let newcomer = waits && tenant.users == 0;
                self.newcomers.set(id, newcomer, tenant.service, tenant.since);
            }
        }
    }

    /// A request of the flow does not wait any more.
    pub(super) fn forget_waiting(&mut self, id: FlowId, arrival: Arrival) {
        self.submitted.remove(&arrival);
        let tenant = self.get(id).tenant;
        self.tenants[tenant as usize].waiting -= 1;
        self.count_waiting(id, |waiting| waiting - 1);
    }

    pub(super) fn count_waiting(&mut self, id: FlowId, count: impl Fn(usize) -> usize) {
        let Some(key) = self.get(id).key() else { return };
        if let Some(adapter) = self.adapters.get_mut(&key) {
            self.absent -= adapter.counts_as_absent();
            adapter.waiting = count(adapter.waiting);
            self.absent += adapter.counts_as_absent();
        }
    }
}

impl AdapterState {
    /// 1 if it has waiting requests and needs a slot, 0 if not.
    fn counts_as_absent(&self) -> usize {
        usize::from(self.residency == Residency::Absent && self.waiting > 0)
    }
}
