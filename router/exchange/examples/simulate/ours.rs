//! The real scheduler and the exchange, in virtual time, with simulated sources and a simulated shard.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap},
    sync::Arc,
    time::Duration,
};

use exchange::{
    Ask, AskId, CallId, Content, CredentialId, Exchange, Fault, Fetched, Found, Input, Limits, Output,
    ReferenceId, Slot, SourceId, Staged, Tier, TierStats, Version,
};
use scheduler::{
    Adapter, AdapterKey, CacheSalt, Event, Request, RequestId, RopeScaling, Sampled, Scheduler, StepPlan,
    Tenant,
};

use super::{
    costs::{DEADLINE, Server},
    report::{Moves, Outcome, Served},
    workload::{Arrivals, Job, Workload},
};

/// Time from an abort to the end of a call.
const ABORT: Duration = Duration::from_millis(1);

/// Something that happens later. The order of the variants does not matter.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Later {
    Arrives(usize),
    Answer(CallId),
    Aborted(CallId),
    Deleted(Content),
    Unstaged(Content),
    Filled(u32, AdapterKey),
    Ran,
}

/// A call that is running, by what answers it.
#[derive(Debug, Clone, Copy)]
enum Call {
    Lookup(usize),
    Fetch(usize),
    Stage(usize),
}

/// A request that has not ended.
#[derive(Debug, Clone, Copy)]
struct Open {
    job: Job,
    arrived: Duration,
    first: Option<Duration>,
    tokens: u32,
}

struct Simulation<'a> {
    workload: &'a Workload,
    server: &'a Server,
    jobs: Vec<Job>,
    exchange: Exchange<usize>,
    scheduler: Scheduler<()>,
    now: Duration,
    later: BinaryHeap<Reverse<(Duration, u64, Later)>>,
    counter: u64,
    calls: HashMap<CallId, Call>,
    open: BTreeMap<usize, Open>,
    slots: HashMap<u32, Content>,
    /// Steps that have been sent, oldest first.
    steps: Vec<StepPlan<()>>,
    /// Times at which the device and its copy engine are free.
    device_free: Duration,
    copies_free: Duration,
    next_job: usize,
    served: Vec<Served>,
}

/// Runs a load to its end.
pub(crate) fn run(workload: &Workload, server: &Server) -> Outcome {
    let mut simulation = Simulation::new(workload, server);
    if workload.on_disk {
        // The most popular ones last, so that they count as used last.
        for adapter in (0..workload.adapters).rev().filter(|&adapter| !workload.hangs(adapter)) {
            let (content, versions) = (Content(name(adapter)), vec![Version(name(adapter))]);
            simulation.give(Input::OnDisk { content, bytes: workload.bytes(adapter), versions });
        }
    }
    simulation.give(Input::Attached { host: Vec::new() });
    let first = match workload.arrivals {
        Arrivals::Open { .. } => simulation.jobs.len(),
        Arrivals::Closed { streams } => streams.min(simulation.jobs.len()),
    };
    for job in 0..first {
        simulation.at(simulation.jobs[job].at, Later::Arrives(job));
    }
    simulation.next_job = first;
    while simulation.served.len() < simulation.jobs.len() && simulation.turn() {}
    simulation.scheduler.check();
    simulation.exchange.check();
    simulation.outcome()
}

impl<'a> Simulation<'a> {
    fn new(workload: &'a Workload, server: &'a Server) -> Self {
        let limits =
            Limits { disk_bytes: server.disk_bytes, host_bytes: server.host_bytes, ..Limits::default() };
        let shard = scheduler::Limits {
            num_blocks: server.seats * 256,
            block_size: 16,
            num_slots: server.slots,
            adapter_bytes: server.slot_bytes,
            adapter_cycle_time: server.cycle_time,
            max_rows: 2048,
            max_sequences: server.seats,
            max_logit_rows: 2048,
            max_added_tokens: 1 << 20,
            max_prefill_rows: None,
            prefix_caching: false,
            kv_window: 0,
            rope: RopeScaling::Fixed,
            bidirectional: false,
        };
        Self {
            workload,
            server,
            jobs: workload.jobs(),
            exchange: Exchange::new(limits),
            scheduler: Scheduler::new(shard, &[]),
            now: Duration::ZERO,
            later: BinaryHeap::new(),
            counter: 0,
            calls: HashMap::new(),
            open: BTreeMap::new(),
            slots: HashMap::new(),
            steps: Vec::new(),
            device_free: Duration::ZERO,
            copies_free: Duration::ZERO,
            next_job: 0,
            served: Vec::new(),
        }
    }

