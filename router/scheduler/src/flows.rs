//! Picks the next request. A flow is the requests of one tenant for one list of adapters; within a flow, requests are served
//! first come, first served. Tenants take turns by weight, the flows of a tenant take turns beneath, and flows that
//! have waited long get a bounded share out of turn.

mod aging;
mod check;
mod level;
mod lists;
mod open;
mod order;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use crate::{
    AdapterKey, Adapters, Tenant,
    sequence::{Arrival, Sequence},
};
use aging::Aging;
pub use aging::{AGED_SHARE, AGED_SLOTS, OVERDUE};
use level::Level;
use order::Order;

/// Virtual tokens of a generated token; one of the prompt that had to be computed is 1. A decode row costs more than a
/// prefill row, because it reads all weights for few rows. The numbers are those of VTC's experiments.
pub(crate) const GENERATED: u64 = 2;

/// Service of a tenant of weight 1 for each virtual token.
pub(crate) const SERVICE_UNIT: u64 = 1 << 20;

/// The largest weight of a tenant. A much larger one would round the service of a single token to nothing.
const MAX_WEIGHT: u32 = 1 << 16;

/// Index of a flow. Reused after the flow has been closed.
pub(crate) type FlowId = u32;

/// Index of a tenant. Reused after the tenant has been closed.
pub(crate) type TenantId = u32;

/// The residency of an adapter, or of all adapters of a flow, which decides whether requests can be admitted. That of
/// several is the greatest of theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Residency {
    /// It is in a slot. The base model always is ready.
    Ready,
    /// It is on its way into a slot.
    Loading,
    /// It needs a slot.
    Absent,
    /// Its slot is promised to another.
    Draining,
}

/// The rule by which a flow is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It has had the least service.
    Fair,
    /// It has waited longest, and is overdue.
    Aged,
}

/// The requests of one tenant for one list of adapters.
#[derive(Debug)]
struct Flow<P> {
    tenant: TenantId,
    adapters: Adapters,
    waiting: BTreeMap<Arrival, Sequence<P>>,
    /// Virtual tokens.
    service: u64,
    /// Time at which one of its requests was admitted last, or at which the first came to wait.
    since: Duration,
    /// Sequences that have been admitted and have not ended.
    users: usize,
}

impl<P> Flow<P> {
    fn keys(&self) -> Vec<AdapterKey> {
        self.adapters.keys().collect()
    }
}

#[derive(Debug)]
struct TenantState {
    tenant: Tenant,
    /// Virtual tokens times [`SERVICE_UNIT`], divided by the weight.
    service: u64,
    since: Duration,
    waiting: usize,
    users: usize,
    flows: Level,
}

/// State that the flows with one adapter share.
#[derive(Debug)]
struct AdapterState {
    residency: Residency,
    /// Its open flows.
    flows: BTreeSet<FlowId>,
    waiting: usize,
}

/// All flows with waiting or admitted requests, and those whose service still counts against them.
#[derive(Debug)]
pub(crate) struct Flows<P> {
    flows: Vec<Flow<P>>,
    /// Indices of closed entries of `flows`.
    closed_flows: Vec<FlowId>,
    tenants: Vec<TenantState>,
    closed_tenants: Vec<TenantId>,
    level: Level,
    /// Tenants with no admitted sequence and a request that can be admitted.
    newcomers: Order,
    aging: Aging,
    /// Flows with waiting requests by how long they have waited, those that can be admitted and those that need a slot.
    longest_ready: BTreeSet<(Duration, FlowId)>,
    longest_absent: BTreeSet<(Duration, FlowId)>,
    /// Adapters that need a slot, with the number of flows that are listed as waiting for it. Only counted, never
    /// iterated.
    absent: HashMap<AdapterKey, usize>,
    /// Waiting requests, with the times of their submission.
    submitted: BTreeMap<Arrival, Duration>,
    /// The maps by key are looked up only, never iterated, so that plans do not depend on their order.
    by_keys: HashMap<(TenantId, Vec<AdapterKey>), FlowId>,
    tenants_by_id: HashMap<u64, TenantId>,
    adapters: HashMap<AdapterKey, AdapterState>,
}

