//! First come, first served: one queue, and loaders that bring adapters in the order in which their first requests came,
//! while steps run on. A request whose adapter has no slot keeps those behind it waiting. This is better than any server
//! that there is: LoRAX, in `lorax`, has one loader, which stops the steps.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use super::{
    costs::{DEADLINE, Server},
    report::{Moves, Outcome, Served},
    workload::{Arrivals, Job, Workload},
};

/// Prompt rows of a step.
const CHUNK: u32 = 512;

#[derive(Debug, Clone, Copy)]
struct Sequence {
    job: Job,
    arrived: Duration,
    first: Option<Duration>,
    prompt_left: u32,
    tokens: u32,
}

/// Copies on a tier by their last use.
#[derive(Debug, Default)]
struct Lru {
    used: BTreeMap<usize, u64>,
    bytes: u64,
    clock: u64,
    moves: Moves,
}

impl Lru {
    fn touch(&mut self, adapter: usize) -> bool {
        self.clock += 1;
        let clock = self.clock;
        self.used.get_mut(&adapter).map(|used| *used = clock).is_some()
    }

    /// Evicts what may leave until there is room, by bytes and by number. Returns whether there is.
    fn make_room(
        &mut self,
        (bytes, limit, count): (u64, u64, usize),
        size: impl Fn(usize) -> u64,
        may_leave: impl Fn(usize) -> bool,
    ) -> bool {
        while self.bytes + bytes > limit || self.used.len() >= count {
            let victims = self.used.iter().filter(|&(&adapter, _)| may_leave(adapter));
            let Some((&victim, _)) = victims.min_by_key(|(_, used)| **used) else { return false };
            self.used.remove(&victim);
            self.bytes -= size(victim);
            self.moves.evictions += 1;
        }
        true
    }

    fn remove(&mut self, adapter: usize, bytes: u64) {
        if self.used.remove(&adapter).is_some() {
            self.bytes -= bytes;
        }
    }

    fn add(&mut self, adapter: usize, bytes: u64) {
        self.clock += 1;
        self.used.insert(adapter, self.clock);
        self.bytes += bytes;
        self.moves.loads += 1;
    }
}

struct Simulation<'a> {
    workload: &'a Workload,
    server: &'a Server,
    jobs: VecDeque<Job>,
    now: Duration,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    disk: Lru,
    device: Lru,
    loaders: usize,
    /// The adapters that loaders bring, when that is done, and whether their sources hang.
    loading: Vec<(usize, Duration, bool)>,
    served: Vec<Served>,
    free_clients: usize,
}

/// Runs a load to its end, with so many loaders.
pub(crate) fn run(workload: &Workload, server: &Server, loaders: usize) -> Outcome {
    let free_clients = match workload.arrivals {
        Arrivals::Open { .. } => 0,
        Arrivals::Closed { streams } => streams,
    };
    let mut simulation = Simulation {
        workload,
        server,
        jobs: workload.jobs().into(),
        now: Duration::ZERO,
        waiting: VecDeque::new(),
        running: Vec::new(),
        disk: Lru::default(),
        device: Lru::default(),
        loaders,
        loading: Vec::new(),
        served: Vec::new(),
        free_clients,
    };
    if workload.on_disk {
        for adapter in 0..workload.adapters {
            let bytes = workload.bytes(adapter);
            if simulation.disk.bytes + bytes <= server.disk_bytes {
                simulation.disk.add(adapter, bytes);
            }
        }
        simulation.disk.moves = Moves::default();
    }
    while simulation.served.len() < workload.requests {
        simulation.arrivals();
        simulation.end_loads();
        while simulation.begin_load() {}
        simulation.admit();
        simulation.step();
    }
    Outcome {
        served: simulation.served,
        ended: simulation.now,
        disk: simulation.disk.moves,
        host: Moves::default(),
        device: simulation.device.moves,
        idle_slot_steps: None,
    }
}

