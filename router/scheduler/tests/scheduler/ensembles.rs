//! Requests for several adapters: they run when all of them are in slots, and nobody waits with half of them.

use std::{collections::BTreeMap, time::Duration};

use scheduler::{Limits, RequestId, SubmitError};

use crate::world::{World, ensemble, key, limits, prompt, request, tenant};

fn world(num_slots: u32) -> World {
    World::new(Limits { num_slots, ..limits() })
}

#[test]
fn all_adapters_are_loaded_in_one_step_and_pinned_until_the_end() {
    for numbers in [&[1, 2][..], &[2, 1], &[1, 2, 3], &[4, 3, 2, 1]] {
        let mut world = world(4);
        world.submit(ensemble(1, numbers, 0, prompt(1, 5), 4)).unwrap();
        let plan = world.plan().unwrap();
        let loaded: Vec<_> = plan.load.iter().map(|(_, key)| *key).collect();
        assert_eq!(loaded, numbers.iter().map(|&number| key(number)).collect::<Vec<_>>());
        world.run();
        (1..numbers.len()).for_each(|_| assert!(world.answer(0, true)));
        assert!(world.plan().is_none(), "one adapter is missing");
        assert!(world.answer(0, true));
        let added = world.plan().unwrap().added;
        assert_eq!(added[0].slots.len(), numbers.len());
        world.run_to_end();
        assert_eq!(world.scheduler.stats().adapter_evictions, 0);
    }
}

#[test]
fn lists_that_need_each_others_slots_take_turns() {
    for (slots, lists) in [
        (2, &[&[1, 2][..], &[3, 4]][..]),
        (2, &[&[1, 2], &[2, 3], &[3, 1]]),
        (2, &[&[1, 2], &[1], &[2], &[3]]),
        (3, &[&[1, 2], &[3, 4]]),
        (3, &[&[1, 2, 3], &[3, 4], &[5, 1]]),
        (3, &[&[1, 2, 3], &[4, 5, 6]]),
        (4, &[&[1, 2, 3], &[2, 3, 4], &[5, 6]]),
        (4, &[&[1, 2, 3, 4], &[5, 6, 7, 8], &[1, 5]]),
        (4, &[&[1, 2, 3, 4], &[1], &[2], &[3], &[4], &[5]]),
        (5, &[&[1, 2, 3, 4], &[3, 4, 5, 6], &[], &[7]]),
    ] {
        for rounds in [1, 6] {
            // Adapters are in slots when the lists come, one of each: whoever has half waits for the rest.
            let mut world = world(slots);
            for (id, list) in (0..).zip(lists) {
                let first = list.first().copied().unwrap_or(0);
                world.submit(request(1_000_000 + id, first, prompt(id, 4), 2)).unwrap();
            }
            world.run_to_end();
            for round in 0..rounds {
                for (i, list) in (0..).zip(lists) {
                    let id = round * 100 + i;
                    let one = ensemble(id, list, 0, prompt(id, 6), 30);
                    world.submit(scheduler::Request { tenant: tenant(i % 3), ..one }).unwrap();
                }
            }
            world.run_to_end();
            assert_eq!(world.failed, BTreeMap::new(), "{lists:?} in {slots} slots");
        }
    }
}

#[test]
fn a_list_is_not_overtaken_for_ever() {
    // Single adapters fill both slots, and more of them keep coming.
    let mut world = world(2);
    let mut id = 0;
    let mut crowd = |world: &mut World| {
        for number in 1..=4 {
            world.submit(request(id, number, prompt(id, 4), 8)).unwrap();
            id += 1;
        }
    };
    crowd(&mut world);
    (0..5).for_each(|_| assert!(world.turn()));
    world.submit(ensemble(500_000, &[5, 6], 0, prompt(3, 4), 4)).unwrap();
    let mut turns = 0;
    while world.open.contains_key(&RequestId(500_000)) {
        if turns % 4 == 0 {
            crowd(&mut world);
        }
        assert!(world.turn());
        turns += 1;
        assert!(turns < 2_000, "the list never has both slots");
    }
    world.run_to_end();
}

