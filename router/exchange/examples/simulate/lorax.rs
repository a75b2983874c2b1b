//! LoRAX as it is (its queue, loader and batching loop at the last commit), on the same server.
//!
//! One loader takes commands in the order in which they came: to download an adapter, to load it into a slot, to empty
//! that. Each runs on the thread that runs the steps, so that everybody waits for it. Adapters become active in the order
//! in which they were first asked for, and one whose download is not done stops all behind it. The front of the active
//! ones leaves after `--adapter-cycle-time-s` if others wait. New requests join after 20 steps, or when they outnumber
//! the running ones by a fifth, and their whole prompts are computed while the others wait. There is no copy in host
//! memory: every load reads files. Emptying a slot is taken to cost nothing.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use super::{
    costs::{DEADLINE, Server},
    report::{Moves, Outcome, Served},
    workload::{Arrivals, Job, Workload},
};

/// The defaults of `--max-batch-prefill-tokens`, `--max-waiting-tokens` and `--waiting-served-ratio`.
const PREFILL_TOKENS: u32 = 4096;
const WAITING_TOKENS: u32 = 20;
const WAITING_SERVED_RATIO: f64 = 1.2;

#[derive(Debug, Clone, Copy)]
struct Sequence {
    job: Job,
    arrived: Duration,
    first: Option<Duration>,
    tokens: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Downloading,
    Downloaded,
    Ready,
    Errored,
}

#[derive(Debug, Clone, Copy)]
enum Command {
    Download(usize),
    Load(usize),
    Offload(usize),
}

/// The requests of one adapter.
#[derive(Debug)]
struct Queue {
    status: Status,
    waiting: VecDeque<Sequence>,
}

struct Simulation<'a> {
    workload: &'a Workload,
    server: &'a Server,
    jobs: VecDeque<Job>,
    now: Duration,
    queues: BTreeMap<usize, Queue>,
    pending: VecDeque<usize>,
    /// With the times at which they became active.
    active: VecDeque<(usize, Duration)>,
    active_bytes: u64,
    commands: VecDeque<Command>,
    disk: BTreeSet<usize>,
    running: Vec<Sequence>,
    /// Steps since requests joined last.
    waiting_tokens: u32,
    served: Vec<Served>,
    free_clients: usize,
    moves: [Moves; 2],
}

/// Runs a load to its end.
pub(crate) fn run(workload: &Workload, server: &Server) -> Outcome {
    let free_clients = match workload.arrivals {
        Arrivals::Open { .. } => 0,
        Arrivals::Closed { streams } => streams,
    };
    let on_disk = (0..workload.adapters).filter(|&adapter| workload.on_disk && !workload.hangs(adapter));
    let mut simulation = Simulation {
        workload,
        server,
        jobs: workload.jobs().into(),
        now: Duration::ZERO,
        queues: BTreeMap::new(),
        pending: VecDeque::new(),
        active: VecDeque::new(),
        active_bytes: 0,
        commands: VecDeque::new(),
        disk: on_disk.collect(),
        running: Vec::new(),
        waiting_tokens: WAITING_TOKENS,
        served: Vec::new(),
        free_clients,
        moves: [Moves::default(); 2],
    };
    while simulation.served.len() < workload.requests {
        simulation.arrivals();
        simulation.command();
        let joined = simulation.join();
        if simulation.running.is_empty() && joined.is_empty() && simulation.commands.is_empty() {
            simulation.idle();
        }
        simulation.prefill(joined);
        simulation.decode();
    }
    let [disk, device] = simulation.moves;
    Outcome {
        served: simulation.served,
        ended: simulation.now,
        disk,
        host: Moves::default(),
        device,
        idle_slot_steps: None,
    }
}