impl Simulation<'_> {
    fn arrivals(&mut self) {
        let open = matches!(self.workload.arrivals, Arrivals::Open { .. });
        while let Some(job) = self.jobs.front().copied() {
            if open && job.at > self.now || !open && self.free_clients == 0 {
                return;
            }
            self.jobs.pop_front();
            let arrived = if open { job.at } else { self.now };
            self.free_clients = self.free_clients.saturating_sub(1);
            let (first, prompt_left, tokens) = (None, job.prompt, 0);
            self.waiting.push_back(Sequence { job, arrived, first, prompt_left, tokens });
        }
    }

    fn end_loads(&mut self) {
        let now = self.now;
        let (ended, loading): (Vec<_>, _) = self.loading.drain(..).partition(|&(_, done, _)| done <= now);
        self.loading = loading;
        for (adapter, _, hangs) in ended {
            if hangs {
                self.device.remove(adapter, self.workload.bytes(adapter));
                let (failed, waiting): (VecDeque<_>, _) =
                    self.waiting.drain(..).partition(|sequence| sequence.job.adapter == adapter);
                self.waiting = waiting;
                failed.into_iter().for_each(|sequence| self.end(sequence, false));
            }
        }
    }

    /// Begins to load the next adapter, which must find a slot. Returns whether it could.
    fn begin_load(&mut self) -> bool {
        if self.loading.len() >= self.loaders {
            return false;
        }
        let absent = |sequence: &&Sequence| !self.device.used.contains_key(&sequence.job.adapter);
        let Some(adapter) = self.waiting.iter().find(absent).map(|sequence| sequence.job.adapter) else {
            return false;
        };
        let (workload, server, running, waiting) = (self.workload, self.server, &self.running, &self.waiting);
        let bytes = workload.bytes(adapter);
        let size = |adapter| workload.bytes(adapter);
        // What the requests ahead of it are waiting for stays.
        let ahead: Vec<_> =
            waiting.iter().map(|sequence| sequence.job.adapter).take_while(|a| *a != adapter).collect();
        let loading = &self.loading;
        let may_leave = |adapter: usize| {
            running.iter().all(|sequence| sequence.job.adapter != adapter)
                && loading.iter().all(|(other, ..)| *other != adapter)
                && !ahead.contains(&adapter)
        };
        let room = (bytes, server.slot_bytes, server.slots as usize);
        if !self.device.make_room(room, size, may_leave) {
            return false;
        }
        self.device.add(adapter, bytes);
        let mut time = server.stage_time(bytes) + server.copy_time(bytes);
        let hangs = workload.hangs(adapter);
        if hangs {
            time = DEADLINE;
        } else if !self.disk.touch(adapter) {
            time += server.lookup_time() + server.fetch_time(bytes);
            self.disk.make_room((bytes, server.disk_bytes, usize::MAX), size, |_| true);
            self.disk.add(adapter, bytes);
        }
        self.loading.push((adapter, self.now + time, hangs));
        true
    }

    fn admit(&mut self) {
        while self.running.len() < self.server.seats as usize
            && let Some(sequence) = self.waiting.front()
            && self.loading.iter().all(|(adapter, ..)| *adapter != sequence.job.adapter)
            && self.device.touch(sequence.job.adapter)
        {
            self.running.extend(self.waiting.pop_front());
        }
    }

    fn step(&mut self) {
        if self.running.is_empty() {
            // Until something happens: the next arrival, or the end of the load.
            let open = matches!(self.workload.arrivals, Arrivals::Open { .. });
            let arrival = self.jobs.front().filter(|_| open).map(|job| job.at);
            let loaded = self.loading.iter().map(|(_, done, _)| *done);
            let next = arrival.into_iter().chain(loaded).min().unwrap_or(self.now);
            self.now = next.max(self.now + Duration::from_micros(100));
            return;
        }
        let (mut chunk, mut decode) = (CHUNK, 0);
        let mut sampled = Vec::new();
        for (index, sequence) in self.running.iter_mut().enumerate() {
            if sequence.prompt_left == 0 {
                decode += 1;
                sampled.push(index);
            } else if chunk > 0 {
                let rows = sequence.prompt_left.min(chunk);
                chunk -= rows;
                sequence.prompt_left -= rows;
                if sequence.prompt_left == 0 {
                    sampled.push(index);
                }
            }
        }
        self.now += self.server.step_time(decode, (CHUNK - chunk) as usize);
        for index in sampled {
            let sequence = &mut self.running[index];
            sequence.first.get_or_insert(self.now - sequence.arrived);
            sequence.tokens += 1;
        }
        let (ended, running): (Vec<_>, _) =
            self.running.drain(..).partition(|sequence| sequence.tokens >= sequence.job.answer);
        self.running = running;
        ended.into_iter().for_each(|sequence| self.end(sequence, true));
    }

    fn end(&mut self, sequence: Sequence, well: bool) {
        let times = sequence.first.filter(|_| well).map(|first| (first, self.now - sequence.arrived));
        self.served.push(Served::of(&sequence.job, sequence.tokens, times));
        self.free_clients += 1;
    }
}
