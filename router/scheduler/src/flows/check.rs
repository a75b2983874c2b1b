//! The invariants of flows.

use std::collections::HashMap;

use super::{FlowId, Flows, Residency};
use crate::AdapterKey;

impl<P> Flows<P> {
    /// Panics unless every flow is where it belongs, has the given `residency`, and counts as users those of
    /// `admitted`, the flows of all admitted sequences.
    pub(crate) fn check(
        &self,
        admitted: impl Iterator<Item = FlowId>,
        residency: impl Fn(AdapterKey) -> Residency,
    ) {
        let mut users = vec![0; self.flows.len()];
        admitted.for_each(|id| users[id as usize] += 1);
        for (id, &users) in (0..).zip(&users) {
            self.check_flow(id, users, &residency);
        }
        self.check_tenants();
        self.check_orders();
        let mut arrivals: Vec<_> =
            self.iter().map(|sequence| (sequence.arrival, sequence.submitted)).collect();
        arrivals.sort_unstable();
        let submitted: Vec<_> = self.submitted.iter().map(|(&arrival, &at)| (arrival, at)).collect();
        assert_eq!(submitted, arrivals, "waiting requests");
    }

    fn check_flow(&self, id: FlowId, users: usize, residency: impl Fn(AdapterKey) -> Residency) {
        let flow = self.get(id);
        let open = self.by_keys.get(&(flow.tenant, flow.keys())) == Some(&id);
        assert_ne!(open, self.closed_flows.contains(&id), "flow {id} is open or closed");
        if !open {
            assert!(users == 0 && flow.waiting.is_empty(), "closed flow {id} has requests");
            return;
        }
        assert_eq!(flow.users, users, "users of flow {id}");
        let truth = flow.adapters.keys().map(residency).max().unwrap_or(Residency::Ready);
        assert_eq!(self.residency(flow), truth, "residency of flow {id}");
        let idle = users == 0 && flow.waiting.is_empty();
        let tenant = self.tenant(flow.tenant);
        assert_eq!(tenant.flows.is_indebted(id, flow.service), idle, "debt of flow {id}");
        assert!(flow.waiting.values().all(|sequence| sequence.flow == id), "requests of flow {id}");
    }

    fn check_tenants(&self) {
        for (id, tenant) in (0..).zip(&self.tenants) {
            let open = self.tenants_by_id.get(&tenant.tenant.id) == Some(&id);
            assert_ne!(open, self.closed_tenants.contains(&id), "tenant {id} is open or closed");
            let flows =
                || self.open_flows().filter(|&flow| self.get(flow).tenant == id).map(|id| self.get(id));
            let (waiting, users) =
                (flows().map(|f| f.waiting.len()).sum::<usize>(), flows().map(|f| f.users).sum::<usize>());
            if !open {
                assert_eq!(flows().count(), 0, "closed tenant {id} has flows");
                continue;
            }
            assert_eq!((tenant.waiting, tenant.users), (waiting, users), "requests of tenant {id}");
            let idle = (waiting, users) == (0, 0);
            assert_eq!(self.level.is_indebted(id, tenant.service), idle, "debt of tenant {id}");
        }
    }

    /// Every flow with waiting requests is listed where its residency says, and nowhere else.
    fn check_orders(&self) {
        let with = |residency| {
            let flows = self.open_flows().filter(move |&id| {
                let flow = self.get(id);
                !flow.waiting.is_empty() && self.residency(flow) == residency
            });
            flows.collect::<Vec<_>>()
        };
        let (ready, absent) = (with(Residency::Ready), with(Residency::Absent));
        let of = |flows: &[FlowId], tenant| {
            flows.iter().copied().filter(|&id| self.get(id).tenant == tenant).collect::<Vec<_>>()
        };
        let tenants = |flows: &[FlowId]| {
            let mut tenants: Vec<_> = flows.iter().map(|&id| self.get(id).tenant).collect();
            tenants.sort_unstable();
            tenants.dedup();
            tenants
        };
        for (id, tenant) in (0..).zip(&self.tenants) {
            if self.tenants_by_id.get(&tenant.tenant.id) == Some(&id) {
                tenant.flows.check(&of(&ready, id), &of(&absent, id));
            }
        }
        self.level.check(&tenants(&ready), &tenants(&absent));
        let newcomers = tenants(&ready).into_iter().filter(|&id| self.tenant(id).users == 0);
        assert_eq!(self.newcomers.ids().collect::<Vec<_>>(), newcomers.collect::<Vec<_>>(), "newcomers");
        self.newcomers.check();
        for (flows, longest) in [(&ready, &self.longest_ready), (&absent, &self.longest_absent)] {
            let mut expected: Vec<_> = flows.iter().map(|&id| (self.get(id).since, id)).collect();
            expected.sort_unstable();
            assert_eq!(longest.iter().copied().collect::<Vec<_>>(), expected, "flows by wait");
        }
        let is_absent = |key: &AdapterKey| self.adapters[key].residency == Residency::Absent;
        let mut needed = HashMap::<_, usize>::new();
        for key in absent.iter().flat_map(|&id| self.get(id).keys()).filter(is_absent) {
            *needed.entry(key).or_default() += 1;
        }
        assert_eq!(self.absent, needed, "adapters that need a slot");
    }

    fn open_flows(&self) -> impl Iterator<Item = FlowId> {
        let open = |(id, flow): (FlowId, &super::Flow<P>)| {
            (self.by_keys.get(&(flow.tenant, flow.keys())) == Some(&id)).then_some(id)
        };
        (0..).zip(&self.flows).filter_map(open)
    }
}
