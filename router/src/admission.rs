//! Admission: which requests get the permits of `--max-concurrent-requests`, and whose are shed when there are none.
//!
//! A permit is one sequence. A flow is what one tenant asks of one adapter. While permits are free everybody gets
//! them; when there are none, the newcomer gets those of somebody who has more than his share:
//!
//! 1. of the tenant that is furthest above its share, where shares are by weight among the tenants that hold permits;
//! 2. of its longest flow;
//! 3. of the youngest request in it whose answer has not begun. An answer that has begun is never shed.
//!
//! The newcomer is counted first, so that it is refused itself if it would be the one to be shed. A tenant within its
//! share loses nothing to other tenants.
//!
//! This is a state machine without clock, locks or input: time is an argument, and whom to shed is a result.

mod rates;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::Duration,
};

use crate::principal::{Tenant, TenantId};
use rates::{Bucket, Pace};

/// An admitted request. Later ones have larger numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdmissionId(u64);

/// The permits that a request asks for.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The tenant that asks.
    pub tenant: &'a Tenant,
    /// The adapter, as the request names it.
    pub adapter: Option<&'a str>,
    /// Its sequences: it gets a permit for each, or none.
    pub sequences: usize,
}

/// The result of letting a request in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    /// Its number.
    pub id: AdmissionId,
    /// Requests that lost their permits to it, and when each may try again.
    pub shed: Vec<(AdmissionId, Duration)>,
}

/// The reason that a request was not let in, and when it may try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// All permits are taken, and nobody else has to give way.
    #[error("all permits are taken")]
    Full {
        /// An estimate.
        retry_after: Duration,
    },
    /// The tenant has as many sequences as it may have.
    #[error("the tenant's limit of {limit} concurrent requests is reached")]
    Concurrent {
        /// The limit.
        limit: usize,
        /// An estimate.
        retry_after: Duration,
    },
    /// The tenant has begun as many requests as it may in a minute.
    #[error("the tenant's limit of {limit} requests per minute is reached")]
    Requests {
        /// The limit.
        limit: u32,
        /// Time until the next may begin.
        retry_after: Duration,
    },
    /// The tenant has used as many tokens as it may in a minute.
    #[error("the tenant's limit of {limit} tokens per minute is reached")]
    Tokens {
        /// The limit.
        limit: u32,
        /// Time until it has tokens again.
        retry_after: Duration,
    },
}

impl Refusal {
    /// Time until a new attempt may succeed.
    pub fn retry_after(&self) -> Duration {
        match self {
            Refusal::Full { retry_after }
            | Refusal::Concurrent { retry_after, .. }
            | Refusal::Requests { retry_after, .. }
            | Refusal::Tokens { retry_after, .. } => *retry_after,
        }
    }
}

type Adapter = Option<String>;

/// A request that holds permits.
struct Entry {
    tenant: TenantId,
    adapter: Adapter,
    permits: usize,
}

#[derive(Default)]
struct FlowState {
    held: usize,
    /// Requests whose answers have not begun, the youngest last.
    waiting: BTreeSet<AdmissionId>,
}

#[derive(Default)]
struct TenantState {
    weight: u64,
    held: usize,
    flows: HashMap<Adapter, FlowState>,
    requests: Bucket,
    tokens: Bucket,
}

impl TenantState {
    /// Returns whether nothing is lost when the tenant is forgotten.
    fn is_idle(&self) -> bool {
        self.held == 0 && self.requests.is_unused() && self.tokens.is_unused()
    }
}

/// The permits and who holds them.
pub struct Admission {
    bound: usize,
    held: usize,
    next: u64,
    entries: HashMap<AdmissionId, Entry>,
    tenants: HashMap<TenantId, TenantState>,
    pace: Pace,
}

impl Admission {
    /// Admission to so many permits.
    pub fn new(bound: usize) -> Admission {
        Admission {
            bound,
            held: 0,
            next: 0,
            entries: HashMap::new(),
            tenants: HashMap::new(),
            pace: Pace::default(),
        }
    }

    /// Permits that are held.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Returns an error if a request would not be let in.
    pub fn check(&mut self, asked: Asked, now: Duration) -> Result<(), Refusal> {
        let checked = self.victims(asked, now);
        self.forget_if_idle(asked.tenant.id);
        checked.map(drop)
    }

    /// Lets a request in, if need be at the cost of others, or refuses it and changes nothing.
    pub fn admit(&mut self, asked: Asked, now: Duration) -> Result<Admitted, Refusal> {
        let victims = self.victims(asked, now).inspect_err(|_| self.forget_if_idle(asked.tenant.id))?;
        let shed = victims.into_iter().map(|id| (id, self.shed(id))).collect();
        let id = AdmissionId(self.next);
        self.next += 1;
        let adapter = asked.adapter.map(str::to_owned);
        let tenant = self.tenants.entry(asked.tenant.id).or_default();
        tenant.weight = u64::from(asked.tenant.weight);
        tenant.requests.take(asked.tenant.limits.requests_per_minute, 1.0, now);
        tenant.held += asked.sequences;
        let flow = tenant.flows.entry(adapter.clone()).or_default();
        flow.held += asked.sequences;
        flow.waiting.insert(id);
        self.held += asked.sequences;
        self.entries.insert(id, Entry { tenant: asked.tenant.id, adapter, permits: asked.sequences });
        Ok(Admitted { id, shed })
    }