#[test]
fn a_load_that_fails_ends_all_who_need_it_and_nobody_else() {
    for fails in [1, 2] {
        let mut world = world(4);
        world.submit(ensemble(1, &[1, 2], 0, prompt(1, 4), 3)).unwrap();
        world.submit(ensemble(2, &[2, 3], 0, prompt(2, 4), 3)).unwrap();
        world.submit(request(3, 1, prompt(3, 4), 3)).unwrap();
        world.plan();
        world.run();
        let nth = world.shard.loading().iter().position(|(_, loading)| *loading == key(fails)).unwrap();
        world.answer(nth, false);
        let failed: Vec<_> = world.failed.keys().map(|id| id.0).collect();
        assert_eq!(failed, if fails == 1 { vec![1, 3] } else { vec![1, 2] });
        world.run_to_end();
    }
}

#[test]
fn lists_that_never_fit_are_refused() {
    for (slots, bytes, list, expected) in [
        (2, 0, &[1, 2][..], None),
        (2, 20, &[1, 2], None),
        (2, 0, &[1, 1], None),
        (1, 10, &[1, 1], None),
        (4, 0, &[1, 2, 3, 4], None),
        (1, 0, &[1, 2], Some(SubmitError::TooManyAdapters { adapters: 2, slots: 1 })),
        (3, 0, &[1, 2, 3, 4], Some(SubmitError::TooManyAdapters { adapters: 4, slots: 3 })),
        (3, 19, &[1, 2], Some(SubmitError::AdapterTooLarge { bytes: 20, limit: 19 })),
        (4, 39, &[1, 2, 3, 4], Some(SubmitError::AdapterTooLarge { bytes: 40, limit: 39 })),
        (0, 0, &[1, 2], Some(SubmitError::NoSlots)),
    ] {
        let mut world = World::new(Limits { num_slots: slots, adapter_bytes: bytes, ..limits() });
        let result = world.submit(ensemble(1, list, 0, prompt(1, 4), 3)).err();
        assert_eq!(result, expected, "{list:?}");
        world.run_to_end();
    }
}

#[test]
fn only_equal_lists_with_equal_weights_share_blocks() {
    let mut world = world(4);
    let long = || prompt(7, 21);
    for (id, list, variant, hit) in [
        (1, &[1, 2][..], 0, 0),
        (2, &[1, 2], 0, 20),
        (3, &[1, 2], 1, 0),
        (4, &[2, 1], 0, 0),
        (5, &[1, 2, 3], 0, 0),
        (6, &[1], 0, 0),
        (7, &[1, 2], 1, 20),
        (8, &[2, 1], 0, 20),
    ] {
        assert_eq!(world.cached(ensemble(id, list, variant, long(), 1)), hit, "request {id}");
    }
    assert_eq!(world.cached(request(9, 1, long(), 1)), 0, "an adapter alone is another variant");
    assert_eq!(world.cached(request(10, 0, long(), 1)), 0);
}

#[test]
fn an_adapter_in_many_lists_takes_its_bytes_once() {
    // Room for four adapters of ten bytes.
    let mut world = World::new(Limits { num_slots: 8, adapter_bytes: 40, ..limits() });
    for (id, list) in (0..).zip([&[1, 2][..], &[1, 3], &[1, 4], &[2, 3], &[3, 4, 2]]) {
        world.submit(ensemble(id, list, 0, prompt(id, 5), 40)).unwrap();
    }
    for _ in 0..3 {
        world.turn();
        world.now += Duration::from_millis(1);
    }
    let stats = world.scheduler.stats();
    assert_eq!((stats.resident_adapters, stats.running, stats.adapter_evictions), (4, 5, 0));
    world.run_to_end();
}
