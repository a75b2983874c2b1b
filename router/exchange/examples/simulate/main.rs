//! Simulates a server with thousands of adapters in virtual time: the real scheduler and the exchange, against LoRAX as it
//! is, and against a better server that serves in the order of arrival. With `--slo-ms` it finds out how many adapters one GPU can serve.
#![allow(clippy::print_stdout, reason = "the figures are what it is for")]

mod capacity;
mod costs;
mod fcfs;
mod lorax;
mod ours;
mod report;
mod workload;

use std::time::Duration;

use clap::Parser;

use costs::Server;
use report::Outcome;
use workload::{Arrivals, Popularity, Workload};

const MIB: u64 = 1 << 20;

/// The defaults are a model of 8B parameters on one H200, and adapters on q, k, v and o. Times of steps are fitted to what
/// `docs/benchmarks.md` has of a whole server there, with 512 prompt tokens and 128 new ones: for 32 to 256 streams over 32
/// adapters, and for 64 over 256 with 32 slots, the simulated tokens/s are within 3 % of these.
#[derive(Debug, Clone, Parser)]
#[command(version, about)]
struct Args {
    /// Adapters
    #[arg(long, default_value_t = 2000)]
    adapters: usize,
    /// LoRA ranks of the adapters, equally frequent
    #[arg(long, value_delimiter = ',', default_values_t = [8, 16, 32, 64])]
    lora_ranks: Vec<u32>,
    /// Bytes of an adapter for each of its ranks
    #[arg(long, default_value_t = 1_700_000)]
    bytes_per_rank: u64,
    /// Popularity of adapters: zipf:EXPONENT, uniform or round-robin
    #[arg(long, default_value = "zipf:1.0")]
    popularity: Popularity,
    /// Requests a second
    #[arg(long, default_value_t = 30.0)]
    rate: f64,
    /// Coefficient of variation of the times between requests: 1 for a Poisson process, more for bursts
    #[arg(long, default_value_t = 1.0)]
    cv: f64,
    /// Clients that ask again as soon as they have their answers, in place of a rate
    #[arg(long)]
    streams: Option<usize>,
    /// Requests
    #[arg(long, default_value_t = 6000)]
    requests: usize,
    /// Share of the requests, the first ones, whose waits do not count
    #[arg(long, default_value_t = 0.25)]
    warm_up: f64,
    /// The cache on the disk has adapters at the start, as many as fit
    #[arg(long)]
    on_disk: bool,
    /// Tenants, which have the adapters in turn
    #[arg(long, default_value_t = 20)]
    tenants: u64,
    /// Mean tokens of a prompt
    #[arg(long, default_value_t = 256)]
    prompt: u32,
    /// Mean tokens of an answer
    #[arg(long, default_value_t = 64)]
    answer: u32,
    /// All prompts and all answers have the mean length
    #[arg(long)]
    equal_lengths: bool,
    /// Share of the adapters whose source never sends them
    #[arg(long, default_value_t = 0.0)]
    hanging: f64,
    /// Seed of the load
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Device slots
    #[arg(long, default_value_t = 128)]
    slots: u32,
    /// Device memory for adapters, in MiB
    #[arg(long, default_value_t = 6144)]
    slot_memory: u64,
    /// Host memory for adapters, in MiB
    #[arg(long, default_value_t = 24 * 1024)]
    host_memory: u64,
    /// Cache on the disk, in MiB
    #[arg(long, default_value_t = 256 * 1024)]
    disk: u64,
    /// Sequences that run at the same time
    #[arg(long, default_value_t = 128)]
    seats: u32,
    /// Seconds after which a busy adapter leaves its slot to others
    #[arg(long, default_value_t = 2.0)]
    adapter_cycle_time_s: f64,
    /// Milliseconds of a step without rows (fitted, see above)
    #[arg(long, default_value_t = 5.3)]
    step_ms: f64,
    /// Microseconds of a decode row (fitted)
    #[arg(long, default_value_t = 45.0)]
    row_us: f64,
    /// Microseconds of a prompt row (fitted)
    #[arg(long, default_value_t = 24.0)]
    prompt_row_us: f64,
    /// GB/s from host memory to the device (64 were measured: docs/benchmarks/history.md)
    #[arg(long, default_value_t = 50.0)]
    copy_rate: f64,
    /// GB/s from the disk to host memory, of each of the stages that run at the same time (assumed: a fast disk)
    #[arg(long, default_value_t = 2.0)]
    stage_rate: f64,
    /// MB/s from a source, of each download (assumed)
    #[arg(long, default_value_t = 100.0)]
    fetch_rate: f64,
    /// Milliseconds until a source answers (assumed)
    #[arg(long, default_value_t = 80.0)]
    lookup_ms: f64,
    /// Finds the largest number of adapters, each asked for as often as RATE / ADAPTERS says, whose requests wait at most
    /// so many milliseconds for their first tokens, at the 99th percentile
    #[arg(long)]
    slo_ms: Option<f64>,
}