    /// The answer begins now: from here on the request cannot be shed. False if it has begun, ended or been shed
    /// before.
    pub fn begin(&mut self, id: AdmissionId) -> bool {
        let Some(Entry { tenant, adapter, .. }) = self.entries.get(&id) else { return false };
        let flow = self.tenants.get_mut(tenant).and_then(|tenant| tenant.flows.get_mut(adapter));
        flow.is_some_and(|flow| flow.waiting.remove(&id))
    }

    /// One of the request's sequences has ended. Returns whether it was the last. Nothing happens if the request was
    /// shed.
    pub fn release(&mut self, id: AdmissionId, now: Duration) -> bool {
        let Some(entry) = self.entries.get_mut(&id) else { return false };
        entry.permits -= 1;
        self.pace.released(now);
        let (tenant, adapter, ended) = (entry.tenant, entry.adapter.clone(), entry.permits == 0);
        if ended {
            self.entries.remove(&id);
        }
        self.give_back(id, tenant, &adapter, (1, ended));
        ended
    }

    /// Counts tokens against the tenant's limit, after they were used: a tenant may go beyond it once, and waits
    /// longer then.
    pub fn charge(&mut self, tenant: &Tenant, tokens: usize, now: Duration) {
        if let Some(limit) = tenant.limits.tokens_per_minute {
            // The last tokens of an answer may come after its permit has gone back.
            let state = self.tenants.entry(tenant.id).or_default();
            state.weight = u64::from(tenant.weight);
            state.tokens.take(Some(limit), tokens as f64, now);
        }
    }

    /// The requests that would be shed to let a request in.
    fn victims(&mut self, asked: Asked, now: Duration) -> Result<Vec<AdmissionId>, Refusal> {
        let tenant = self.tenants.entry(asked.tenant.id).or_default();
        tenant.weight = u64::from(asked.tenant.weight);
        self.check_limits(asked, now)?;
        self.make_room(asked)
    }

    fn check_limits(&mut self, asked: Asked, now: Duration) -> Result<(), Refusal> {
        let (pace, limits) = (self.pace, asked.tenant.limits);
        let Some(tenant) = self.tenants.get_mut(&asked.tenant.id) else { return Ok(()) };
        if let Some(limit) = limits.max_concurrent_requests
            && tenant.held + asked.sequences > limit
        {
            return Err(Refusal::Concurrent { limit, retry_after: pace.estimate(asked.sequences) });
        }
        if let Some(limit) = limits.requests_per_minute {
            let retry_after = tenant.requests.ready_in(limit, now);
            if retry_after > Duration::ZERO {
                return Err(Refusal::Requests { limit, retry_after });
            }
        }
        if let Some(limit) = limits.tokens_per_minute {
            let retry_after = tenant.tokens.ready_in(limit, now);
            if retry_after > Duration::ZERO {
                return Err(Refusal::Tokens { limit, retry_after });
            }
        }
        Ok(())
    }

    /// The requests to shed for a newcomer; none while permits are free.
    fn make_room(&self, asked: Asked) -> Result<Vec<AdmissionId>, Refusal> {
        let mut room = Room::new(self, asked);
        let mut missing = (self.held + asked.sequences).saturating_sub(self.bound);
        while missing > 0 {
            let Some(freed) = room.shed_one() else {
                let flow = self.tenants.get(&asked.tenant.id);
                let flow = flow.and_then(|tenant| tenant.flows.get(&asked.adapter.map(str::to_owned)));
                let ahead = flow.map_or(0, |flow| flow.held) + asked.sequences;
                return Err(Refusal::Full { retry_after: self.pace.estimate(ahead) });
            };
            missing = missing.saturating_sub(freed);
        }
        Ok(room.victims)
    }

    /// Takes all permits of a request, and estimates when it may come again.
    fn shed(&mut self, id: AdmissionId) -> Duration {
        let Some(entry) = self.entries.remove(&id) else { return Duration::ZERO };
        let flow = self.tenants.get(&entry.tenant).and_then(|tenant| tenant.flows.get(&entry.adapter));
        let ahead = flow.map_or(0, |flow| flow.held);
        self.give_back(id, entry.tenant, &entry.adapter, (entry.permits, true));
        self.pace.estimate(ahead)
    }

