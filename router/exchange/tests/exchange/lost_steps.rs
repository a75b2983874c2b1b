//! The exchange and the scheduler together, step by step: no step of a running stream, and none of a request whose source
//! is well, is lost to the adapters of others.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use exchange::{
    Ask, AskId, CallId, Content, CredentialId, Exchange, Fault, Fetched, Found, Input, Limits, Output,
    ReferenceId, Slot, SourceId, StageFault, Staged, Tenant, Tier, Version,
};
use scheduler::{
    Adapter, AdapterKey, CacheSalt, Event, Request, RequestId, RopeScaling, Sampled, Scheduler, StepPlan,
};

use crate::world::{ms, secs};

/// The time of a step, of a copy into a slot, and of a call to a source that is well.
const STEP: Duration = ms(10);
const CALL: Duration = ms(40);

/// Bytes of an adapter that is well.
const BYTES: u64 = 100;

/// Adapters from here on have the sicknesses, in their order, over and over.
const SICK: u64 = 10_000;

/// The fault of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sickness {
    /// It never answers.
    Hangs,
    /// What it has is no adapter, which the ranks find out.
    Corrupt,
    /// It answers 403.
    Refuses,
    /// It has twenty times as many bytes as the largest adapter may have.
    Huge,
    /// It sends a byte a second.
    Drips,
}

const SICKNESSES: [Sickness; 5] =
    [Sickness::Hangs, Sickness::Corrupt, Sickness::Refuses, Sickness::Huge, Sickness::Drips];

fn sickness(adapter: u64) -> Option<Sickness> {
    adapter.checked_sub(SICK).map(|number| SICKNESSES[number as usize % SICKNESSES.len()])
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Lookup,
    Fetch,
    Stage,
}

#[derive(Debug, Clone, Copy)]
struct Call {
    kind: Kind,
    adapter: u64,
    begun: Duration,
    aborted: bool,
}

/// A server: requests ask for their adapters, and are given to the scheduler with their leases.
struct Server {
    exchange: Exchange<u64>,
    scheduler: Scheduler<()>,
    now: Duration,
    calls: BTreeMap<CallId, Call>,
    /// Requests that have not ended, with their adapters and the tokens of their answers.
    open: BTreeMap<u64, (u64, u32)>,
    failed: BTreeMap<u64, Fault>,
    /// In the order of their ends.
    ended: Vec<u64>,
    slots: BTreeMap<u32, AdapterKey>,
    loading: Vec<(u32, AdapterKey)>,
    in_flight: VecDeque<StepPlan<()>>,
    /// The requests that have rows in each step.
    steps: Vec<BTreeSet<u64>>,
}

impl Server {
    fn new(slots: u32, limits: Limits) -> Self {
        let shard = scheduler::Limits {
            num_blocks: 10_000,
            block_size: 16,
            num_slots: slots,
            adapter_bytes: 0,
            adapter_cycle_time: secs(2),
            max_rows: 512,
            max_sequences: 64,
            max_logit_rows: 512,
            max_added_tokens: 1 << 20,
            max_prefill_rows: None,
            prefix_caching: false,
            kv_window: 0,
            rope: RopeScaling::Fixed,
            bidirectional: false,
        };
        let mut server = Self {
            exchange: Exchange::new(limits),
            scheduler: Scheduler::new(shard, &[]),
            now: Duration::ZERO,
            calls: BTreeMap::new(),
            open: BTreeMap::new(),
            failed: BTreeMap::new(),
            ended: Vec::new(),
            slots: BTreeMap::new(),
            loading: Vec::new(),
            in_flight: VecDeque::new(),
            steps: Vec::new(),
        };
        server.give(Input::Attached { host: Vec::new() });
        server
    }

    /// A request of a tenant for an adapter of a source, with an answer of so many tokens. 0 is the base model.
    fn request(&mut self, id: u64, (tenant, source): (u64, u64), adapter: u64, answer: u32) {
        self.open.insert(id, (adapter, answer));
        if adapter == 0 {
            return self.submit(id, tenant, None);
        }
        self.give(Input::Ask(Ask {
            id: AskId(id),
            tenant: Tenant { id: tenant, weight: 1 },
            source: SourceId(source),
            reference: ReferenceId(adapter.into()),
            credential: CredentialId(0),
            tier: Tier::Host,
            pin: false,
            deadline: self.now + secs(30),
            payload: adapter,
        }));
    }

    fn submit(&mut self, id: u64, tenant: u64, adapter: Option<Adapter>) {
        let request = Request {
            id: RequestId(id),
            tenant: scheduler::Tenant { id: tenant, weight: 1 },
            adapters: adapter.into(),
            adapters_from: 0,
            salt: CacheSalt::default(),
            prompt: (0..8).collect(),
            max_new_tokens: self.open[&id].1,
            stop_ids: Arc::new([]),
            prompt_logprobs: false,
            group: None,
            hidden_states: false,
            payload: (),
        };
        self.scheduler.submit(request, self.now).unwrap();
    }

