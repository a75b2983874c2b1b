//! A scheduler and a simulated shard, and the rules that hold between them at every moment.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use scheduler::{
    Adapter, AdapterKey, Adapters, CacheSalt, Event, FailReason, Finish, Limits, Request, RequestId,
    RopeScaling, Sampled, Scheduler, StepPlan, SubmitError, Tenant,
};

use crate::shard::{Payload, STOP, Shard, answer, plain};

pub(crate) type Plan = StepPlan<Payload>;

/// Time after which an adapter leaves its slot to others.
pub(crate) const CYCLE_TIME: Duration = Duration::from_secs(2);

/// Limits that are small enough for everything to run out.
pub(crate) fn limits() -> Limits {
    Limits {
        num_blocks: 64,
        block_size: 4,
        num_slots: 4,
        adapter_bytes: 0,
        adapter_cycle_time: CYCLE_TIME,
        max_rows: 32,
        max_sequences: 8,
        max_logit_rows: 32,
        max_added_tokens: 1_000_000,
        max_prefill_rows: Some(16),
        prefix_caching: true,
        kv_window: 0,
        rope: RopeScaling::Fixed,
        bidirectional: false,
    }
}

/// The adapter of a number; 0 is the base model.
pub(crate) fn adapter(number: u16) -> Option<Adapter> {
    (number > 0).then(|| Adapter { key: key(number), bytes: 10 })
}

pub(crate) fn key(number: u16) -> AdapterKey {
    let mut key = [0; 32];
    key[..2].copy_from_slice(&number.to_le_bytes());
    AdapterKey(key)
}

/// The number of the first adapter.
fn number(adapters: &Adapters) -> u16 {
    adapters.keys().next().map_or(0, |key| u16::from_le_bytes([key.0[0], key.0[1]]))
}

/// A request for several adapters. Those of another `variant` have other weights.
pub(crate) fn ensemble(
    id: u64,
    numbers: &[u16],
    variant: u8,
    prompt: Vec<u32>,
    answer: u32,
) -> Request<Payload> {
    let members: Vec<_> = numbers.iter().filter_map(|&number| adapter(number)).collect();
    let mut key = AdapterKey([variant + 1; 32]);
    numbers.iter().enumerate().for_each(|(i, number)| key.0[i] = *number as u8);
    let one = request(id, 0, prompt, answer);
    let payload = Payload { salt: 1000 + u128::from(variant), ..one.payload };
    Request { adapters: Adapters::ensemble(key, &members), payload, ..one }
}

pub(crate) fn tenant(id: u64) -> Tenant {
    Tenant { id, weight: 1 }
}

pub(crate) fn request(
    id: u64,
    adapter_number: u16,
    prompt: Vec<u32>,
    max_new_tokens: u32,
) -> Request<Payload> {
    Request {
        id: RequestId(id),
        tenant: tenant(0),
        adapters: adapter(adapter_number).into(),
        adapters_from: 0,
        salt: CacheSalt(0),
        prompt: prompt.into(),
        max_new_tokens,
        stop_ids: Arc::new([]),
        prompt_logprobs: false,
        group: None,
        hidden_states: false,
        payload: Payload { id, salt: 0 },
    }
}

/// A request whose KV blocks are shared under this salt only.
pub(crate) fn salted(salt: u128, request: Request<Payload>) -> Request<Payload> {
    let payload = Payload { salt: request.payload.salt ^ salt, ..request.payload };
    Request { salt: CacheSalt(salt), payload, ..request }
}

/// A prompt that shares its beginning with no other of another number.
pub(crate) fn prompt(number: u64, len: usize) -> Vec<u32> {
    (0..len as u64).map(|position| ((number * 31 + position * 7 + number * position) % 97) as u32).collect()
}