    fn at(&mut self, time: Duration, event: Later) {
        self.counter += 1;
        self.later.push(Reverse((time, self.counter, event)));
    }

    /// Lets the next thing happen. Returns false if nothing will.
    fn turn(&mut self) -> bool {
        let next = self.later.peek().map(|Reverse((time, ..))| *time);
        let timer = self.exchange.next_timer();
        if let Some(timer) = timer.filter(|timer| next.is_none_or(|next| *timer < next)) {
            self.now = timer.max(self.now);
            self.give(Input::Tick);
        } else {
            let Some(Reverse((time, _, event))) = self.later.pop() else { return false };
            self.now = time.max(self.now);
            self.happen(event);
        }
        self.send_steps();
        true
    }

    fn happen(&mut self, event: Later) {
        match event {
            Later::Arrives(index) => self.arrive(index),
            Later::Answer(call) => self.answer(call),
            Later::Aborted(call) => match self.calls.remove(&call) {
                Some(Call::Lookup(_)) => self.give(Input::LookedUp { call, result: Err(Fault::Slow) }),
                Some(Call::Fetch(_)) => self.give(Input::Fetched { call, result: Err(Fault::Slow) }),
                _ => {}
            },
            Later::Deleted(content) => self.give(Input::Deleted(content)),
            Later::Unstaged(content) => self.give(Input::Unstaged(content)),
            Later::Filled(slot, key) => {
                self.scheduler.slot_ready(slot, key);
                self.give(Input::Slot { content: Content(key.0), slot: Slot::Ready });
            }
            Later::Ran => self.complete(),
        }
    }

    fn arrive(&mut self, index: usize) {
        let job = self.jobs[index];
        self.open.insert(index, Open { job, arrived: self.now, first: None, tokens: 0 });
        let adapter = job.adapter;
        // Adapters whose sources hang come from the same source as the others, so that they are in their way.
        self.give(Input::Ask(Ask {
            id: AskId(index as u64),
            tenant: exchange::Tenant { id: self.workload.tenant(adapter), weight: 1 },
            source: SourceId(0),
            reference: ReferenceId(adapter as u128),
            credential: CredentialId(u128::from(self.workload.tenant(adapter))),
            tier: Tier::Host,
            pin: false,
            deadline: self.now + DEADLINE,
            payload: adapter,
        }));
    }

    fn answer(&mut self, call: CallId) {
        let Some(made) = self.calls.remove(&call) else { return };
        let input = match made {
            Call::Lookup(adapter) => {
                let (version, bytes) = (Version(name(adapter)), self.workload.bytes(adapter));
                let fresh_for = Duration::from_secs(60);
                Input::LookedUp { call, result: Ok(Found { version, bytes, in_place: false, fresh_for }) }
            }
            Call::Fetch(adapter) => {
                let (content, bytes) = (Content(name(adapter)), self.workload.bytes(adapter));
                Input::Fetched { call, result: Ok(Fetched { content, bytes }) }
            }
            Call::Stage(adapter) => {
                let bytes = self.workload.bytes(adapter);
                Input::Staged { call, result: Ok(Staged { host_bytes: bytes, slot_bytes: bytes }) }
            }
        };
        self.give(input);
    }

    fn give(&mut self, input: Input<usize>) {
        for output in self.exchange.handle(input, self.now) {
            self.take(output);
        }
    }

    fn take(&mut self, output: Output<usize>) {
        let server = self.server;
        let (call, made, time) = match output {
            Output::Lookup { call, payload, .. } => (call, Call::Lookup(payload), server.lookup_time()),
            Output::Fetch { call, payload, max_bytes, .. } => {
                (call, Call::Fetch(payload), server.fetch_time(max_bytes))
            }
            Output::Stage { call, payload, max_bytes, .. } => {
                (call, Call::Stage(payload), server.stage_time(max_bytes))
            }
            Output::Abort(call) => return self.at(self.now + ABORT, Later::Aborted(call)),
            Output::Delete(content) => return self.at(self.now + ABORT, Later::Deleted(content)),
            Output::Unstage(content) => return self.at(self.now + ABORT, Later::Unstaged(content)),
            Output::Ready { ask, content, slot_bytes, .. } => return self.submit(ask, content, slot_bytes),
            Output::Failed { ask, .. } => return self.end(ask.0 as usize, false),
        };
        self.calls.insert(call, made);
        let hangs = matches!(made, Call::Fetch(adapter) if self.workload.hangs(adapter));
        if !hangs {
            self.at(self.now + time, Later::Answer(call));
        }
    }

