//! Time that the scheduler takes for one step of a loaded server: 10,000 requests of 20 tenants waiting for 1,000
//! adapters of uneven popularity, 256 sequences running. The shard is instant, so that only the scheduler is measured.

use std::{
    error::Error,
    io::{self, Write},
    sync::Arc,
    time::{Duration, Instant},
};

use scheduler::{
    Adapter, AdapterKey, CacheSalt, Event, Limits, Request, RequestId, RopeScaling, Sampled, Scheduler,
    StepPlan, SubmitError, Tenant,
};

const WAITING: usize = 10_000;
const ADAPTERS: u64 = 1_000;
const TENANTS: u64 = 20;
const RUNNING: u32 = 256;
const STEPS: usize = 5_000;
/// For the mean, on one core.
const TARGET: Duration = Duration::from_micros(100);

/// Requests drawn from a fixed sequence of pseudo-random numbers (Knuth's MMIX generator).
struct Load {
    state: u64,
    submitted: u64,
}

impl Load {
    fn draw(&mut self, below: u64) -> u64 {
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) % below
    }

    /// Adapters are the more popular the lower their number; prompts of up to 512 tokens, outputs of up to 256.
    fn request(&mut self) -> Request<()> {
        self.submitted += 1;
        let bound = self.draw(ADAPTERS) + 1;
        let number = self.draw(bound);
        let mut key = [0; 32];
        key[..8].copy_from_slice(&number.to_le_bytes());
        let len = 16 + self.draw(496);
        Request {
            id: RequestId(self.submitted),
            tenant: Tenant { id: self.draw(TENANTS), weight: 1 },
            salt: CacheSalt::default(),
            prompt: (0..len).map(|_| self.draw(32_000) as u32).collect(),
            max_new_tokens: 16 + self.draw(240) as u32,
            stop_ids: Arc::new([0]),
            adapters: Some(Adapter { key: AdapterKey(key), bytes: 50_000_000 }).into(),
            adapters_from: 0,
            prompt_logprobs: false,
            group: None,
            hidden_states: false,
            payload: (),
        }
    }
}

/// A server of that load, and the time it has taken.
struct Server {
    scheduler: Scheduler<()>,
    load: Load,
    now: Duration,
    planning: Vec<Duration>,
    completing: Vec<Duration>,
}

impl Server {
    fn new() -> Self {
        let limits = Limits {
            num_blocks: 32_768,
            block_size: 16,
            num_slots: 128,
            adapter_bytes: 0,
            adapter_cycle_time: Duration::from_secs(2),
            max_rows: 1_024,
            max_sequences: RUNNING,
            max_logit_rows: 1_024,
            max_added_tokens: 10 << 20,
            max_prefill_rows: None,
            prefix_caching: true,
            kv_window: 0,
            rope: RopeScaling::Fixed,
            bidirectional: false,
        };
        Self {
            scheduler: Scheduler::new(limits, &[]),
            load: Load { state: 1, submitted: 0 },
            now: Duration::ZERO,
            planning: Vec::new(),
            completing: Vec::new(),
        }
    }

    /// Plans one step while another is in flight, and completes that one. New requests replace those that started.
    fn step(&mut self, in_flight: &mut Option<StepPlan<()>>) -> Result<(), SubmitError> {
        while self.scheduler.stats().waiting < WAITING {
            self.scheduler.submit(self.load.request(), self.now)?;
        }
        let start = Instant::now();
        let plan = self.scheduler.next_step(self.now);
        self.planning.push(start.elapsed());
        if let Some(step) = in_flight.take() {
            let sampled = step.rows.iter().filter(|rows| rows.sample);
            let tokens: Vec<_> = sampled.map(|rows| Sampled { id: rows.id, token: 1 }).collect();
            let start = Instant::now();
            let events = self.scheduler.complete(step.id, &tokens, &[]);
            self.completing.push(start.elapsed());
            assert!(!events.iter().any(|event| matches!(event, Event::Failed { .. })));
        }
        for &(slot, key) in plan.iter().flat_map(|plan| &plan.load) {
            self.scheduler.slot_ready(slot, key);
        }
        *in_flight = plan;
        self.now += Duration::from_millis(20);
        Ok(())
    }
}

fn percentiles(out: &mut impl Write, name: &str, times: &mut [Duration]) -> io::Result<Duration> {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    let mean = times.iter().sum::<Duration>() / times.len() as u32;
    writeln!(
        out,
        "{name:10} mean {mean:>9.1?}  p50 {:>9.1?}  p99 {:>9.1?}  max {:>9.1?}",
        at(0.5),
        at(0.99),
        at(1.0)
    )?;
    Ok(mean)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut server = Server::new();
    let mut in_flight = None;
    // Until all seats are taken and the mix of young and old sequences is steady.
    for _ in 0..1_000 {
        server.step(&mut in_flight)?;
    }
    server.planning.clear();
    server.completing.clear();
    let mut rows = 0;
    for _ in 0..STEPS {
        server.step(&mut in_flight)?;
        rows += in_flight.as_ref().map_or(0, |plan| plan.rows.iter().map(|r| r.rows as usize).sum());
    }
    server.scheduler.check();
    let mut out = io::stdout().lock();
    let stats = server.scheduler.stats();
    writeln!(out, "{STEPS} steps of {} rows; {stats:?}", rows / STEPS)?;
    let planning = percentiles(&mut out, "planning", &mut server.planning)?;
    percentiles(&mut out, "completing", &mut server.completing)?;
    writeln!(
        out,
        "target     mean of planning below {TARGET:?}: {}",
        if planning < TARGET { "met" } else { "missed" }
    )?;
    Ok(())
}
