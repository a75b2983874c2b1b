//! Adapter slots: loads ahead of time, pins, the least recently used, the budget in bytes.

use std::{collections::BTreeMap, time::Duration};

use scheduler::{AdapterKey, FailReason, Limits, Request, RequestId, Scheduler, Tenant};

use crate::world::{World, adapter, key, limits, prompt, request};

/// Runs a request of the adapter alone, and returns the loads of adapters and the slots emptied for it.
fn use_once(world: &mut World, id: u64, number: u16) -> (usize, usize) {
    let (mut loads, mut unloads) = (0, 0);
    world.submit(request(id, number, prompt(id, 3), 2)).unwrap();
    loop {
        while let Some(plan) = world.plan() {
            loads += plan.load.len();
            unloads += plan.unload.len();
        }
        if !world.turn() {
            return (loads, unloads);
        }
    }
}

#[test]
fn an_adapter_stays_until_its_slot_is_needed_and_the_least_recently_used_leaves() {
    let mut world = World::new(Limits { num_slots: 2, ..limits() });
    for (id, (number, expected)) in
        [(1, (1, 0)), (2, (1, 0)), (1, (0, 0)), (3, (1, 1)), (1, (0, 0)), (2, (1, 1)), (3, (1, 1))]
            .into_iter()
            .enumerate()
    {
        assert_eq!(use_once(&mut world, id as u64, number), expected, "use {id}, of adapter {number}");
    }
    world.run_to_end();
}

#[test]
fn the_budget_in_bytes_holds_beside_the_slots() {
    // Adapters take 10 bytes each.
    let mut world = World::new(Limits { adapter_bytes: 25, ..limits() });
    for (id, (number, expected)) in [(1, (1, 0)), (2, (1, 0)), (3, (1, 1))].into_iter().enumerate() {
        assert_eq!(use_once(&mut world, id as u64, number), expected);
    }
    assert_eq!(world.scheduler.stats().resident_adapters, 2);
    // One that takes all the room.
    let mut large = request(9, 9, vec![1], 1);
    large.adapters = Some(scheduler::Adapter { key: key(9), bytes: 25 }).into();
    world.submit(large).unwrap();
    assert_eq!(world.plan().unwrap().unload.len(), 2);
    while world.plan().is_some() || world.scheduler.stats().in_flight > 0 {
        let Some(step) = world.run() else { break };
        assert!(step.is_empty());
    }
    world.run_to_end();
}

#[test]
fn a_slow_load_delays_only_its_own_requests() {
    let mut world = World::new(limits());
    world.submit(request(1, 1, prompt(1, 3), 5)).unwrap();
    world.submit(request(2, 0, prompt(2, 3), 5)).unwrap();
    world.submit(request(3, 2, prompt(3, 3), 5)).unwrap();
    assert_eq!(world.plan().unwrap().load, [(0, key(1)), (1, key(2))]);
    world.run();
    assert!(world.answer(1, true), "the second load ends first");
    while world.plan().is_some() {
        world.run();
    }
    assert_eq!(world.open.keys().collect::<Vec<_>>(), [&RequestId(1)]);
    world.run_to_end();
}

#[test]
fn adapters_load_while_all_seats_are_taken() {
    let mut world = World::new(Limits { max_sequences: 1, ..limits() });
    world.submit(request(1, 0, prompt(1, 3), 20)).unwrap();
    world.turn();
    world.submit(request(2, 1, prompt(2, 3), 1)).unwrap();
    let plan = world.plan().unwrap();
    assert_eq!((plan.load, plan.rows.len()), (vec![(0, key(1))], 1));
    world.run_to_end();
}

#[test]
fn a_failed_load_fails_those_who_wait_and_no_others() {
    let mut world = World::new(limits());
    for (id, number) in [(1, 1), (2, 2), (3, 1), (4, 0)] {
        world.submit(request(id, number, prompt(id, 3), 3)).unwrap();
    }
    world.plan();
    world.run();
    assert!(world.answer(0, false));
    let reason = FailReason::AdapterLoad(key(1));
    assert_eq!(world.failed.iter().collect::<Vec<_>>(), [(&RequestId(1), &reason), (&RequestId(3), &reason)]);
    // The next request tries again.
    world.submit(request(5, 1, prompt(5, 3), 3)).unwrap();
    world.run_to_end();
    assert!([2, 4, 5].iter().all(|&id| world.finished.contains(&RequestId(id))));
}