/// The tokens that a request must get, and those that it has got.
#[derive(Debug)]
pub(crate) struct Expected {
    request: Request<Payload>,
    adapters: Adapters,
    flow: (u64, u16),
    prompt_logprobs: bool,
    prompt_len: usize,
    tokens: Vec<u32>,
    pub(crate) got: usize,
    pub(crate) started: Option<Duration>,
    pub(crate) cached_tokens: u32,
    /// The position after the last one that has been planned.
    planned: usize,
    /// Its place in the order of submission.
    order: usize,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) scheduler: Scheduler<Payload>,
    pub(crate) shard: Shard,
    pub(crate) now: Duration,
    /// Requests that have not ended.
    pub(crate) open: BTreeMap<RequestId, Expected>,
    /// In the order of their ends.
    pub(crate) finished: Vec<RequestId>,
    pub(crate) failed: BTreeMap<RequestId, FailReason>,
    /// Virtual tokens of each tenant and adapter.
    pub(crate) service: BTreeMap<(u64, u16), u64>,
    /// Rows of tokens that were known when their sequences were added.
    pub(crate) prompt_rows: u64,
    limits: Limits,
    sent: VecDeque<Plan>,
    /// By running sequence: the position after its last row, and the number of tokens that it was added with.
    positions: BTreeMap<RequestId, (u32, u32)>,
    /// The scheduler's invariants are checked after every so many calls. With many blocks a check takes long.
    check_every: u32,
    calls: u32,
    submitted: usize,
}

impl World {
    pub(crate) fn new(limits: Limits) -> Self {
        let check_every = if limits.num_blocks > 100 { 50 } else { 1 };
        Self {
            scheduler: Scheduler::new(limits.clone(), &[]),
            shard: Shard::new(&limits),
            now: Duration::ZERO,
            open: BTreeMap::new(),
            finished: Vec::new(),
            failed: BTreeMap::new(),
            service: BTreeMap::new(),
            prompt_rows: 0,
            limits,
            sent: VecDeque::new(),
            positions: BTreeMap::new(),
            check_every,
            calls: 0,
            submitted: 0,
        }
    }

    fn check(&mut self) {
        self.calls += 1;
        if self.calls.is_multiple_of(self.check_every) {
            self.scheduler.check();
        }
    }

    pub(crate) fn submit(&mut self, request: Request<Payload>) -> Result<(), SubmitError> {
        let expected = Expected {
            adapters: request.adapters.clone(),
            flow: (request.tenant.id, number(&request.adapters)),
            prompt_logprobs: request.prompt_logprobs || request.hidden_states,
            prompt_len: request.prompt.len(),
            tokens: plain(&request, self.limits.rope),
            request: request.clone(),
            got: 0,
            started: None,
            cached_tokens: 0,
            planned: 0,
            order: self.submitted,
        };
        self.submitted += 1;
        let id = request.id;
        let result = self.scheduler.submit(request, self.now);
        if result.is_ok() {
            self.open.insert(id, expected);
        }
        self.check();
        result
    }

    pub(crate) fn cancel(&mut self, id: RequestId) {
        self.scheduler.cancel(id);
        self.open.remove(&id);
        self.check();
    }

    /// Plans a step and sends it.
    pub(crate) fn plan(&mut self) -> Option<Plan> {
        let plan = self.scheduler.next_step(self.now);
        self.check();
        let plan = plan?;
        self.check_plan(&plan);
        self.sent.push_back(plan.clone());
        assert!(self.sent.len() <= scheduler::MAX_IN_FLIGHT);
        Some(plan)
    }

    /// Has the shard run the oldest step sent, and returns the events. `None` if there is none.
    pub(crate) fn run(&mut self) -> Option<Vec<Event>> {
        let step = self.sent.pop_front()?;
        let (sampled, refused) = self.shard.run(&step);
        let resident = self.shard.resident();
        let bytes = 10 * resident.len() as u64;
        assert!(
            self.limits.adapter_bytes == 0 || bytes <= self.limits.adapter_bytes,
            "{bytes} bytes in slots"
        );
        let events = self.scheduler.complete(step.id, &sampled, &refused);
        self.check();
        events.iter().for_each(|event| self.note(event, &sampled, &refused));
        Some(events)
    }

