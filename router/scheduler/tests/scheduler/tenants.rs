//! Tenants: shares by weight, and how long one waits while another has queued all that it can.

use std::time::Duration;

use scheduler::{AGED_SHARE, Limits, OVERDUE, Request, RequestId, Tenant};

use crate::{
    shard::Payload,
    world::{World, key, limits, prompt, request},
};

const HOG: u64 = 1;
const GUEST: u64 = 2;

/// Blocks for all seats, and blocks that long answers exhaust.
const ROOMY: u32 = 2_000;
const TIGHT: u32 = 200;

fn of(tenant: u64, request: Request<Payload>) -> Request<Payload> {
    Request { tenant: Tenant { id: tenant, weight: 1 }, ..request }
}

/// A server of a tenant that has 10,000 requests for this many adapters, after some time.
fn flooded(limits: Limits, adapters: u16, prompt_len: usize, max_new: u32) -> World {
    let (seats, memory) = (limits.max_sequences as usize, limits.num_blocks);
    let mut world = World::new(limits);
    for id in 0..10_000 {
        let adapter = if adapters == 0 { 0 } else { 1 + (id % u64::from(adapters)) as u16 };
        world.submit(of(HOG, request(id, adapter, prompt(id, prompt_len), max_new))).unwrap();
    }
    for _ in 0..300 {
        world.turn();
    }
    let stats = world.scheduler.stats();
    // Long prompts take all rows instead.
    let busy =
        if memory == TIGHT { stats.preemptions > 0 } else { stats.running == seats || prompt_len > 20 };
    assert!(busy, "all seats or all blocks are taken: {stats:?}");
    world
}

/// Submits a request and returns in which of the following steps it has its first rows, and whether they end its
/// prompt.
fn first_rows(world: &mut World, guest: Request<Payload>) -> (usize, bool) {
    let id = guest.id;
    world.submit(guest).unwrap();
    for step in 1..100 {
        let plan = loop {
            if let Some(plan) = world.plan() {
                break plan;
            }
            let mut answered = false;
            while world.answer(0, true) {
                answered = true;
            }
            assert!(world.run().is_some() || answered, "nothing is left to do");
        };
        if let Some(rows) = plan.rows.iter().find(|rows| rows.id == id) {
            return (step, rows.sample);
        }
    }
    panic!("{id:?} has no rows in 100 steps");
}

const ID: u64 = 1_000_000;

fn until_ended(world: &mut World, id: u64) {
    while world.open.contains_key(&RequestId(id)) {
        assert!(world.turn(), "request {id} does not end");
    }
}

#[test]
fn a_guest_passes_ten_thousand_requests_of_another_tenant() {
    // Over one adapter and over a thousand; short answers, and long ones that leave no seat.
    for (adapters, prompt_len, max_new, num_blocks) in [
        (0, 4, 10, ROOMY),
        (1, 4, 10, ROOMY),
        (1, 4, 600, ROOMY),
        (1, 4, 600, TIGHT),
        (1, 30, 10, ROOMY),
        (1, 300, 10, ROOMY),
        (4, 4, 600, ROOMY),
        (1_000, 4, 10, ROOMY),
        (1_000, 4, 600, ROOMY),
        (1_000, 4, 600, TIGHT),
    ] {
        let case = format!(
            "{adapters} adapters, prompts of {prompt_len}, answers of {max_new}, {num_blocks} blocks"
        );
        let mut world = flooded(Limits { num_blocks, ..limits() }, adapters, prompt_len, max_new);
        for round in 0..5 {
            // The base model is always there, and so is an adapter that the others keep in use.
            let adapter = if (1..=4).contains(&adapters) { 1 } else { 0 };
            let guest = of(GUEST, request(ID + round, adapter, prompt(ID + round, 8), 3));
            assert_eq!(first_rows(&mut world, guest), (1, true), "{case}");
            until_ended(&mut world, ID + round);
        }
    }
}

#[test]
fn a_guest_with_an_adapter_of_its_own_waits_for_its_load_alone() {
    // The hog wants every slot, but uses four of them at most at a time.
    let mut world =
        flooded(Limits { num_slots: 6, max_sequences: 4, num_blocks: ROOMY, ..limits() }, 1_000, 4, 30);
    for round in 0..10 {
        let adapter = 2_000 + round as u16;
        world.submit(of(GUEST, request(ID + round, adapter, prompt(ID + round, 8), 3))).unwrap();
        while world.scheduler.stats().in_flight == scheduler::MAX_IN_FLIGHT {
            world.run();
        }
        let loads = world.plan().unwrap().load;
        assert!(loads.iter().any(|&(_, loaded)| loaded == key(adapter)), "round {round}: {loads:?}");
        while world.run().is_some() {}
        while world.answer(0, true) {}
        let rows = world.plan().unwrap().rows;
        assert!(rows.iter().any(|rows| rows.id == RequestId(ID + round) && rows.sample), "round {round}");
        until_ended(&mut world, ID + round);
    }
}