#[test]
fn answers_that_nobody_waits_for_are_ignored() {
    let mut world = World::new(limits());
    assert_eq!(use_once(&mut world, 1, 1), (1, 0));
    for (slot, number) in [(0, 1), (0, 2), (3, 1), (99, 1)] {
        world.scheduler.slot_ready(slot, key(number));
        assert_eq!(world.scheduler.slot_failed(slot, key(number)), []);
        world.scheduler.check();
    }
    assert_eq!(use_once(&mut world, 2, 1), (0, 0), "still resident");
}

#[test]
fn a_load_whose_requests_are_gone_ends_all_the_same() {
    for well in [true, false] {
        let mut world = World::new(Limits { num_slots: 1, ..limits() });
        world.submit(request(1, 1, vec![1], 1)).unwrap();
        world.plan();
        world.cancel(RequestId(1));
        world.submit(request(2, 2, vec![1], 1)).unwrap();
        assert!(world.plan().is_none(), "the slot cannot be taken while it is loading");
        world.run();
        assert!(world.answer(0, well));
        assert_eq!(world.plan().unwrap().load, [(0, key(2))]);
        world.run_to_end();
    }
}

#[test]
fn a_slot_in_use_is_not_taken() {
    let mut world = World::new(Limits { num_slots: 1, ..limits() });
    world.submit(request(1, 1, prompt(1, 3), 20)).unwrap();
    world.turn();
    world.submit(request(2, 2, prompt(2, 3), 1)).unwrap();
    while world.open.contains_key(&RequestId(1)) {
        let plan = world.plan();
        assert!(plan.is_none_or(|plan| plan.unload.is_empty() && plan.load.is_empty()));
        world.run();
    }
    world.run_to_end();
}

/// As many adapters as there are slots, each in one and with its slice behind it.
fn warm(limits: Limits) -> World {
    let mut world = World::new(limits);
    for number in 1..=4 {
        world.submit(request(u64::from(number), number, prompt(1, 1100), 2)).unwrap();
        world.run_to_end();
    }
    world
}

#[test]
fn a_burst_for_one_adapter_too_many_loads_that_one_alone() {
    for seats in [1, 3, 8] {
        let mut world = warm(Limits { num_slots: 4, num_blocks: 400, max_sequences: seats, ..limits() });
        // The one without a slot comes first, in the middle, and last.
        for (round, numbers) in [[5, 1, 2, 3, 4], [1, 2, 6, 3, 4], [1, 2, 3, 4, 7]].into_iter().enumerate() {
            for (id, number) in (100 + 10 * round as u64..).zip(numbers) {
                world.submit(request(id, number, prompt(id, 3), 3)).unwrap();
            }
            let plan = world.plan().unwrap();
            assert!(plan.load.len() <= 1, "{seats} seats: {:?}", plan.load);
            assert!(!plan.added.is_empty(), "{seats} seats");
            world.run_to_end();
        }
    }
}

#[test]
fn overdue_adapters_do_not_take_slots_of_each_other() {
    let mut world = warm(Limits { num_slots: 4, num_blocks: 400, max_sequences: 2, ..limits() });
    for id in 100..102 {
        world.submit(request(id, 0, prompt(id, 3), 1400)).unwrap();
    }
    world.turn();
    for number in 1..=5 {
        world.submit(request(200 + u64::from(number), number, prompt(2, 3), 3)).unwrap();
    }
    let mut loads = 0;
    while world.open.contains_key(&RequestId(100)) {
        while let Some(plan) = world.plan() {
            loads += plan.load.len();
        }
        world.turn();
    }
    assert!(world.now > scheduler::OVERDUE, "{:?}", world.now);
    assert!(loads <= 1, "{loads} loads while nobody could start");
    world.run_to_end();
}

