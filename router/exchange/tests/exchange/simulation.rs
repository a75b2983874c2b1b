//! Whole servers in virtual time: the scheduler and the exchange together, against sources that hang and loads in bursts.
//! The simulator is the example `simulate`.

#[path = "../../examples/simulate/capacity.rs"]
mod capacity;
#[path = "../../examples/simulate/costs.rs"]
mod costs;
#[path = "../../examples/simulate/fcfs.rs"]
mod fcfs;
#[path = "../../examples/simulate/lorax.rs"]
mod lorax;
#[path = "../../examples/simulate/ours.rs"]
mod ours;
#[path = "../../examples/simulate/report.rs"]
mod report;
#[path = "../../examples/simulate/workload.rs"]
mod workload;

use std::time::Duration;

use costs::Server;
use report::Moves;
use workload::{Arrivals, Popularity, Workload};

/// Small adapters on a small server, which holds 16 of them in slots and 60 in host memory.
fn server() -> Server {
    Server {
        slots: 16,
        slot_bytes: u64::MAX / 4,
        host_bytes: 60 * 32 * 1000,
        disk_bytes: u64::MAX / 4,
        seats: 32,
        cycle_time: Duration::from_secs(2),
        step: 0.008,
        row: 60e-6,
        prompt_row: 25e-6,
        copy_rate: 1e9,
        stage_rate: 1e8,
        fetch_rate: 1e6,
        lookup: 0.05,
    }
}

/// Two hundred adapters of mixed ranks.
fn workload() -> Workload {
    Workload {
        adapters: 200,
        lora_ranks: vec![8, 16, 32, 64],
        bytes_per_rank: 1000,
        popularity: Popularity::Zipf(1.0),
        arrivals: Arrivals::Open { rate: 30.0, cv: 1.0 },
        requests: 1500,
        tenants: 10,
        prompt: 64,
        answer: 16,
        equal_lengths: false,
        warm_up: 0.0,
        on_disk: false,
        hanging: 0.0,
        seed: 1,
    }
}

#[test]
fn every_load_is_served() {
    for popularity in
        [Popularity::Zipf(1.0), Popularity::Zipf(0.6), Popularity::Uniform, Popularity::RoundRobin]
    {
        for arrivals in [
            Arrivals::Open { rate: 30.0, cv: 1.0 },
            Arrivals::Open { rate: 30.0, cv: 8.0 },
            Arrivals::Closed { streams: 40 },
        ] {
            let workload = Workload { popularity, arrivals, ..workload() };
            let outcome = ours::run(&workload, &server());
            let failed = outcome.figures().failed;
            assert_eq!((outcome.served.len(), failed), (1500, 0), "{popularity}, {arrivals:?}");
            assert_eq!(outcome.disk, Moves { loads: outcome.disk.loads, ..Moves::default() });
            assert_eq!(outcome.host.needed, 0, "{popularity}, {arrivals:?}: {:?}", outcome.host);
            assert!(outcome.host.evictions > 100, "host memory is short: {:?}", outcome.host);
        }
    }
}

#[test]
fn the_same_load_gives_the_same_outcome() {
    let run = || {
        let outcome = ours::run(&Workload { hanging: 0.02, ..workload() }, &server());
        (outcome.figures(), outcome.ended, outcome.host, outcome.device)
    };
    assert_eq!(run(), run());
}

#[test]
fn sources_that_hang_fail_their_own_requests_and_delay_no_others() {
    let healthy = ours::run(&workload(), &server()).figures();
    for hanging in [0.01, 0.02, 0.05] {
        let workload = Workload { hanging, ..workload() };
        let expected = workload.jobs().iter().filter(|job| workload.hangs(job.adapter)).count();
        let outcome = ours::run(&workload, &server());
        let figures = outcome.figures();
        assert!(expected > 5, "{expected} requests name them");
        assert_eq!(figures.failed, expected, "{hanging}");
        let failed = outcome.served.iter().filter(|served| served.times.is_none());
        assert!(failed.into_iter().all(|served| workload.hangs(served.adapter)));
        // Fewer requests are served, so waits may be shorter as well.
        assert!(
            figures.p99 <= healthy.p99 * 1.05 && figures.p50 <= healthy.p50 * 1.05,
            "{figures:?} {healthy:?}"
        );
        let fcfs = fcfs::run(&workload, &server(), 16).figures();
        assert!(fcfs.p99 > 10.0 * figures.p99 && fcfs.jain < figures.jain, "{fcfs:?}");
    }
}