    fn give(&mut self, input: Input<u64>) {
        for output in self.exchange.handle(input, self.now) {
            self.follow(output);
        }
    }

    fn follow(&mut self, output: Output<u64>) {
        let (call, kind, adapter) = match output {
            Output::Lookup { call, payload } => (call, Kind::Lookup, payload),
            Output::Fetch { call, payload, .. } => (call, Kind::Fetch, payload),
            Output::Stage { call, payload, .. } => (call, Kind::Stage, payload),
            Output::Abort(call) => return self.calls.get_mut(&call).unwrap().aborted = true,
            Output::Delete(content) => return self.give(Input::Deleted(content)),
            Output::Unstage(content) => return self.give(Input::Unstaged(content)),
            Output::Ready { ask, content, slot_bytes, .. } => {
                // All healthy requests are of tenant 0.
                return self.submit(
                    ask.0,
                    0,
                    Some(Adapter { key: AdapterKey(content.0), bytes: slot_bytes }),
                );
            }
            Output::Failed { ask, fault } => {
                self.open.remove(&ask.0);
                self.failed.insert(ask.0, fault);
                return;
            }
        };
        self.calls.insert(call, Call { kind, adapter, begun: self.now, aborted: false });
    }

    fn answer(&mut self, id: CallId, call: Call) {
        let Call { kind, adapter, aborted, .. } = call;
        let sick = sickness(adapter);
        let is_due = self.now >= call.begun + CALL;
        match (sick, kind) {
            _ if aborted => {}
            (Some(Sickness::Hangs), _) => return,
            (Some(Sickness::Drips), Kind::Fetch) => {
                let bytes = (self.now - call.begun).as_secs();
                return self.give(Input::Progress { call: id, bytes });
            }
            _ if !is_due => return,
            _ => {}
        }
        self.calls.remove(&id);
        let denied = matches!(sick, Some(Sickness::Refuses)).then(|| Fault::Denied("403".into()));
        let fault = aborted.then_some(Fault::Slow).or(denied);
        let bytes = if sick == Some(Sickness::Huge) { 20 * 10 * BYTES } else { BYTES };
        self.give(match kind {
            Kind::Lookup => {
                let found =
                    Found { version: Version(name(adapter)), bytes, in_place: false, fresh_for: secs(60) };
                Input::LookedUp { call: id, result: fault.map_or(Ok(found), Err) }
            }
            Kind::Fetch => {
                let fetched = Fetched { content: Content(name(adapter)), bytes };
                Input::Fetched { call: id, result: fault.map_or(Ok(fetched), Err) }
            }
            Kind::Stage => {
                let corrupt = (sick == Some(Sickness::Corrupt)).then(|| Fault::Invalid("no adapter".into()));
                let staged = Staged { host_bytes: bytes, slot_bytes: bytes };
                let result = fault.or(corrupt).map_or(Ok(staged), |fault| Err(StageFault::Failed(fault)));
                Input::Staged { call: id, result }
            }
        });
    }

    /// Lets the time of a step pass: calls are answered, copies end, the oldest step ends, and the next one is planned.
    fn step(&mut self) {
        self.now += STEP;
        self.give(Input::Tick);
        let calls: Vec<_> = self.calls.iter().map(|(&id, &call)| (id, call)).collect();
        calls.into_iter().for_each(|(id, call)| self.answer(id, call));
        for (slot, key) in std::mem::take(&mut self.loading) {
            self.scheduler.slot_ready(slot, key);
            self.give(Input::Slot { content: Content(key.0), slot: Slot::Ready });
        }
        if let Some(plan) = self.in_flight.pop_front() {
            self.complete(&plan);
        }
        while let Some(plan) = self.scheduler.next_step(self.now) {
            for key in plan.unload.iter().filter_map(|slot| self.slots.remove(slot)).collect::<Vec<_>>() {
                self.give(Input::Slot { content: Content(key.0), slot: Slot::Empty });
            }
            for &(slot, key) in &plan.load {
                self.slots.insert(slot, key);
                self.loading.push((slot, key));
                self.give(Input::Slot { content: Content(key.0), slot: Slot::Loading });
            }
            self.steps.push(plan.rows.iter().map(|rows| rows.id.0).collect());
            self.in_flight.push_back(plan);
        }
    }

    fn complete(&mut self, plan: &StepPlan<()>) {
        let sampled = plan.rows.iter().filter(|rows| rows.sample);
        let sampled: Vec<_> = sampled.map(|rows| Sampled { id: rows.id, token: 1 }).collect();
        for event in self.scheduler.complete(plan.id, &sampled, &[]) {
            match event {
                Event::Started { id, .. } => self.give(Input::Release(AskId(id.0))),
                Event::Token { id, finish: Some(_), .. } => {
                    self.open.remove(&id.0);
                    self.ended.push(id.0);
                }
                Event::Token { .. } | Event::Scored { .. } => {}
                Event::Failed { id, .. } => panic!("{id:?} fails"),
            }
        }
    }
}