impl<P> Flows<P> {
    pub(crate) fn new() -> Self {
        Self {
            flows: Vec::new(),
            closed_flows: Vec::new(),
            tenants: Vec::new(),
            closed_tenants: Vec::new(),
            level: Level::default(),
            newcomers: Order::default(),
            aging: Aging::default(),
            longest_ready: BTreeSet::new(),
            longest_absent: BTreeSet::new(),
            absent: HashMap::new(),
            submitted: BTreeMap::new(),
            by_keys: HashMap::new(),
            tenants_by_id: HashMap::new(),
            adapters: HashMap::new(),
        }
    }

    pub(crate) fn waiting(&self) -> usize {
        self.submitted.len()
    }

    /// Time at which the oldest waiting request was submitted.
    pub(crate) fn waiting_since(&self) -> Option<Duration> {
        self.submitted.first_key_value().map(|(_, &submitted)| submitted)
    }

    /// The number of adapters that need a slot for requests that could be given one.
    pub(crate) fn count_absent(&self) -> usize {
        self.absent.len()
    }

    /// Returns whether requests of the adapter wait.
    pub(crate) fn waits(&self, key: AdapterKey) -> bool {
        self.adapters.get(&key).is_some_and(|adapter| adapter.waiting > 0)
    }

    /// Returns whether requests of the adapter wait for nothing but a seat.
    pub(crate) fn can_admit(&self, key: AdapterKey) -> bool {
        self.waits_as(key, |residency| residency == Residency::Ready)
    }

    /// Returns whether requests of the adapter have all the slots that they need, for some of which loads may be under way.
    pub(crate) fn claims(&self, key: AdapterKey) -> bool {
        self.waits_as(key, |residency| matches!(residency, Residency::Ready | Residency::Loading))
    }

    fn waits_as(&self, key: AdapterKey, is: impl Fn(Residency) -> bool) -> bool {
        let Some(adapter) = self.adapters.get(&key).filter(|adapter| adapter.waiting > 0) else {
            return false;
        };
        let mut flows = adapter.flows.iter().map(|&id| self.get(id));
        flows.any(|flow| !flow.waiting.is_empty() && is(self.residency(flow)))
    }

    pub(crate) fn adapters(&self, id: FlowId) -> &Adapters {
        &self.get(id).adapters
    }

    /// Adds a sequence to its flow.
    pub(crate) fn push(&mut self, sequence: Sequence<P>, now: Duration) {
        let id = sequence.flow;
        self.unlist(id);
        let Self { flows, tenants, level, .. } = self;
        let flow = &mut flows[id as usize];
        let tenant = &mut tenants[flow.tenant as usize];
        if tenant.waiting == 0 {
            tenant.service = level.arrive(flow.tenant, tenant.service);
            tenant.since = now;
        }
        if flow.waiting.is_empty() {
            flow.service = tenant.flows.arrive(id, flow.service);
            flow.since = now;
        }
        tenant.waiting += 1;
        self.submitted.insert(sequence.arrival, sequence.submitted);
        flow.waiting.insert(sequence.arrival, sequence);
        self.count_waiting(id, |waiting| waiting + 1);
        self.list(id);
    }

    /// The flow to serve next in turn, of those with that residency and requests waiting.
    pub(crate) fn least_served(&mut self, residency: Residency) -> Option<FlowId> {
        let Self { flows, tenants, level, .. } = self;
        let tenant = level.order(residency)?.least_served(|id| tenants[id as usize].service)?;
        let order = tenants[tenant as usize].flows.order(residency)?;
        order.least_served(|id| flows[id as usize].service)
    }

    /// The flow to serve next of a tenant that has no admitted sequence: of the `nth` such tenant, the least served first.
    pub(crate) fn newcomer(&mut self, nth: usize) -> Option<FlowId> {
        let Self { flows, tenants, newcomers, .. } = self;
        // Nothing is charged to them, so what is recorded of them is true.
        let tenant = newcomers.nth(nth)?;
        let order = tenants[tenant as usize].flows.order(Residency::Ready)?;
        order.least_served(|id| flows[id as usize].service)
    }

