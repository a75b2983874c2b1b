//! Asks that need their leases at the same time: none holds room while another waits for it.

use exchange::{AskId, Fault, Limits, Tier};
use proptest::{collection::vec, prelude::*};

use crate::world::{World, limits, secs};

/// Adapters of a hundred bytes, on a disk for so many of them.
fn world(adapters: usize, fit: u64) -> World {
    World::with(Limits { disk_bytes: 100 * fit, tenant_calls: 100, ..limits() }, &vec![100; adapters])
}

fn all_ready(world: &World, group: &[AskId]) -> bool {
    group.iter().all(|id| world.open.get(id).is_some_and(|open| open.ready.is_some()))
}

/// Groups as the numbers of their parts, on a tier for so many adapters.
const GROUPS: [(u64, &[&[u128]]); 11] = [
    (4, &[&[0, 1], &[2, 3]]),
    (4, &[&[0, 1], &[2, 3], &[4, 5]]),
    (4, &[&[0, 1], &[1, 2], &[2, 0]]),
    (5, &[&[0, 1], &[2, 3], &[4, 5], &[6, 7]]),
    (6, &[&[0, 1, 2], &[3, 4, 5]]),
    (6, &[&[0, 1, 2], &[2, 3, 4], &[4, 5, 0]]),
    (8, &[&[0, 1, 2, 3], &[4, 5, 6, 7], &[8, 9, 10, 11]]),
    (8, &[&[0], &[1, 2, 3], &[4, 5], &[6, 7, 8, 9], &[10]]),
    (9, &[&[0, 1, 2, 3], &[0, 4, 5, 6], &[1, 2, 4, 5], &[7, 8]]),
    (4, &[&[0, 0], &[1, 1], &[0, 1]]),
    (100, &[&[0, 1], &[2, 3], &[4, 5]]),
];

#[test]
fn groups_do_not_hold_parts_that_others_wait_for() {
    for (tier, (fit, groups)) in
        [Tier::Disk, Tier::Host].iter().flat_map(|tier| GROUPS.map(|group| (*tier, group)))
    {
        let room = Limits { disk_bytes: 100 * fit, tenant_calls: 100, ..limits() };
        let room = match tier {
            Tier::Disk => room,
            Tier::Host => Limits { disk_bytes: 10_000, host_bytes: 100 * fit, ..room },
        };
        let mut world = World::with(room, &[100; 12]);
        let ask = |(parts, tenant): (&&[u128], u64)| world.ask_together_on(tier, tenant % 2, parts);
        let mut left: Vec<_> = groups.iter().zip(0..).map(ask).collect();
        while !left.is_empty() {
            world.settle();
            let ended = left.iter().position(|group| all_ready(&world, group));
            let ended = ended.unwrap_or_else(|| panic!("{groups:?} on {fit}: {left:?} wait in a circle"));
            left.remove(ended).into_iter().for_each(|id| world.release(id));
        }
        world.run_to_end();
    }
}

#[test]
fn a_merge_that_can_never_have_its_parts_fails_at_once() {
    for (fit, parts, fails) in [
        (4, &[0, 1][..], false),
        (4, &[0, 1, 2], true),
        (4, &[0, 0, 0, 1], false),
        (3, &[0], false),
        (3, &[0, 1], true),
        (1, &[0], true),
        (6, &[0, 1, 2], false),
        (6, &[0, 1, 2, 3], true),
        (6, &[5, 5, 5, 5, 5], false),
        (100, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], false),
    ] {
        let mut world = world(12, fit);
        let group = world.ask_together(1, parts);
        world.settle();
        assert_eq!(all_ready(&world, &group), !fails, "{parts:?} on {fit}");
        if fails {
            let bytes = 100 * parts.len() as u64;
            let fault = Fault::TooLarge { bytes, limit: 50 * fit };
            assert!(group.iter().all(|id| world.failed.get(id) == Some(&fault)), "{:?}", world.failed);
        }
        world.run_to_end();
    }
}

#[test]
fn parts_that_are_read_in_place_take_no_room() {
    let mut world = world(8, 4);
    (0..6).for_each(|reference| world.original(reference).in_place = true);
    let group = world.ask_together(1, &[0, 1, 2, 3, 4, 5, 6, 7]);
    world.settle();
    assert!(all_ready(&world, &group));
    world.run_to_end();
}