impl Simulation<'_> {
    fn is_open(&self) -> bool {
        matches!(self.workload.arrivals, Arrivals::Open { .. })
    }

    fn arrivals(&mut self) {
        let open = self.is_open();
        while let Some(job) = self.jobs.front().copied() {
            if open && job.at > self.now || !open && self.free_clients == 0 {
                return;
            }
            self.jobs.pop_front();
            let arrived = if open { job.at } else { self.now };
            self.free_clients = self.free_clients.saturating_sub(1);
            let adapter = job.adapter;
            let commands = &mut self.commands;
            let queue = self.queues.entry(adapter).or_insert_with(|| {
                commands.push_back(Command::Download(adapter));
                Queue { status: Status::Downloading, waiting: VecDeque::new() }
            });
            queue.waiting.push_back(Sequence { job, arrived, first: None, tokens: 0 });
            let active = self.active.iter().any(|&(other, _)| other == adapter);
            if !active && !self.pending.contains(&adapter) {
                self.pending.push_back(adapter);
            }
        }
    }

    /// Runs the loader's next command.
    fn command(&mut self) {
        let (adapter, status, time) = match self.commands.pop_front() {
            None => return,
            Some(Command::Download(adapter)) if self.workload.hangs(adapter) => {
                (adapter, Status::Errored, DEADLINE)
            }
            Some(Command::Download(adapter)) => {
                let new = self.disk.insert(adapter);
                self.moves[0].loads += u64::from(new);
                let bytes = self.workload.bytes(adapter);
                let time = if new { self.server.fetch_time(bytes) } else { self.server.lookup_time() };
                (adapter, Status::Downloaded, time)
            }
            Some(Command::Load(adapter)) => {
                let bytes = self.workload.bytes(adapter);
                self.moves[1].loads += 1;
                (adapter, Status::Ready, self.server.stage_time(bytes) + self.server.copy_time(bytes))
            }
            Some(Command::Offload(adapter)) => (adapter, Status::Downloaded, Duration::ZERO),
        };
        self.now += time;
        if let Some(queue) = self.queues.get_mut(&adapter) {
            queue.status = status;
        }
    }

    fn status(&self, adapter: usize) -> Option<Status> {
        self.queues.get(&adapter).map(|queue| queue.status)
    }

    fn waits(&self, adapter: usize) -> bool {
        self.queues.get(&adapter).is_some_and(|queue| !queue.waiting.is_empty())
    }

    /// Chooses the active adapters anew.
    fn update_adapters(&mut self) {
        self.drop_errored();
        let in_use: BTreeSet<_> = self.running.iter().map(|sequence| sequence.job.adapter).collect();
        let mut idle = Vec::new();
        for &(adapter, _) in &self.active {
            if self.pending.len() > idle.len() && !in_use.contains(&adapter) && !self.waits(adapter) {
                idle.push(adapter);
            }
        }
        self.active.retain(|(adapter, _)| !idle.contains(adapter));
        let front = self.active.front().copied().filter(|&(adapter, since)| {
            !in_use.contains(&adapter)
                && self.now - since > self.server.cycle_time
                && !self.pending.is_empty()
        });
        if let Some((adapter, _)) = front {
            self.active.pop_front();
            self.pending.push_back(adapter);
            idle.push(adapter);
        }
        for adapter in idle {
            self.active_bytes -= self.workload.bytes(adapter);
            self.moves[1].evictions += 1;
            self.moves[1].needed += u64::from(self.waits(adapter));
            self.commands.push_back(Command::Offload(adapter));
        }
        while self.active.len() < self.server.slots as usize
            && let Some(&adapter) = self.pending.front()
        {
            let bytes = self.workload.bytes(adapter);
            if self.status(adapter) == Some(Status::Downloading)
                || self.active_bytes + bytes > self.server.slot_bytes
            {
                return;
            }
            self.pending.pop_front();
            self.active.push_back((adapter, self.now));
            self.active_bytes += bytes;
            self.commands.push_back(Command::Load(adapter));
        }
    }

    fn drop_errored(&mut self) {
        let errored = self.queues.iter().filter(|(_, queue)| queue.status == Status::Errored);
        let errored: Vec<_> = errored.map(|(&adapter, _)| adapter).collect();
        for adapter in errored {
            let failed = self.queues.remove(&adapter).map(|queue| queue.waiting).unwrap_or_default();
            failed.into_iter().for_each(|sequence| self.end(sequence, false));
            self.pending.retain(|&pending| pending != adapter);
        }
    }

    /// Takes the requests that join the running ones.
    fn join(&mut self) -> Vec<Sequence> {
        let waiting: usize = self.queues.values().map(|queue| queue.waiting.len()).sum();
        let few = (waiting as f64) < self.running.len() as f64 * WAITING_SERVED_RATIO;
        if waiting == 0 || few && self.waiting_tokens < WAITING_TOKENS {
            return Vec::new();
        }
        self.update_adapters();
        let (mut joined, mut tokens) = (Vec::new(), 0);
        while self.running.len() + joined.len() < self.server.seats as usize {
            let ready =
                self.active.iter().filter(|(adapter, _)| self.status(*adapter) == Some(Status::Ready));
            let fronts = ready.filter_map(|&(adapter, since)| {
                let front = self.queues.get(&adapter)?.waiting.front()?;
                Some((self.now - since > self.server.cycle_time, front.arrived, adapter, front.job.prompt))
            });
            let Some((_, _, adapter, prompt)) = fronts.min() else { break };
            if tokens + prompt > PREFILL_TOKENS && tokens > 0 {
                break;
            }
            tokens += prompt;
            joined.extend(self.queues.get_mut(&adapter).and_then(|queue| queue.waiting.pop_front()));
        }
        joined
    }

    /// Waits for the next request.
    fn idle(&mut self) {
        let next = self.jobs.front().filter(|_| self.is_open()).map_or(self.now, |job| job.at);
        self.now = next.max(self.now + Duration::from_micros(100));
    }

    /// Computes the prompts of requests that join, and nothing else.
    fn prefill(&mut self, joined: Vec<Sequence>) {
        if joined.is_empty() {
            return;
        }
        let rows: usize = joined.iter().map(|sequence| sequence.job.prompt as usize).sum();
        self.now += self.server.step_time(0, rows);
        self.waiting_tokens = 1;
        self.sampled(joined);
    }

    fn decode(&mut self) {
        if self.running.is_empty() {
            return;
        }
        self.now += self.server.step_time(self.running.len(), 0);
        self.waiting_tokens += 1;
        let running = std::mem::take(&mut self.running);
        self.sampled(running);
    }

    /// Counts a token for each of these, which run on unless it is their last.
    fn sampled(&mut self, sequences: Vec<Sequence>) {
        for mut sequence in sequences {
            sequence.first.get_or_insert(self.now - sequence.arrived);
            sequence.tokens += 1;
            match sequence.tokens >= sequence.job.answer {
                true => self.end(sequence, true),
                false => self.running.push(sequence),
            }
        }
    }

    fn end(&mut self, sequence: Sequence, well: bool) {
        let times = sequence.first.filter(|_| well).map(|first| (first, self.now - sequence.arrived));
        self.served.push(Served::of(&sequence.job, sequence.tokens, times));
        self.free_clients += 1;
    }
}
