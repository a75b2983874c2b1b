//! Keeps the orders of flows and tenants, and the counts of waiting requests, in step with their flows.

use super::{FlowId, Flows, Residency, TenantId};
use crate::{AdapterKey, sequence::Arrival};

impl<P> Flows<P> {
    pub(crate) fn set_residency(&mut self, key: AdapterKey, residency: Residency) {
        let Some(adapter) = self.adapters.get(&key) else { return };
        let flows: Vec<FlowId> = adapter.flows.iter().copied().collect();
        flows.iter().for_each(|&id| self.unlist(id));
        self.adapters.entry(key).and_modify(|adapter| adapter.residency = residency);
        flows.iter().for_each(|&id| self.list(id));
    }

    /// Takes a flow out of all orders. To be called before what they order by changes; `list` must follow.
    pub(super) fn unlist(&mut self, id: FlowId) {
        for key in self.absent_of(id) {
            if let Some(flows) = self.absent.get_mut(&key) {
                *flows -= 1;
                if *flows == 0 {
                    self.absent.remove(&key);
                }
            }
        }
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
        for key in self.absent_of(id) {
            *self.absent.entry(key).or_default() += 1;
        }
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

    /// The adapters for which a flow is listed as needing slots.
    fn absent_of(&self, id: FlowId) -> Vec<AdapterKey> {
        let flow = self.get(id);
        if flow.waiting.is_empty() || self.residency(flow) != Residency::Absent {
            return Vec::new();
        }
        let is_absent = |key: &AdapterKey| {
            self.adapters.get(key).is_some_and(|adapter| adapter.residency == Residency::Absent)
        };
        flow.adapters.keys().filter(is_absent).collect()
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
        for key in self.get(id).keys() {
            self.adapters.entry(key).and_modify(|adapter| adapter.waiting = count(adapter.waiting));
        }
    }
}