#[test]
fn a_part_that_fails_or_is_given_up_leaves_the_others_to_go_on() {
    for released in [false, true] {
        for missing in 0..3u128 {
            let mut world = world(3, 6);
            if !released {
                world.originals.remove(&missing);
            }
            let group = world.ask_together(1, &[0, 1, 2]);
            if released {
                world.release(group[missing as usize]);
            }
            world.settle();
            let others: Vec<_> =
                (0..3).filter(|&part| part != missing as usize).map(|part| group[part]).collect();
            assert!(all_ready(&world, &others), "{missing}, released: {released}");
            world.run_to_end();
        }
    }
}

#[test]
fn a_promise_goes_ahead_of_a_large_adapter_that_waits_for_its_room() {
    // The large one has been overtaken for long enough, so that others wait for it, and it waits for the first part.
    let mut world = world(40, 4);
    world.original(30).bytes = 390;
    let group = world.ask_together(1, &[0, 1]);
    world.settle();
    assert!(all_ready(&world, &group));
    let ask = world.new_ask(30);
    let large = world.submit(exchange::Ask { tier: Tier::Disk, ..ask });
    world.settle();
    for reference in 2..29 {
        let ask = world.new_ask(reference);
        let id = world.submit(exchange::Ask { tier: Tier::Disk, ..ask });
        world.settle();
        if !world.ready.contains_key(&id) {
            break;
        }
        world.release(id);
    }
    assert_eq!(world.exchange.stats().queued[1], 2, "the large one, and one that waits behind it");
    // A merge that begins now has a promise of what the first one gives back, and is not behind the large one.
    let second = world.ask_together(2, &[20, 21]);
    world.settle();
    group.into_iter().for_each(|id| world.release(id));
    world.settle();
    assert!(all_ready(&world, &second), "{:?}", world.waiting());
    assert!(!world.ready.contains_key(&large));
    second.into_iter().for_each(|id| world.release(id));
    world.settle();
    assert!(world.ready.contains_key(&large));
    world.run_to_end();
}

#[test]
fn tenants_take_turns_with_their_merges() {
    let mut world = world(20, 4);
    // The first tenant has what may be promised, and asks for more than the second.
    let mut groups: Vec<_> = (0..4).map(|nth| (1, world.ask_together(1, &[2 * nth, 2 * nth + 1]))).collect();
    groups.extend((4..6).map(|nth| (2, world.ask_together(2, &[2 * nth, 2 * nth + 1]))));
    let mut order = Vec::new();
    while !groups.is_empty() {
        world.settle();
        let next = groups.iter().position(|(_, group)| all_ready(&world, group)).unwrap();
        let (tenant, group) = groups.remove(next);
        order.push(tenant);
        group.into_iter().for_each(|id| world.release(id));
    }
    assert_eq!(order, [1, 2, 1, 2, 1, 1]);
    world.run_to_end();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Merges, pins and single asks in any order, some of which keep their leases for as long as anything else can begin.
    #[test]
    fn whatever_is_asked_for_together_is_had_together(
        fit in 4..10u64,
        merges in vec((0..3u64, vec(0..16u128, 1..5)), 1..12),
        singles in vec((0..16u128, any::<bool>()), 0..12),
        sizes in vec(1..150u64, 16),
    ) {
        let mut world = world(16, fit);
        (0..).zip(&sizes).for_each(|(reference, &bytes)| world.original(reference).bytes = bytes);
        let mut groups = Vec::new();
        let mut singles = singles.into_iter();
        for (tenant, parts) in merges {
            groups.push(world.ask_together(tenant, &parts));
            if let Some((reference, pin)) = singles.next() {
                let ask = world.new_ask(reference);
                let tier = if pin { Tier::Disk } else { Tier::Host };
                world.submit(exchange::Ask { tier, pin, ..ask });
            }
        }
        // Requests end by themselves. Merges end only when they have all their parts.
        for _ in 0..1000 {
            world.settle();
            let ready: Vec<_> = world.ready.keys().copied().collect();
            let in_group = |id: &AskId| groups.iter().any(|group| group.contains(id));
            let single = |id: &AskId| world.open.get(id).is_some_and(|open| open.ask.tier == Tier::Host);
            let over: Vec<_> = ready.into_iter().filter(|id| !in_group(id) && single(id)).collect();
            over.iter().for_each(|&id| world.release(id));
            let ended = groups.iter().position(|group| {
                group.iter().all(|id| world.failed.contains_key(id) || all_ready(&world, &[*id]))
            });
            match ended {
                Some(ended) => groups.remove(ended).into_iter().for_each(|id| world.release(id)),
                None if over.is_empty() => break,
                None => {}
            }
        }
        prop_assert!(groups.is_empty(), "{:?} wait in a circle", groups);
        prop_assert!(world.now < secs(1), "no deadline has helped");
        world.run_to_end();
    }
}