impl Args {
    fn workload(&self) -> Workload {
        let arrivals = match self.streams {
            Some(streams) => Arrivals::Closed { streams },
            None => Arrivals::Open { rate: self.rate, cv: self.cv },
        };
        Workload {
            adapters: self.adapters.max(1),
            lora_ranks: self.lora_ranks.clone(),
            bytes_per_rank: self.bytes_per_rank,
            popularity: self.popularity,
            arrivals,
            requests: self.requests,
            tenants: self.tenants.max(1),
            prompt: self.prompt,
            answer: self.answer,
            equal_lengths: self.equal_lengths,
            warm_up: self.warm_up,
            on_disk: self.on_disk,
            hanging: self.hanging,
            seed: self.seed,
        }
    }

    fn server(&self) -> Server {
        Server {
            slots: self.slots,
            slot_bytes: self.slot_memory * MIB,
            host_bytes: self.host_memory * MIB,
            disk_bytes: self.disk * MIB,
            seats: self.seats,
            cycle_time: Duration::from_secs_f64(self.adapter_cycle_time_s),
            step: self.step_ms / 1e3,
            row: self.row_us / 1e6,
            prompt_row: self.prompt_row_us / 1e6,
            copy_rate: self.copy_rate * 1e9,
            stage_rate: self.stage_rate * 1e9,
            fetch_rate: self.fetch_rate * 1e6,
            lookup: self.lookup_ms / 1e3,
        }
    }
}

fn print(name: &str, outcome: &Outcome) {
    let figures = outcome.figures();
    let (disk, host, device) = (outcome.disk, outcome.host, outcome.device);
    println!(
        "{name:24} {:>7.0} tokens/s  wait p50 {:>7.3} s  p99 {:>7.3} s  p99 of adapters {:>7.3} s  Jain {:.3}  failed \
         {:>4}",
        figures.tokens_per_second,
        figures.p50,
        figures.p99,
        figures.p99_adapter,
        figures.jain,
        figures.failed
    );
    println!(
        "  loads: disk {:>5}, host {:>5}, device {:>5}   evictions (of what was needed next): disk {} ({}), host {} \
         ({}), device {} ({})",
        disk.loads,
        host.loads,
        device.loads,
        disk.evictions,
        disk.needed,
        host.evictions,
        host.needed,
        device.evictions,
        device.needed
    );
    if let Some(steps) = outcome.idle_slot_steps {
        println!(
            "  steps in which slots were idle while requests waited for them, beside the first of each time: {steps}"
        );
    }
}

fn main() {
    let args = Args::parse();
    let (workload, server) = (args.workload(), args.server());
    if let Some(slo) = args.slo_ms {
        let adapters = capacity::largest(&workload, &server, slo / 1e3, &mut |tried| println!("{tried}"));
        println!("{adapters} adapters of this mix fit one GPU within {slo} ms");
        return;
    }
    println!(
        "{} adapters of ranks {:?}, {}, {:?}, {} requests, {} tenants, {} of the sources hang",
        workload.adapters,
        workload.lora_ranks,
        workload.popularity,
        workload.arrivals,
        workload.requests,
        workload.tenants,
        workload.hanging
    );
    print("ours", &ours::run(&workload, &server));
    print("LoRAX as it is", &lorax::run(&workload, &server));
    print("in order, one loader", &fcfs::run(&workload, &server, 1));
    print("in order, 16 loaders", &fcfs::run(&workload, &server, 16));
}