    fn submit(&mut self, ask: AskId, content: Content, slot_bytes: u64) {
        let Some(open) = self.open.get(&(ask.0 as usize)) else { return };
        let request = Request {
            id: RequestId(ask.0),
            tenant: Tenant { id: self.workload.tenant(open.job.adapter), weight: 1 },
            adapters: Some(Adapter { key: AdapterKey(content.0), bytes: slot_bytes }).into(),
            adapters_from: 0,
            salt: CacheSalt::default(),
            prompt: (0..open.job.prompt).collect(),
            max_new_tokens: open.job.answer,
            stop_ids: Arc::new([]),
            prompt_logprobs: false,
            group: None,
            hidden_states: false,
            payload: (),
        };
        if self.scheduler.submit(request, self.now).is_err() {
            self.give(Input::Release(ask));
            self.end(ask.0 as usize, false);
        }
    }

    fn send_steps(&mut self) {
        while let Some(plan) = self.scheduler.next_step(self.now) {
            for slot in &plan.unload {
                if let Some(content) = self.slots.remove(slot) {
                    self.give(Input::Slot { content, slot: Slot::Empty });
                }
            }
            let start = self.device_free.max(self.now);
            for &(slot, key) in &plan.load {
                let content = Content(key.0);
                self.slots.insert(slot, content);
                self.give(Input::Slot { content, slot: Slot::Loading });
                let adapter =
                    usize::from(key.0[0]) | usize::from(key.0[1]) << 8 | usize::from(key.0[2]) << 16;
                let copied =
                    self.copies_free.max(start) + self.server.copy_time(self.workload.bytes(adapter));
                self.copies_free = copied;
                self.at(copied, Later::Filled(slot, key));
            }
            let decode = plan.rows.iter().filter(|rows| rows.rows == 1).count();
            let all: usize = plan.rows.iter().map(|rows| rows.rows as usize).sum();
            self.device_free = start + self.server.step_time(decode, all - decode);
            self.at(self.device_free, Later::Ran);
            self.steps.push(plan);
        }
    }

    fn complete(&mut self) {
        let plan = self.steps.remove(0);
        let sampled = plan.rows.iter().filter(|rows| rows.sample);
        let sampled: Vec<_> = sampled.map(|rows| Sampled { id: rows.id, token: 1 }).collect();
        for event in self.scheduler.complete(plan.id, &sampled, &[]) {
            match event {
                // Its slot is pinned from here on, so that the host copy may go.
                Event::Started { id, .. } => self.give(Input::Release(AskId(id.0))),
                Event::Token { id, finish, .. } => {
                    let now = self.now;
                    if let Some(open) = self.open.get_mut(&(id.0 as usize)) {
                        open.first.get_or_insert(now - open.arrived);
                        open.tokens += 1;
                    }
                    if finish.is_some() {
                        self.end(id.0 as usize, true);
                    }
                }
                Event::Scored { .. } | Event::Failed { .. } => {}
            }
        }
    }

    fn end(&mut self, index: usize, well: bool) {
        let Some(open) = self.open.remove(&index) else { return };
        let times = open.first.filter(|_| well).map(|first| (first, self.now - open.arrived));
        self.served.push(Served::of(&open.job, open.tokens, times));
        if self.next_job < self.jobs.len() {
            self.at(self.now, Later::Arrives(self.next_job));
            self.next_job += 1;
        }
    }

    fn outcome(self) -> Outcome {
        let stats = self.exchange.stats();
        let moves = |tier: TierStats| Moves {
            loads: tier.loads,
            evictions: tier.evictions,
            needed: tier.needed_evictions,
        };
        Outcome {
            served: self.served,
            ended: self.now,
            disk: moves(stats.disk),
            host: moves(stats.host),
            device: moves(stats.device),
            idle_slot_steps: Some(self.scheduler.stats().idle_slot_steps),
        }
    }
}

/// The version and the content of an adapter.
fn name(adapter: usize) -> [u8; 32] {
    let mut name = [0; 32];
    name[..8].copy_from_slice(&(adapter as u64).to_le_bytes());
    name
}