/// The version and the content of an adapter.
fn name(adapter: u64) -> [u8; 32] {
    let mut name = [0; 32];
    name[..8].copy_from_slice(&adapter.to_le_bytes());
    name
}

fn limits(host: u64) -> Limits {
    Limits {
        disk_bytes: 4_000 * BYTES,
        host_bytes: host * BYTES,
        adapter_bytes: 10 * BYTES,
        ..Limits::default()
    }
}

#[test]
fn a_stream_that_runs_throughout_loses_no_step_to_two_thousand_adapters() {
    const STREAM: u64 = 1 << 40;
    // The stream's adapter, clients, and the tokens of their answers.
    for (adapter, clients, answer) in
        [(0, 16, 4), (0, 48, 4), (3_000, 16, 4), (3_000, 48, 16), (3_000, 63, 1)]
    {
        let mut server = Server::new(32, limits(256));
        server.request(STREAM, (0, 0), adapter, 1 << 17);
        while !server.steps.last().is_some_and(|step| step.contains(&STREAM)) {
            server.step();
        }
        let (begun, at) = (server.steps.len(), server.now);
        let mut next = 0;
        while server.ended.len() < 2_000 {
            while server.open.len() <= clients && next < 2_000 {
                server.request(next, (0, 0), 1 + next, answer);
                next += 1;
            }
            server.step();
            assert!(server.now < secs(3_000), "{} of {next} requests have ended", server.ended.len());
        }
        let case = format!("adapter {adapter}, {clients} clients, answers of {answer}");
        assert!(server.failed.is_empty(), "{case}: {:?}", server.failed);
        let lost: Vec<_> =
            (begun..server.steps.len()).filter(|&step| !server.steps[step].contains(&STREAM)).collect();
        assert_eq!(lost, [0; 0], "{case}: of {} steps", server.steps.len());
        // A step ends in each turn, so that none of its tokens comes late either.
        let turns = (server.now - at).as_millis() / STEP.as_millis();
        assert!((server.steps.len() - begun) as u128 >= turns, "{case}: {turns} turns");
        server.exchange.check();
        server.scheduler.check();
    }
}

/// The steps of thirty clients with an adapter each, for 40 s, while others ask for sick adapters again and again.
fn healthy_steps(slots: u32, sick: &[u64], (tenant, source): (u64, u64)) -> Vec<BTreeSet<u64>> {
    const CLIENTS: u64 = 30;
    let mut server = Server::new(slots, limits(256));
    let (mut next, mut asked) = (0, 1 << 40);
    let mut of_clients: Vec<Option<u64>> = vec![None; CLIENTS as usize];
    for step in 0..4_000_u64 {
        for (client, running) in (0..).zip(&mut of_clients) {
            if running.is_none_or(|id| !server.open.contains_key(&id)) {
                // A new adapter now and then, which nobody has.
                let adapter = if next % 50 == 49 { 100 + next } else { 1 + client };
                server.request(next, (0, 0), adapter, 5 + (next % 7) as u32);
                (*running, next) = (Some(next), next + 1);
            }
        }
        if step >= 100 && step.is_multiple_of(5) {
            for &adapter in sick {
                server.request(asked, (tenant, source), adapter, 1);
                asked += 1;
            }
        }
        server.step();
    }
    let of_healthy = server.failed.keys().filter(|id| **id < 1 << 40).count();
    assert_eq!(of_healthy, 0, "{:?}", server.failed);
    assert!(server.failed.len() as u64 >= sick.len() as u64, "the sick ones fail");
    assert!(server.ended.iter().all(|id| *id < 1 << 40), "and none of them is served");
    assert!(next > 3_000, "{next} requests");
    server.exchange.check();
    server.steps
}

#[test]
fn healthy_requests_lose_exactly_no_step_to_broken_sources() {
    for slots in [16, 32] {
        let alone = healthy_steps(slots, &[], (0, 0));
        let all: Vec<u64> = (SICK..SICK + 5).collect();
        let many: Vec<u64> = (SICK..SICK + 40).collect();
        let one_by_one = all.chunks(1).map(|one| (one, (9, 0)));
        // At the same source or at one of their own, in the name of another tenant or of the same one.
        let together = [
            (&all[..], (9, 0)),
            (&all[..], (9, 7)),
            (&all[..], (0, 0)),
            (&all[..], (0, 7)),
            (&many[..], (9, 0)),
        ];
        for (sick, whose) in one_by_one.chain(together) {
            let kinds: Vec<_> = sick.iter().take(5).filter_map(|adapter| sickness(*adapter)).collect();
            let beside = healthy_steps(slots, sick, whose);
            let first = alone.iter().zip(&beside).position(|(a, b)| a != b);
            assert!(beside == alone, "{slots} slots, {} of {kinds:?}, {whose:?}: step {first:?}", sick.len());
        }
    }
}
