//! Calls that are running, and how many more may.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use crate::{
    CallId, Limits, SourceId,
    flights::{Kind, Target},
    limits::Budget,
};

/// A call that has been told and not been answered.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) target: Target,
    pub(crate) tenant: u64,
    pub(crate) source: SourceId,
    /// Bytes of room that are reserved for it.
    pub(crate) reserved: u64,
    pub(crate) slow_at: Duration,
    pub(crate) deadline: Duration,
    /// Whether it counts against the slow ones.
    pub(crate) slow: bool,
    /// Whether its flight goes on without it.
    pub(crate) aborted: bool,
    /// Whether it is about an adapter that is read where it lies.
    pub(crate) in_place: bool,
}

/// Calls of one kind at one source, of all tenants or of one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Count {
    quick: u32,
    slow: u32,
}

impl Count {
    fn of(&mut self, slow: bool) -> &mut u32 {
        if slow { &mut self.slow } else { &mut self.quick }
    }
}

#[derive(Debug)]
pub(crate) struct Calls {
    limits: Limits,
    pub(crate) running: BTreeMap<CallId, Call>,
    /// By kind, source, and tenant; without a tenant, of all of them. Looked up only, never iterated.
    counts: HashMap<(Kind, SourceId, Option<u64>), Count>,
    /// Calls that have become slow and keep their permits, because the second pool had no room for them so far.
    late: BTreeSet<CallId>,
    /// What the aborted calls are about.
    ending: BTreeSet<Target>,
    /// Calls of a tenant by kind.
    tenants: HashMap<u64, [u32; 3]>,
    last: u64,
}

impl Calls {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            running: BTreeMap::new(),
            counts: HashMap::new(),
            late: BTreeSet::new(),
            ending: BTreeSet::new(),
            tenants: HashMap::new(),
            last: 0,
        }
    }

    pub(crate) fn budget(&self, kind: Kind) -> Budget {
        match kind {
            Kind::Lookup => self.limits.lookups,
            Kind::Fetch => self.limits.fetches,
            Kind::Stage => self.limits.stages,
        }
    }

    /// Whether a tenant may have one more call that is quick, or slow. One that has none may always have one, so that it
    /// does not wait for others, however many tenants have calls that hang.
    fn has_room(&self, kind: Kind, source: SourceId, tenant: u64, slow: bool) -> bool {
        let count = |tenant| {
            let mut count = self.counts.get(&(kind, source, tenant)).copied().unwrap_or_default();
            *count.of(slow)
        };
        let (budget, own) = (self.budget(kind), count(Some(tenant)));
        own == 0 || own < budget.tenant && count(None) < budget.source
    }

    /// Whether a call can begin.
    pub(crate) fn permits(&self, kind: Kind, source: SourceId, tenant: u64) -> bool {
        let all: u32 = self.tenants.get(&tenant).into_iter().flatten().sum();
        all < self.limits.tenant_calls && self.has_room(kind, source, tenant, false)
    }

    /// Calls of a kind that a tenant has running.
    pub(crate) fn of_tenant(&self, kind: Kind, tenant: u64) -> u32 {
        self.tenants.get(&tenant).map_or(0, |calls| calls[kind as usize])
    }

    fn count(&mut self, call: &Call, slow: bool, change: impl Fn(u32) -> u32) {
        for tenant in [None, Some(call.tenant)] {
            let key = (call.target.kind(), call.source, tenant);
            let count = self.counts.entry(key).or_default();
            *count.of(slow) = change(*count.of(slow));
            if *count == Count::default() {
                self.counts.remove(&key);
            }
        }
    }

    /// Begins a call.
    pub(crate) fn begin(&mut self, call: Call) -> CallId {
        self.last += 1;
        self.count(&call, false, |calls| calls + 1);
        self.tenants.entry(call.tenant).or_default()[call.target.kind() as usize] += 1;
        self.running.insert(CallId(self.last), call);
        CallId(self.last)
    }

    /// Lets a call that has taken long go on in the second pool, as soon as that has room.
    pub(crate) fn slow_down(&mut self, id: CallId) {
        let Some(call) = self.running.get(&id).cloned() else { return };
        if !self.has_room(call.target.kind(), call.source, call.tenant, true) {
            self.late.insert(id);
            return;
        }
        self.late.remove(&id);
        self.count(&call, false, |calls| calls - 1);
        self.count(&call, true, |calls| calls + 1);
        self.running.insert(id, Call { slow: true, ..call });
    }

    /// The call's flight goes on without it. Returns the call if that is new.
    pub(crate) fn abort(&mut self, id: CallId) -> Option<&Call> {
        let call = self.running.get_mut(&id).filter(|call| !call.aborted)?;
        call.aborted = true;
        self.ending.insert(call.target);
        Some(call)
    }

    /// Nothing is left of a call.
    pub(crate) fn end(&mut self, id: CallId) -> Option<Call> {
        let call = self.running.remove(&id)?;
        self.count(&call, call.slow, |calls| calls - 1);
        self.late.remove(&id);
        if call.aborted {
            self.ending.remove(&call.target);
        }
        if let Some(calls) = self.tenants.get_mut(&call.tenant) {
            calls[call.target.kind() as usize] -= 1;
            if *calls == [0; 3] {
                self.tenants.remove(&call.tenant);
            }
        }
        if call.slow {
            let late: Vec<_> = self.late.iter().copied().collect();
            late.into_iter().for_each(|late| self.slow_down(late));
        }
        Some(call)
    }

    /// Whether a call is ending whose flight goes on without it.
    pub(crate) fn is_ending(&self, target: Target) -> bool {
        self.ending.contains(&target)
    }

    pub(crate) fn count_running(&self) -> [usize; 3] {
        Kind::ALL.map(|kind| self.running.values().filter(|call| call.target.kind() == kind).count())
    }

    /// Panics unless calls are counted rightly and within their budgets.
    pub(crate) fn check(&self) {
        let mut counts: HashMap<_, Count> = HashMap::new();
        let mut tenants: HashMap<u64, [u32; 3]> = HashMap::new();
        for call in self.running.values() {
            let kind = call.target.kind();
            for tenant in [None, Some(call.tenant)] {
                *counts.entry((kind, call.source, tenant)).or_default().of(call.slow) += 1;
            }
            tenants.entry(call.tenant).or_default()[kind as usize] += 1;
        }
        let aborted = self.running.values().filter(|call| call.aborted).map(|call| call.target);
        assert_eq!(self.ending, aborted.collect(), "calls that are ending");
        for id in &self.late {
            let call = self.running.get(id).expect("a late call runs");
            let has_room = self.has_room(call.target.kind(), call.source, call.tenant, true);
            assert!(!call.slow && !has_room, "{id:?} keeps its permit for nothing");
        }
        assert_eq!(self.counts, counts, "calls by source");
        assert_eq!(self.tenants, tenants, "calls by tenant");
        for (&(kind, source, tenant), count) in &counts {
            let budget = self.budget(kind);
            let others =
                counts.keys().filter(|&&(k, s, tenant)| (k, s) == (kind, source) && tenant.is_some());
            let most = if tenant.is_some() { budget.tenant } else { budget.source + others.count() as u32 };
            assert!(count.quick <= most && count.slow <= most, "{count:?} {kind:?} at {source:?}");
        }
        let most = self.limits.tenant_calls;
        assert!(tenants.values().all(|calls| calls.iter().sum::<u32>() <= most), "calls of a tenant");
    }
}
