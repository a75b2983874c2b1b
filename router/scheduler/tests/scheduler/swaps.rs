//! More adapters than slots: swaps are hidden, nobody's adapter leaves for no use, and nobody waits for long.

use std::{collections::BTreeMap, time::Duration};

use scheduler::{Limits, Request, RequestId, Stats, Tenant};

use crate::world::{World, key, limits, prompt, request};

/// A turn of the world.
const TURN: Duration = Duration::from_millis(10);

/// Clients that ask for one adapter after the other, each again as soon as it has its answer.
struct Load {
    streams: usize,
    adapters: u64,
    tenants: u64,
    requests: usize,
    /// The tokens of the answer to a request.
    answer: fn(u64) -> u32,
}

/// What came of a load.
#[derive(Debug)]
struct Outcome {
    turns: u32,
    tokens: u64,
    /// Evictions of adapters for which requests waited.
    needed: usize,
    /// The longest wait to the first rows, and the 99th percentile.
    longest: Duration,
    p99: Duration,
    stats: Stats,
}

fn run(limits: Limits, load: &Load) -> Outcome {
    let mut world = World::new(limits);
    let mut slots = BTreeMap::new();
    let (mut submitted, mut turns, mut needed, mut tokens) = (0, 0, 0, 0);
    let mut waits = BTreeMap::new();
    while world.finished.len() < load.requests {
        while world.open.len() < load.streams && submitted < load.requests as u64 {
            let adapter = 1 + submitted % load.adapters;
            let answer = (load.answer)(submitted);
            let tenant = Tenant { id: adapter % load.tenants, weight: 1 };
            let request = request(submitted, adapter as u16, prompt(submitted, 8), answer);
            world.submit(Request { tenant, ..request }).unwrap();
            submitted += 1;
            tokens += u64::from(answer);
        }
        while let Some(plan) = world.plan() {
            let left = plan.unload.iter().filter_map(|slot| slots.remove(slot));
            needed += left.filter(|key| world.waits_for(*key)).count();
            slots.extend(plan.load.iter().copied());
        }
        waits.extend(world.open.iter().filter_map(|(&id, open)| Some((id, open.started?))));
        world.turn();
        turns += 1;
    }
    let mut waits: Vec<Duration> = waits.into_values().collect();
    waits.sort_unstable();
    let p99 = waits[waits.len() * 99 / 100];
    let longest = *waits.last().unwrap();
    let stats = world.scheduler.stats();
    world.run_to_end();
    Outcome { turns, tokens, needed, longest, p99, stats }
}

fn roomy(num_slots: u32) -> Limits {
    Limits { num_slots, max_sequences: 64, max_rows: 256, num_blocks: 4_000, ..limits() }
}

#[test]
fn round_robin_over_many_adapters_is_as_fast_as_a_slot_for_each() {
    let answer = |_| 128;
    // Answers take 129 turns in slots, and half of the streams have one.
    for tenants in [1, 20, 256] {
        let load = Load { streams: 64, adapters: 256, tenants, requests: 640, answer };
        let many = run(roomy(32), &load);
        let few = run(roomy(32), &Load { streams: 32, adapters: 32, ..load });
        let speed = |outcome: &Outcome| outcome.tokens as f64 / f64::from(outcome.turns);
        let ratio = speed(&many) / speed(&few);
        assert!(ratio >= 0.98, "{tenants} tenants: {ratio}, {many:?} {few:?}");
        assert_eq!((many.needed, many.stats.idle_slot_steps), (0, 0), "{tenants} tenants: {many:?}");
        assert!(many.stats.adapter_evictions > 600, "{many:?}");
    }
}