#[test]
fn adapters_that_shards_hold_at_the_start_stay_in_their_slots() {
    let resident = |entries: &[(u32, u16)]| {
        let adapter = |&(slot, number): &(u32, u16)| (slot, adapter(number).unwrap());
        entries.iter().map(adapter).collect::<Vec<_>>()
    };
    // What is in slots, the limit in bytes, the slots that are emptied, and the loads for requests of adapters 1 to 3.
    for (entries, bytes, unloaded, loads) in [
        (&[][..], 0, &[][..], 3),
        (&[(0, 1)], 0, &[], 2),
        (&[(3, 1)], 0, &[], 2),
        (&[(0, 1), (1, 2), (2, 3)], 0, &[], 0),
        (&[(2, 3), (0, 1)], 0, &[], 1),
        (&[(0, 1), (1, 1)], 0, &[1], 2),
        (&[(0, 1), (0, 2)], 0, &[0], 2),
        (&[(0, 1), (1, 2), (2, 3)], 30, &[], 0),
        (&[(0, 1), (1, 2), (2, 3)], 29, &[2], 0),
        (&[(0, 1), (1, 9), (2, 8), (3, 7)], 0, &[], 2),
        (&[(0, 1), (9, 2)], 0, &[9], 2),
    ] {
        let limits = Limits { adapter_bytes: bytes, ..limits() };
        let mut scheduler = Scheduler::new(limits, &resident(entries));
        scheduler.check();
        let kept = entries.len() - unloaded.len();
        assert_eq!(scheduler.stats().resident_adapters, kept, "{entries:?}");
        for number in 1..=3 {
            let request = request(number, number as u16, prompt(number, 3), 3);
            scheduler.submit(request, Duration::ZERO).unwrap();
        }
        let plan = scheduler.next_step(Duration::ZERO).unwrap();
        scheduler.check();
        assert!(plan.unload.starts_with(unloaded), "{entries:?}: {:?}", plan.unload);
        assert_eq!(plan.load.len(), loads, "{entries:?}");
        let ready = entries[..].iter().filter(|(_, number)| *number <= 3).count() - unloaded.len();
        assert_eq!(plan.added.len(), ready, "{entries:?}: those of resident adapters start at once");
    }
}

#[test]
fn an_adapter_of_several_tenants_has_one_slot() {
    let mut world = World::new(Limits { num_slots: 1, ..limits() });
    for id in 0..12 {
        let tenant = Tenant { id: id % 4, weight: 1 };
        world.submit(Request { tenant, ..request(id, 1, prompt(id, 3), 5) }).unwrap();
    }
    let plan = world.plan().unwrap();
    assert_eq!((plan.load, plan.added.len()), (vec![(0, key(1))], 0));
    world.run();
    assert!(world.answer(0, false), "the load fails for all tenants");
    assert_eq!(world.failed.len(), 12);
    for id in 20..32 {
        let tenant = Tenant { id: id % 4, weight: 1 };
        world.submit(Request { tenant, ..request(id, 1, prompt(id, 3), 5) }).unwrap();
    }
    world.run_to_end();
    assert_eq!(world.finished.len(), 12);
}

/// Slots whose adapters left them before the request for which they were loaded had begun, while as many clients as
/// there are streams ask for one adapter after the other.
fn wasted_loads(slots: u32, tenants: u64, streams: u64, adapters: u64) -> usize {
    let mut world = World::new(Limits { num_slots: slots, num_blocks: 400, max_sequences: 6, ..limits() });
    // By slot: the adapter, and whether a sequence has used it.
    let mut held: BTreeMap<u32, (AdapterKey, bool)> = BTreeMap::new();
    let (mut submitted, mut wasted) = (0, 0);
    while world.finished.len() < 400 {
        while (world.open.len() as u64) < streams {
            let adapter = 1 + submitted % adapters;
            let tenant = Tenant { id: adapter % tenants, weight: 1 };
            let tokens = 3 + (submitted * 7 % 11) as u32;
            let request = request(submitted, adapter as u16, prompt(submitted, 5), tokens);
            world.submit(Request { tenant, ..request }).unwrap();
            submitted += 1;
        }
        while let Some(plan) = world.plan() {
            let left = plan.unload.iter().filter_map(|slot| held.remove(slot));
            let unused = left.filter(|(key, used)| !used && world.waits_for(*key)).count();
            wasted += unused;
            held.extend(plan.load.iter().map(|&(slot, key)| (slot, (key, false))));
            for slot in plan.added.iter().flat_map(|added| added.slots.iter().copied()) {
                held.entry(slot).and_modify(|(_, used)| *used = true);
            }
        }
        world.turn();
    }
    world.run_to_end();
    wasted
}

#[test]
fn an_adapter_is_used_before_its_slot_goes_to_another() {
    for (slots, tenants, streams, adapters) in [
        (4, 1, 12, 40),
        (4, 2, 12, 40),
        (4, 5, 12, 40),
        (4, 10, 12, 40),
        (8, 5, 16, 40),
        (8, 20, 16, 60),
        (8, 60, 16, 60),
        (12, 20, 20, 60),
        (3, 20, 20, 60),
        (2, 3, 10, 9),
        (6, 7, 30, 35),
    ] {
        let wasted = wasted_loads(slots, tenants, streams, adapters);
        // Where adapters are loaded ahead of the six seats, a tenant without one may take such a slot from one with
        // several.
        let most = if tenants > 1 { 400 / 10 } else { 0 };
        assert!(
            wasted <= most,
            "{wasted} of {slots} slots, {tenants} tenants, {streams} streams, {adapters} adapters"
        );
    }
}