    /// Ends the `nth` of the loads that are under way. Returns false if there are fewer.
    pub(crate) fn answer(&mut self, nth: usize, well: bool) -> bool {
        let Some(&(slot, key)) = self.shard.loading().get(nth) else { return false };
        self.shard.answer(slot, key, well);
        if well {
            self.scheduler.slot_ready(slot, key);
        } else {
            let events = self.scheduler.slot_failed(slot, key);
            assert!(events.iter().all(
                |event| matches!(event, Event::Failed { reason: FailReason::AdapterLoad(k), .. } if *k == key)
            ));
            events.iter().for_each(|event| self.note(event, &[], &[]));
        }
        self.check();
        true
    }

    /// Begins anew with shards that hold nothing but the adapters in their slots. Open requests are lost.
    pub(crate) fn restart(&mut self) {
        let resident = self.shard.attach();
        self.scheduler = Scheduler::new(self.limits.clone(), &resident);
        self.check();
        assert_eq!(self.scheduler.stats().resident_adapters, resident.len());
        self.open.clear();
        self.sent.clear();
        self.positions.clear();
    }

    /// One turn of a server that keeps two steps in flight: plans all it can, runs one, ends all loads. False when
    /// nothing was to do.
    pub(crate) fn turn(&mut self) -> bool {
        let mut busy = false;
        while self.plan().is_some() {
            busy = true;
        }
        busy |= self.run().is_some();
        while self.answer(0, true) {
            busy = true;
        }
        self.now += Duration::from_millis(10);
        busy
    }

    /// Whether a request for an adapter has not begun.
    pub(crate) fn waits_for(&self, key: AdapterKey) -> bool {
        let of_adapter = |expected: &&Expected| expected.adapters.contains(key);
        self.open.values().filter(of_adapter).any(|expected| expected.planned == 0)
    }

    /// Runs a request alone and returns how many of its prompt tokens came from the cache.
    pub(crate) fn cached(&mut self, request: Request<Payload>) -> u64 {
        let before = self.scheduler.stats().cached_tokens;
        self.submit(request).unwrap();
        self.run_to_end();
        self.scheduler.stats().cached_tokens - before
    }

    /// Takes turns until nothing is to do: everything has ended then, and nothing is left behind.
    pub(crate) fn run_to_end(&mut self) {
        let mut turns = 0;
        while self.turn() {
            turns += 1;
            assert!(turns < 20_000, "{:?} do not end", self.open.keys());
        }
        assert!(self.open.is_empty(), "{:?} never end", self.open.keys());
        let stats = self.scheduler.stats();
        assert_eq!((stats.waiting, stats.running, stats.preempted, stats.in_flight), (0, 0, 0, 0));
        assert_eq!(stats.free_blocks + stats.cached_blocks, self.limits.num_blocks as usize);
        assert_eq!(stats.loading_adapters, 0);
    }

    fn note(&mut self, event: &Event, sampled: &[Sampled], refused: &[RequestId]) {
        match *event {
            Event::Started { id, queued, cached_tokens } => {
                let expected = self.open.get_mut(&id).expect("started and open");
                assert!(expected.started.replace(queued).is_none(), "{id:?} starts twice");
                assert!(!expected.prompt_logprobs || cached_tokens == 0, "{id:?} skips log-probabilities");
                expected.cached_tokens = cached_tokens;
                let computed = expected.prompt_len as u64 - u64::from(cached_tokens);
                *self.service.entry(expected.flow).or_default() += computed;
            }
            Event::Token { id, index, token, finish } => {
                assert_eq!(sampled[index], Sampled { id, token }, "the event names its result");
                let expected = self.open.get_mut(&id).expect("a token of an open request");
                assert!(expected.started.is_some(), "{id:?} has a token before its start");
                assert_eq!(token, expected.tokens[expected.got], "token {} of {id:?}", expected.got);
                expected.got += 1;
                *self.service.entry(expected.flow).or_default() += 2;
                assert_eq!(finish.is_some(), expected.got == expected.tokens.len(), "end of {id:?}");
                assert!(finish != Some(Finish::StopToken) || token == STOP);
                if finish.is_some() {
                    self.open.remove(&id);
                    self.finished.push(id);
                }
            }
            Event::Scored { id } => {
                let expected = self.open.remove(&id).expect("a scored request is open");
                assert!(expected.started.is_some() && expected.tokens.is_empty(), "{id:?} is scored");
                let hidden = expected.request.hidden_states;
                let rows = if hidden { expected.prompt_len } else { (expected.prompt_len - 1).max(1) };
                assert_eq!(expected.planned, rows, "rows of {id:?}");
                self.finished.push(id);
            }
            Event::Failed { id, reason } => {
                if let FailReason::Refused { index } = reason {
                    assert_eq!(refused[index], id, "the event names its refusal");
                }
                assert!(self.open.remove(&id).is_some(), "{id:?} fails and is open");
                self.failed.insert(id, reason);
            }
        }
    }