#[test]
fn swaps_are_hidden_whatever_the_lengths_of_answers() {
    let varied = |request: u64| 20 + (request * 37 % 101) as u32;
    let mixed = |request: u64| if request.is_multiple_of(7) { 300 } else { 30 };
    for (slots, streams, adapters, answer) in [
        (4, 8, 40, varied as fn(u64) -> u32),
        (4, 40, 60, varied),
        (8, 16, 64, varied),
        (8, 64, 256, varied),
        (16, 32, 128, varied),
        (16, 60, 240, mixed),
        (32, 64, 256, varied),
        (32, 64, 256, mixed),
        (32, 40, 100, mixed),
        (48, 64, 300, varied),
        (2, 6, 9, varied),
    ] {
        let load = Load { streams, adapters, tenants: 1, requests: 500, answer };
        let outcome = run(roomy(slots), &load);
        let case = format!("{slots} slots, {streams} streams, {adapters} adapters: {outcome:?}");
        assert_eq!(outcome.stats.idle_slot_steps, 0, "{case}");
        // An adapter may be asked for again while it still runs, and leaves after the cycle time nevertheless.
        let is_rare = adapters >= 4 * streams as u64;
        assert!(!is_rare || outcome.needed == 0, "{case}");
    }
}

#[test]
fn an_adapter_whose_last_answer_was_long_does_not_pay_with_a_long_wait() {
    // Half of the streams have slots, so that the mean wait is as long as an answer. Adapters with more service than
    // others wait longer, until they have waited for the cycle time.
    let mixed = |request: u64| if request.is_multiple_of(7) { 300 } else { 70 };
    let load = Load { streams: 64, adapters: 256, tenants: 1, requests: 1_500, answer: mixed };
    let p99 = |seconds| {
        let limits = Limits { adapter_cycle_time: Duration::from_secs(seconds), ..roomy(32) };
        let outcome = run(limits, &load);
        assert!(outcome.longest < Duration::from_secs(2 * seconds) + TURN * 300, "{outcome:?}");
        outcome.p99
    };
    let (short, long) = (p99(2), p99(60));
    assert!(short < Duration::from_millis(2_500) && long > short * 2, "{short:?} {long:?}");
}

/// The time that a request for another adapter waits for the only slot, whose adapter is asked for again just before each
/// of its answers ends, so that none of its requests ever waits.
fn wait_for_busy(cycle_time: Duration, answer: u32) -> Duration {
    let limits = Limits { num_slots: 1, num_blocks: 2_000, adapter_cycle_time: cycle_time, ..limits() };
    let mut world = World::new(limits);
    let mut next = 0;
    let mut hot = |world: &mut World| {
        world.submit(request(next, 1, prompt(next, 3), answer)).unwrap();
        next += 1;
    };
    hot(&mut world);
    (0..5).for_each(|_| _ = world.turn());
    let (guest, begun) = (RequestId(1_000_000), world.now);
    world.submit(request(guest.0, 2, prompt(1, 3), 1)).unwrap();
    while world.open.contains_key(&guest) {
        let running = world.open.iter().filter(|(id, _)| **id != guest);
        if running.clone().all(|(_, open)| open.got + 2 > answer as usize) && running.count() < 2 {
            hot(&mut world);
        }
        world.turn();
        assert!(world.now < begun + Duration::from_secs(600), "it never starts");
    }
    world.now - begun
}

#[test]
fn a_busy_adapter_keeps_others_out_no_longer_than_the_cycle_time() {
    for (milliseconds, answer) in [
        (50, 20),
        (100, 20),
        (200, 20),
        (500, 20),
        (1_000, 20),
        (2_000, 20),
        (4_000, 20),
        (200, 150),
        (1_000, 150),
        (2_000, 150),
        (2_000, 5),
    ] {
        let cycle_time = Duration::from_millis(milliseconds);
        let waited = wait_for_busy(cycle_time, answer);
        // The sequences that run then end, and the other adapter is loaded.
        let bound = cycle_time + TURN * (2 * answer + 10);
        assert!(waited < bound, "{cycle_time:?}, answers of {answer}: {waited:?}");
        assert!(
            waited + TURN * 10 > cycle_time,
            "{cycle_time:?}, answers of {answer}: it left after {waited:?}"
        );
    }
}

/// The first of some heavy tenants, and a light one.
const HOG: u64 = 1;
const GUEST: u64 = 1_000;