    /// Returns whether the flow's tenant has no admitted sequence, and none of its requests has its adapter in a slot.
    pub(crate) fn needs_first_slot(&mut self, id: FlowId) -> bool {
        let Self { flows, tenants, .. } = self;
        let tenant = &mut tenants[flows[id as usize].tenant as usize];
        if tenant.users > 0 {
            return false;
        }
        let absent = tenant.flows.order(Residency::Absent).into_iter().flat_map(|order| order.ids());
        let absent: usize = absent.map(|flow| flows[flow as usize].waiting.len()).sum();
        tenant.waiting == absent
    }

    /// The flow that may be admitted out of turn now.
    pub(crate) fn overdue_ready(&self, now: Duration) -> Option<FlowId> {
        let &(since, id) = self.longest_ready.first()?;
        (self.aging.may_admit() && now.saturating_sub(since) >= OVERDUE).then_some(id)
    }

    /// The flow that may get a slot out of turn now, of those that have waited for so long.
    pub(crate) fn overdue_absent(&self, now: Duration, overdue: Duration) -> Option<FlowId> {
        let &(since, id) = self.longest_absent.first()?;
        (self.aging.may_load() && now.saturating_sub(since) >= overdue).then_some(id)
    }

    /// Whether each tenant that waits for an adapter has so many admitted sequences.
    pub(crate) fn tenants_run(&self, key: AdapterKey, sequences: usize) -> bool {
        let flows = self.adapters.get(&key).into_iter().flat_map(|adapter| &adapter.flows);
        let mut waiting = flows.map(|&id| self.get(id)).filter(|flow| !flow.waiting.is_empty());
        waiting.all(|flow| self.tenant(flow.tenant).users >= sequences)
    }

    /// The readiness of an adapter to give its slot to a flow; none if it does not.
    ///
    /// In turn, it gives it if all its flows have had more service than that one; the more they have had, the sooner.
    /// Out of turn, it gives it if its own requests came to wait later; the later, the sooner. In both cases whoever
    /// gives a slot gets none in return, so a slot does not go back and forth.
    pub(crate) fn yields(&self, key: AdapterKey, to: FlowId, turn: Turn) -> Option<(Duration, (u64, u64))> {
        let owners = self.adapters.get(&key).into_iter().flat_map(|adapter| &adapter.flows);
        // A flow that nobody remembers had no more than the others.
        let (mut service, mut since) = (None, Duration::MAX);
        for &id in owners {
            let flow = self.get(id);
            if !flow.waiting.is_empty() {
                since = since.min(flow.since);
            }
            let own = self.services(id);
            service = Some(service.map_or(own, |service| own.min(service)));
            let keeps = match turn {
                Turn::Fair => own <= self.services(to),
                Turn::Aged => since <= self.get(to).since,
            };
            if keeps {
                return None;
            }
        }
        let service = service.unwrap_or_default();
        match turn {
            Turn::Fair => (service > self.services(to)).then_some((Duration::ZERO, service)),
            Turn::Aged => Some((since, service)),
        }
    }

    /// Service of a flow's tenant, and its own: of two flows, the one for which this is less is next.
    fn services(&self, id: FlowId) -> (u64, u64) {
        let flow = self.get(id);
        (self.tenant(flow.tenant).service, flow.service)
    }

    /// The request that a flow would give next.
    pub(crate) fn peek(&self, id: FlowId) -> Option<&Sequence<P>> {
        self.get(id).waiting.values().next()
    }