    /// Budgets, order and continuity of a plan.
    fn check_plan(&mut self, plan: &Plan) {
        let order = |id: &RequestId| self.open.get(id).map(|expected| expected.order);
        let oldest = self.positions.keys().filter_map(order).min();
        let outgrows = |id: &RequestId| match (self.limits.rope, self.positions.get(id)) {
            (RopeScaling::Switch { context }, Some(&(next, added))) => next == context && added <= context,
            _ => false,
        };
        for id in plan.dropped.iter().filter(|id| !outgrows(id)) {
            assert!(order(id).is_none() || order(id) != oldest, "the oldest sequence, {id:?}, is preempted");
        }
        for id in &plan.dropped {
            self.positions.remove(id);
        }
        for added in &plan.added {
            self.positions.insert(added.id, (u32::MAX, (added.prompt.len() + added.generated.len()) as u32));
            assert!(plan.rows.iter().any(|rows| rows.id == added.id), "{:?} is added without rows", added.id);
            if let Some(expected) = self.open.get_mut(&added.id) {
                assert_eq!(added.generated, expected.tokens[..expected.got], "tokens of {:?}", added.id);
                expected.tokens = answer(&expected.request, &added.generated, self.limits.rope);
            }
        }
        let (mut rows, mut prefill, mut logits) = (0, 0, 0);
        for planned in &plan.rows {
            assert!(planned.rows > 0);
            let (next, added_len) = self.positions.get_mut(&planned.id).expect("rows of a running sequence");
            assert!(
                *next == u32::MAX || *next == planned.position,
                "rows of {:?} follow each other",
                planned.id
            );
            *next = planned.position + planned.rows;
            let is_whole = (planned.position, planned.rows) == (0, *added_len);
            assert!(is_whole || !self.limits.bidirectional, "a part of {:?}", planned.id);
            if let Some(expected) = self.open.get_mut(&planned.id) {
                expected.planned = expected.planned.max(*next as usize);
            }
            rows += planned.rows;
            prefill += if planned.position < *added_len { planned.rows } else { 0 };
            let scored = self.open.get(&planned.id).is_some_and(|expected| expected.prompt_logprobs);
            logits += if scored { planned.rows } else { u32::from(planned.sample) };
        }
        self.prompt_rows += u64::from(prefill);
        assert!(rows <= self.limits.max_rows, "{rows} rows");
        let most = self.limits.max_prefill_rows.unwrap_or(self.limits.max_rows);
        // A prompt that cannot be divided may need more.
        let is_alone = self.limits.bidirectional && plan.rows.len() == 1;
        assert!(prefill <= most || is_alone, "{prefill} prefill rows");
        assert!(logits <= self.limits.max_logit_rows, "{logits} logit rows");
        let adapters = plan.rows.iter().map(|planned| self.open[&planned.id].adapters.keys());
        let mut runs: Vec<Vec<_>> = adapters.map(Iterator::collect).collect();
        runs.dedup();
        let distinct: BTreeSet<_> = runs.iter().collect();
        assert_eq!(distinct.len(), runs.len(), "rows of one slot follow each other");
        let sequences: BTreeSet<_> = plan.rows.iter().map(|planned| planned.id).collect();
        assert_eq!(sequences.len(), plan.rows.len(), "a sequence has one entry");
    }
}