#[test]
fn a_guest_takes_a_slot_that_was_loaded_ahead_of_seats() {
    // Slots, and seats that the hogs' long answers have taken. All other slots have adapters that have not been used yet.
    // No hog has so many seats as all others together if there are several.
    for (hogs, num_slots, max_sequences) in [
        (1, 3, 2),
        (1, 4, 2),
        (1, 8, 2),
        (1, 16, 2),
        (1, 4, 3),
        (1, 9, 3),
        (1, 6, 4),
        (1, 16, 4),
        (1, 7, 6),
        (1, 8, 7),
        (1, 12, 8),
        (2, 6, 4),
        (2, 16, 8),
        (3, 8, 6),
        (3, 12, 7),
        (3, 16, 8),
        (3, 16, 12),
        (4, 10, 8),
        (4, 20, 10),
        (5, 20, 12),
        (6, 24, 16),
        (8, 32, 24),
    ] {
        let mut world = World::new(Limits { num_slots, max_sequences, num_blocks: 4_000, ..limits() });
        for id in 0..100 {
            let tenant = Tenant { id: HOG + id % hogs, weight: 1 };
            world.submit(Request { tenant, ..request(id, 1 + id as u16, prompt(id, 3), 600) }).unwrap();
        }
        (0..30).for_each(|_| _ = world.turn());
        let case = format!("{hogs} hogs, {num_slots} slots, {max_sequences} seats");
        assert_eq!(world.scheduler.stats().resident_adapters, num_slots as usize, "{case}");
        let mut steps = Vec::new();
        for round in 0..5 {
            let (id, adapter) = (1_000 + round, 2_000 + round as u16);
            let guest = request(id, adapter, prompt(id, 8), 3);
            world.submit(Request { tenant: Tenant { id: GUEST, weight: 1 }, ..guest }).unwrap();
            let mut plans = 0;
            loop {
                while world.scheduler.stats().in_flight == scheduler::MAX_IN_FLIGHT {
                    world.run();
                    while world.answer(0, true) {}
                }
                plans += 1;
                let loads = world.plan().map(|plan| plan.load).unwrap_or_default();
                if loads.iter().any(|&(_, loaded)| loaded == key(adapter)) {
                    break;
                }
            }
            steps.push(plans);
            let begun = world.now;
            while world.open.contains_key(&RequestId(id)) {
                assert!(world.turn() && world.now < begun + TURN * 100, "{case}, round {round}");
            }
            (0..10).for_each(|_| _ = world.turn());
        }
        steps.sort_unstable();
        // Of several hogs, the one that has had least goes first, and one with a single seat keeps what is loaded for it.
        let (within, of) = if hogs == 1 { (1, 4) } else { (25, 2) };
        assert!(steps[of] <= within, "{case}: {steps:?}");
    }
}

#[test]
fn equally_heavy_tenants_with_many_adapters_have_equal_shares_of_few_slots() {
    for (hogs, slots, seats) in [
        (2, 4, 8),
        (3, 4, 8),
        (3, 6, 4),
        (3, 8, 16),
        (4, 4, 8),
        (4, 6, 8),
        (5, 8, 8),
        (6, 8, 16),
        (8, 8, 8),
        (10, 4, 8),
    ] {
        let mut world = World::new(Limits { max_sequences: seats, ..roomy(slots) });
        for id in 0..hogs * 150 {
            let tenant = Tenant { id: id % hogs, weight: 1 };
            world.submit(Request { tenant, ..request(id, 1 + id as u16, prompt(id, 8), 40) }).unwrap();
        }
        // While all of them have requests that wait.
        let mut ended = vec![0_usize; hogs as usize];
        while ended.iter().all(|&ended| ended < 60) {
            let before = world.finished.len();
            assert!(world.turn());
            world.finished[before..].iter().for_each(|id| ended[(id.0 % hogs) as usize] += 1);
        }
        let (least, most) = (ended.iter().min().unwrap(), ended.iter().max().unwrap());
        assert!(most - least <= 6, "{hogs} hogs, {slots} slots, {seats} seats: {ended:?}");
    }
}