    /// Takes the request that `peek` shows, because it is admitted.
    pub(crate) fn pop(&mut self, id: FlowId, now: Duration) -> Option<Sequence<P>> {
        self.unlist(id);
        let Self { flows, tenants, level, .. } = self;
        let flow = &mut flows[id as usize];
        let tenant = &mut tenants[flow.tenant as usize];
        let (arrival, sequence) = flow.waiting.pop_first()?;
        (flow.since, tenant.since) = (now, now);
        flow.users += 1;
        tenant.users += 1;
        tenant.flows.admit(flow.service);
        level.admit(tenant.service);
        self.forget_waiting(id, arrival);
        self.list(id);
        self.close_settled(id);
        Some(sequence)
    }

    /// Takes a request from the middle of its flow.
    pub(crate) fn remove(&mut self, id: FlowId, arrival: Arrival) -> Option<Sequence<P>> {
        if !self.get(id).waiting.contains_key(&arrival) {
            return None;
        }
        self.unlist(id);
        let sequence = self.get_mut(id).waiting.remove(&arrival);
        self.forget_waiting(id, arrival);
        self.list(id);
        self.close_settled(id);
        self.close_if_idle(id);
        sequence
    }

    /// Takes all waiting requests of an adapter, oldest first.
    pub(crate) fn remove_all(&mut self, key: AdapterKey) -> Vec<Sequence<P>> {
        let Some(adapter) = self.adapters.get(&key) else { return Vec::new() };
        let arrivals = |&id: &FlowId| self.get(id).waiting.keys().map(move |&arrival| (arrival, id));
        let mut waiting: Vec<_> = adapter.flows.iter().flat_map(arrivals).collect();
        waiting.sort_unstable();
        waiting.into_iter().filter_map(|(arrival, id)| self.remove(id, arrival)).collect()
    }

    /// An admitted sequence has ended. `refund` is what it did not use of an admission out of turn.
    pub(crate) fn leave(&mut self, id: FlowId, refund: u64) {
        self.aging.refund(refund);
        let flow = &mut self.flows[id as usize];
        let tenant = flow.tenant;
        flow.users -= 1;
        self.tenants[tenant as usize].users -= 1;
        self.list_tenant(tenant);
        self.close_settled(id);
        self.close_if_idle(id);
    }

    /// Counts work done for a flow, in virtual tokens.
    pub(crate) fn charge(&mut self, id: FlowId, tokens: u64) {
        let Self { flows, tenants, level, aging, .. } = self;
        let flow = &mut flows[id as usize];
        let tenant = &mut tenants[flow.tenant as usize];
        flow.service += tokens;
        tenant.flows.charge(flow.service);
        tenant.service += tokens * SERVICE_UNIT / u64::from(tenant.tenant.weight);
        level.charge(tenant.service);
        aging.serve(tokens);
    }

    /// A request was admitted out of turn that can cost so many virtual tokens.
    pub(crate) fn admit_aged(&mut self, cost: u64) {
        self.aging.admit(cost);
    }

    /// An adapter got a slot for one of its flows.
    pub(crate) fn count_load(&mut self, turn: Turn) {
        self.aging.load(turn == Turn::Aged);
    }

    pub(crate) fn tenant_of(&self, id: FlowId) -> TenantId {
        self.get(id).tenant
    }

    pub(crate) fn weight(&self, id: TenantId) -> u64 {
        self.tenant(id).tenant.weight.into()
    }

    /// The service that a tenant has had, relative to its weight.
    pub(crate) fn tenant_service(&self, id: TenantId) -> u64 {
        self.tenant(id).service
    }

    fn get(&self, id: FlowId) -> &Flow<P> {
        &self.flows[id as usize]
    }

    fn get_mut(&mut self, id: FlowId) -> &mut Flow<P> {
        &mut self.flows[id as usize]
    }

    fn tenant(&self, id: TenantId) -> &TenantState {
        &self.tenants[id as usize]
    }

    fn residency(&self, flow: &Flow<P>) -> Residency {
        let adapters = flow.adapters.keys().filter_map(|key| self.adapters.get(&key));
        adapters.map(|adapter| adapter.residency).max().unwrap_or(Residency::Ready)
    }

    /// The waiting requests.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Sequence<P>> {
        self.flows.iter().flat_map(|flow| flow.waiting.values())
    }
}