#[test]
fn a_guest_with_a_long_prompt_gets_half_of_the_prompt_rows() {
    let limits = Limits { num_blocks: 400, max_rows: 512, max_prefill_rows: Some(64), ..limits() };
    let mut world = World::new(limits);
    for id in 0..100 {
        world.submit(of(HOG, request(id, 0, prompt(id, 150), 30))).unwrap();
    }
    (0..50).for_each(|_| assert!(world.turn()));
    world.submit(of(GUEST, request(ID, 0, prompt(ID, 300), 3))).unwrap();
    let mut rows = Vec::new();
    while rows.iter().sum::<u32>() < 300 {
        let Some(plan) = world.plan() else {
            world.run().unwrap();
            continue;
        };
        rows.extend(plan.rows.iter().filter(|rows| rows.id == RequestId(ID)).map(|own| own.rows));
    }
    assert!(rows.len() <= 300_usize.div_ceil(32), "{rows:?}");
    world.run_to_end();
}

#[test]
fn each_of_many_guests_gets_a_seat_while_anybody_has_two() {
    let mut world = flooded(Limits { num_blocks: ROOMY, ..limits() }, 1, 4, 200);
    for guest in 0..20 {
        world.submit(of(100 + guest, request(ID + guest, 0, prompt(ID + guest, 8), 60))).unwrap();
    }
    world.plan();
    let stats = world.scheduler.stats();
    assert_eq!((stats.running, stats.preempted), (8, 7), "the hog keeps its oldest sequence");
    // The other guests follow as seats become free, ahead of those that the hog has lost.
    let guests = |world: &World| (0..20).filter(|id| world.open.contains_key(&RequestId(ID + id))).count();
    let mut turns = 0;
    while guests(&world) > 0 {
        assert!(world.turn());
        turns += 1;
    }
    assert!(turns < 3 * 70, "{turns} turns");
    world.plan();
    assert_eq!(world.scheduler.stats().running, 8);
}

#[test]
fn a_guest_takes_no_more_blocks_than_its_share() {
    // Half of 64 blocks of 4 are 128 positions.
    for (len, at_once) in [(120, true), (126, true), (140, false), (200, false)] {
        let mut world = World::new(Limits { max_rows: 512, max_prefill_rows: Some(512), ..limits() });
        for id in 0..100 {
            world.submit(of(HOG, request(id, 0, prompt(id, 12), 20))).unwrap();
        }
        (0..30).for_each(|_| assert!(world.turn()));
        assert!(world.scheduler.stats().running > 4);
        let (step, _) = first_rows(&mut world, of(GUEST, request(ID, 0, prompt(ID, len), 1)));
        assert_eq!(step == 1, at_once, "{len} tokens: step {step}");
        world.run_to_end();
    }
}

#[test]
fn a_guest_does_not_wait_for_blocks_that_another_guest_needs() {
    // Half of 64 blocks of 4 are 128 positions; prompts that need more, of one tenant and of several.
    for (len, others) in [(140, 1), (140, 3), (200, 1), (200, 5), (250, 1), (250, 8)] {
        let mut world = World::new(Limits { max_rows: 512, max_prefill_rows: Some(512), ..limits() });
        for id in 0..100 {
            world.submit(of(HOG, request(id, 0, prompt(id, 12), 20))).unwrap();
        }
        (0..30).for_each(|_| assert!(world.turn()));
        assert!(world.scheduler.stats().running > 4);
        for other in 1..=others {
            let (tenant, id) = (GUEST + other, ID + other);
            world.submit(of(tenant, request(id, 0, prompt(id, len), 1))).unwrap();
        }
        for round in 0..2 {
            let id = 2 * ID + round;
            let guest = of(GUEST, request(id, 0, prompt(id, 8), 1));
            assert_eq!(first_rows(&mut world, guest).0, 1, "round {round} beside {others} of {len} tokens");
            until_ended(&mut world, id);
        }
        world.run_to_end();
    }
}