    fn give_back(
        &mut self,
        id: AdmissionId,
        tenant: TenantId,
        adapter: &Adapter,
        (permits, ended): (usize, bool),
    ) {
        self.held -= permits;
        let Some(state) = self.tenants.get_mut(&tenant) else { return };
        state.held -= permits;
        if let Some(flow) = state.flows.get_mut(adapter) {
            flow.held -= permits;
            if ended {
                flow.waiting.remove(&id);
            }
            if flow.held == 0 {
                state.flows.remove(adapter);
            }
        }
        self.forget_if_idle(tenant);
    }

    fn forget_if_idle(&mut self, tenant: TenantId) {
        if self.tenants.get(&tenant).is_some_and(TenantState::is_idle) {
            self.tenants.remove(&tenant);
        }
    }
}

/// The search for requests to shed, which counts as gone what it has found so far.
struct Room<'a> {
    admission: &'a Admission,
    asked: Asked<'a>,
    /// Weights of all tenants that hold permits, the newcomer's among them.
    weights: u64,
    victims: Vec<AdmissionId>,
    gone: HashSet<AdmissionId>,
    gone_of_tenants: HashMap<TenantId, usize>,
    gone_of_flows: HashMap<(TenantId, &'a Adapter), usize>,
}

impl<'a> Room<'a> {
    fn new(admission: &'a Admission, asked: Asked<'a>) -> Room<'a> {
        let holds = |(id, state): &(&TenantId, &TenantState)| state.held > 0 || **id == asked.tenant.id;
        Room {
            admission,
            asked,
            weights: admission.tenants.iter().filter(holds).map(|(_, state)| state.weight).sum(),
            victims: Vec::new(),
            gone: HashSet::new(),
            gone_of_tenants: HashMap::new(),
            gone_of_flows: HashMap::new(),
        }
    }

    /// Permits of a tenant, with the newcomer's.
    fn held(&self, id: TenantId, state: &TenantState) -> u128 {
        let gone = self.gone_of_tenants.get(&id).copied().unwrap_or(0);
        let new = if id == self.asked.tenant.id { self.asked.sequences } else { 0 };
        (state.held - gone + new) as u128
    }

    /// Finds one more request, and returns how many permits it has.
    fn shed_one(&mut self) -> Option<usize> {
        let newcomer = self.asked.tenant.id;
        let own = self.admission.tenants.get(&newcomer)?;
        let (own_held, own_weight) = (self.held(newcomer, own), u128::from(own.weight));
        let mut tenants: Vec<_> = self
            .admission
            .tenants
            .iter()
            .map(|(id, state)| (*id, state, self.held(*id, state)))
            .filter(|(id, state, held)| {
                let weight = u128::from(state.weight);
                let above_share = held * u128::from(self.weights) > self.admission.bound as u128 * weight;
                *id == newcomer || above_share && held * own_weight > own_held * weight
            })
            .collect();
        // The furthest above its share first; of equal ones the same each time.
        tenants.sort_by(|(a_id, a, a_held), (b_id, b, b_held)| {
            let (a_scaled, b_scaled) = (a_held * u128::from(b.weight), b_held * u128::from(a.weight));
            b_scaled.cmp(&a_scaled).then(a_id.cmp(b_id))
        });
        let (tenant, adapter, victim) =
            tenants.into_iter().find_map(|(id, state, _)| self.youngest_of_longest(id, state))?;
        let permits = self.admission.entries.get(&victim)?.permits;
        self.victims.push(victim);
        self.gone.insert(victim);
        *self.gone_of_tenants.entry(tenant).or_default() += permits;
        *self.gone_of_flows.entry((tenant, adapter)).or_default() += permits;
        Some(permits)
    }

    fn youngest_of_longest(
        &self,
        id: TenantId,
        state: &'a TenantState,
    ) -> Option<(TenantId, &'a Adapter, AdmissionId)> {
        let length = |adapter: &'a Adapter, flow: &FlowState| {
            flow.held - self.gone_of_flows.get(&(id, adapter)).copied().unwrap_or(0)
        };
        // Flows of the newcomer's own tenant give way only if they are longer than the newcomer's flow.
        let own = self.asked.adapter.map(str::to_owned);
        let at_least = if id == self.asked.tenant.id {
            let own = state.flows.get_key_value(&own).map_or(0, |(adapter, flow)| length(adapter, flow));
            own + self.asked.sequences + 1
        } else {
            1
        };
        let flows = state.flows.iter().map(|(adapter, flow)| (length(adapter, flow), adapter, flow));
        let longest_first =
            flows.filter(|(length, ..)| *length >= at_least).filter_map(|(length, adapter, flow)| {
                let youngest = flow.waiting.iter().rev().find(|id| !self.gone.contains(id))?;
                Some((length, adapter, *youngest))
            });
        let (_, adapter, victim) = longest_first.max_by_key(|(length, _, youngest)| (*length, *youngest))?;
        Some((id, adapter, victim))
    }
}