#[test]
fn one_adapter_after_the_other_evicts_nothing_that_is_needed_next() {
    // More adapters than slots, with room for all in host memory, and more streams than slots.
    let workload = Workload {
        popularity: Popularity::RoundRobin,
        arrivals: Arrivals::Closed { streams: 32 },
        tenants: 1,
        lora_ranks: vec![16],
        adapters: 100,
        ..workload()
    };
    let outcome = ours::run(&workload, &server());
    assert_eq!([outcome.disk.needed, outcome.host.needed, outcome.device.needed], [0; 3]);
    assert_eq!(outcome.idle_slot_steps, Some(0), "every swap is hidden");
    assert!(outcome.device.evictions > 1000, "{:?}", outcome.device);
}

#[test]
fn few_slots_for_many_adapters_cost_two_in_a_hundred_tokens() {
    // The same server and lengths: 32 streams over 32 adapters, and 64 over 256 with as many slots, where half of the
    // streams wait.
    for (equal_lengths, tenants) in [(true, 1), (true, 20), (false, 1), (false, 20), (false, 256)] {
        let run = |adapters, streams| {
            let arrivals = Arrivals::Closed { streams };
            let (prompt, answer, requests, lora_ranks) = (512, 128, 1500, vec![16]);
            let popularity = Popularity::RoundRobin;
            let load = Workload {
                adapters,
                arrivals,
                popularity,
                prompt,
                answer,
                requests,
                lora_ranks,
                ..workload()
            };
            let load = Workload { equal_lengths, tenants, bytes_per_rank: 5_250_000, on_disk: true, ..load };
            let (slot_bytes, host_bytes) = (u64::MAX / 4, u64::MAX / 4);
            let server = Server { slots: 32, seats: 256, slot_bytes, host_bytes, ..server() };
            let server = Server { copy_rate: 50e9, stage_rate: 2e9, ..server };
            ours::run(&load, &server)
        };
        let (few, many) = (run(32, 32), run(256, 64));
        let ratio = many.figures().tokens_per_second / few.figures().tokens_per_second;
        let case =
            format!("{equal_lengths}, {tenants} tenants: {ratio}, {:?} {:?}", many.figures(), many.device);
        assert!(ratio >= 0.98, "{case}");
        assert_eq!((many.device.needed, many.idle_slot_steps), (0, Some(0)), "{case}");
        assert!(many.figures().p99 < 3.5, "{case}");
    }
}

#[test]
fn lorax_serves_every_load_and_stops_its_steps_for_every_adapter() {
    for popularity in [Popularity::Zipf(1.0), Popularity::Uniform, Popularity::RoundRobin] {
        for arrivals in [Arrivals::Open { rate: 30.0, cv: 4.0 }, Arrivals::Closed { streams: 40 }] {
            for hanging in [0.0, 0.02] {
                let workload = Workload { popularity, arrivals, hanging, ..workload() };
                let outcome = lorax::run(&workload, &server());
                let expected = workload.jobs().iter().filter(|job| workload.hangs(job.adapter)).count();
                let (lorax, ours) = (outcome.figures(), ours::run(&workload, &server()).figures());
                let case = format!("{popularity}, {arrivals:?}, {hanging}: {lorax:?} {ours:?}");
                assert_eq!((outcome.served.len(), lorax.failed), (1500, expected), "{case}");
                assert!(
                    lorax.p99 > 2.0 * ours.p99 && lorax.tokens_per_second < ours.tokens_per_second,
                    "{case}"
                );
            }
        }
    }
}

#[test]
fn bursts_wait_less_than_with_one_loader_in_the_order_of_arrival() {
    for cv in [1.0, 4.0, 8.0] {
        let workload = Workload { arrivals: Arrivals::Open { rate: 30.0, cv }, ..workload() };
        let ours = ours::run(&workload, &server()).figures();
        let one = fcfs::run(&workload, &server(), 1).figures();
        assert!(ours.p50 < one.p50 && ours.p99 < one.p99 && ours.jain > one.jain, "{cv}: {ours:?} {one:?}");
        // With many loaders and no faults, only the lookups make a difference.
        let many = fcfs::run(&workload, &server(), 16).figures();
        assert!(ours.p99 < many.p99 + 2.0 * server().lookup, "{cv}: {ours:?} {many:?}");
    }
}

#[test]
fn capacity_grows_with_what_is_allowed() {
    let workload = Workload { requests: 400, on_disk: true, ..workload() };
    let capacity = |slo| {
        let mut tried = Vec::new();
        let largest = capacity::largest(&workload, &server(), slo, &mut |one| tried.push(one.to_string()));
        let verdict = format!("{largest:>6} adapters:");
        let own = tried.iter().find(|line| line.starts_with(&verdict));
        assert!(largest == 0 || own.is_some_and(|line| line.ends_with(": fit")), "{tried:?}");
        largest
    };
    let capacities = [0.001, 0.1, 0.3, 1.0].map(capacity);
    assert_eq!(capacities[0], 0, "no request has its first token in a millisecond");
    assert!(capacities.is_sorted() && capacities[3] > capacities[1], "{capacities:?}");
}