/// Virtual tokens of each of the given tenants in a number of turns, while all of them always have requests waiting.
fn shares(limits: Limits, tenants: &[(Tenant, u16, u32)], turns: usize) -> Vec<f64> {
    let mut world = World::new(limits);
    let mut next = 0;
    let mut submit = |world: &mut World, index: usize| {
        let (tenant, adapters, answer) = tenants[index];
        let id = next * 16 + index as u64;
        let adapter = 1 + index as u16 * 1_000 + (next % u64::from(adapters)) as u16;
        next += 1;
        world.submit(Request { tenant, ..request(id, adapter, prompt(id, 4), answer) }).unwrap();
    };
    for _ in 0..40 {
        (0..tenants.len()).for_each(|index| submit(&mut world, index));
    }
    for _ in 0..turns {
        let before = world.finished.len();
        world.turn();
        let ended: Vec<_> = world.finished[before..].iter().map(|id| (id.0 % 16) as usize).collect();
        ended.into_iter().for_each(|index| submit(&mut world, index));
    }
    let of = |tenant: u64| {
        let own = world.service.iter().filter(|((id, _), _)| *id == tenant);
        own.map(|(_, &service)| service as f64).sum()
    };
    tenants.iter().map(|(tenant, ..)| of(tenant.id)).collect()
}

#[test]
fn tenants_share_by_weight_whatever_they_ask_for() {
    let tenant = |id, weight| Tenant { id, weight };
    let many = Limits { num_blocks: 400, num_slots: 200, ..limits() };
    // Weights 1 to 3, equal and unequal answers, one adapter and many, and three tenants.
    let cases: [&[(Tenant, u16, u32)]; 11] = [
        &[(tenant(1, 1), 1, 20), (tenant(2, 3), 1, 20)],
        &[(tenant(1, 1), 1, 12), (tenant(2, 3), 1, 48)],
        &[(tenant(1, 1), 1, 48), (tenant(2, 3), 1, 12)],
        &[(tenant(1, 1), 40, 20), (tenant(2, 3), 1, 20)],
        &[(tenant(1, 1), 1, 20), (tenant(2, 3), 40, 20)],
        &[(tenant(1, 1), 40, 48), (tenant(2, 3), 40, 12)],
        &[(tenant(1, 1), 1, 20), (tenant(2, 1), 100, 20)],
        &[(tenant(1, 10), 1, 20), (tenant(2, 30), 1, 20)],
        &[(tenant(1, 1), 1, 20), (tenant(2, 2), 5, 30), (tenant(3, 3), 20, 40)],
        &[(tenant(1, 0), 1, 20), (tenant(2, 3), 1, 20)],
        &[(tenant(1, u32::MAX), 1, 20), (tenant(2, 1 << 16), 1, 20)],
    ];
    for case in cases {
        let shares = shares(many.clone(), case, 4_000);
        let weights = case.iter().map(|(tenant, ..)| f64::from(tenant.weight.clamp(1, 1 << 16)));
        let (total, weight) = (shares.iter().sum::<f64>(), weights.clone().sum::<f64>());
        for (share, expected) in shares.iter().zip(weights) {
            let relative = (share / total) / (expected / weight);
            assert!((0.95..1.05).contains(&relative), "{case:?}: {shares:?}");
        }
    }
}

#[test]
fn a_flow_in_debt_is_served_in_a_stream_of_newcomers() {
    // Every turn brings a tenant that nobody has seen before. In turn, all of them come before the one that has had
    // much already.
    let limits =
        Limits { max_sequences: 2, num_blocks: 400, max_rows: 300, max_prefill_rows: Some(300), ..limits() };
    let mut world = World::new(limits);
    world.submit(of(HOG, request(0, 0, prompt(0, 250), 100))).unwrap();
    (0..90).for_each(|_| assert!(world.turn()));
    (1..3).for_each(|id| world.submit(of(HOG, request(id, 0, prompt(id, 4), 2))).unwrap());
    let begun = world.now;
    let mut served = Vec::new();
    for id in 100..1_300 {
        world.submit(of(id, request(id, 0, prompt(id, 2), 1))).unwrap();
        world.submit(of(10_000 + id, request(10_000 + id, 0, prompt(id, 2), 1))).unwrap();
        let before = world.finished.len();
        world.turn();
        served.extend(world.finished[before..].iter().filter(|id| [1, 2].contains(&id.0)).map(|_| world.now));
    }
    assert_eq!(served.len(), 2, "{served:?}");
    // Each costs 8 virtual tokens, and a turn serves 4 or more. A flow becomes overdue again OVERDUE after an
    // admission.
    let turn = Duration::from_millis(10);
    let bound = OVERDUE + turn * (AGED_SHARE as u32 * 8 / 4 + 4);
    assert!(served[0] - begun > OVERDUE && served[0] - begun < bound, "{served:?}");
    assert!(served.windows(2).all(|pair| pair[1] - pair[0] < bound), "{served:?}");
}
