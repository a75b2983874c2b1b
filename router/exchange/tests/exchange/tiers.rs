//! What is on each tier: the least recently used copies leave, leased ones stay, and no bound is exceeded.

use exchange::{Ask, AskId, Content, Fault, Input, Limits, Output, Slot, Tenant, Tier};

use crate::world::{World, limits, ms, secs};

fn ask_on(world: &mut World, tier: Tier, reference: u128) -> AskId {
    let ask = world.new_ask(reference);
    world.submit(Ask { tier, ..ask })
}

/// Uses an adapter on a tier, and gives it back.
fn use_once(world: &mut World, tier: Tier, reference: u128) {
    let id = ask_on(world, tier, reference);
    world.settle();
    assert!(world.ready.contains_key(&id), "{reference}: {:?}", world.failed.get(&id));
    world.release(id);
}

/// The references whose adapters are on a tier.
fn on(world: &World, tier: Tier) -> Vec<u8> {
    world.exchange.residents(tier).iter().map(|resident| resident.content.0[0]).collect()
}

/// Limits of a tier that holds three adapters of 100 bytes. The other one is large.
fn three(tier: Tier) -> Limits {
    match tier {
        Tier::Disk => Limits { disk_bytes: 310, host_bytes: 2000, ..limits() },
        Tier::Host => Limits { disk_bytes: 2000, host_bytes: 310, ..limits() },
    }
}

/// A world in which a tier has had three adapters of these sizes, each used once.
fn full(tier: Tier, sizes: &[u64]) -> World {
    let mut world = World::with(three(tier), sizes);
    (0..3).for_each(|reference| use_once(&mut world, tier, reference));
    world
}

#[test]
fn the_least_recently_used_copy_leaves() {
    for tier in [Tier::Disk, Tier::Host] {
        let mut world = World::with(three(tier), &[100; 6]);
        for (reference, expected) in [
            (0, &[0][..]),
            (1, &[0, 1]),
            (2, &[0, 1, 2]),
            (0, &[0, 1, 2]),
            (3, &[0, 2, 3]),
            (2, &[0, 2, 3]),
            (4, &[2, 3, 4]),
            (3, &[2, 3, 4]),
            (5, &[3, 4, 5]),
            (3, &[3, 4, 5]),
        ] {
            use_once(&mut world, tier, reference);
            assert_eq!(on(&world, tier), expected, "{tier:?} behind {reference}");
        }
        let stats = world.exchange.stats();
        let stats = if tier == Tier::Disk { stats.disk } else { stats.host };
        assert_eq!((stats.loads, stats.hits, stats.misses, stats.evictions), (6, 4, 6, 3), "{tier:?}");
        assert_eq!((stats.bytes, stats.needed_evictions), (300, 0));
        world.run_to_end();
    }
}

#[test]
fn use_in_host_memory_keeps_the_copy_on_the_disk() {
    let mut world = World::with(three(Tier::Disk), &[100; 4]);
    for reference in [0, 1, 2, 0, 3] {
        use_once(&mut world, Tier::Host, reference);
    }
    assert_eq!(on(&world, Tier::Disk), [0, 2, 3], "1 was used least recently");
    world.run_to_end();
}

#[test]
fn a_leased_copy_stays_whoever_asks() {
    for tier in [Tier::Disk, Tier::Host] {
        let mut world = World::with(three(tier), &[100; 8]);
        let kept = ask_on(&mut world, tier, 0);
        world.settle();
        for reference in 1..8 {
            use_once(&mut world, tier, reference);
            assert!(on(&world, tier).contains(&0), "{tier:?}");
        }
        world.release(kept);
        use_once(&mut world, tier, 1);
        use_once(&mut world, tier, 2);
        use_once(&mut world, tier, 3);
        assert!(!on(&world, tier).contains(&0), "{tier:?}");
        world.run_to_end();
    }
}

#[test]
fn asks_wait_while_everything_is_leased() {
    for tier in [Tier::Disk, Tier::Host] {
        let mut world = World::with(three(tier), &[100; 5]);
        let kept: Vec<_> = (0..3).map(|reference| ask_on(&mut world, tier, reference)).collect();
        world.settle();
        let next: Vec<_> = (3..5).map(|reference| ask_on(&mut world, tier, reference)).collect();
        world.settle();
        assert_eq!(world.waiting(), next, "{tier:?}");
        world.release(kept[1]);
        world.settle();
        assert_eq!(world.waiting(), next[1..], "{tier:?}: the first one had the room");
        world.run_to_end();
    }
}

#[test]
fn room_is_free_when_the_copy_is_gone_and_not_before() {
    for tier in [Tier::Disk, Tier::Host] {
        let mut world = full(tier, &[100; 4]);
        let id = ask_on(&mut world, tier, 3);
        while world.deletes.is_empty() && world.unstages.is_empty() {
            world.answer(world.first());
        }
        assert!(world.calls.is_empty(), "{tier:?}: nothing is copied yet");
        world.wait(secs(1));
        assert!(world.calls.is_empty(), "{tier:?}");
        // An ask for the copy that is leaving has to wait until it is gone, and fetches or stages it again.
        let late = ask_on(&mut world, tier, 0);
        world.settle();
        assert!(world.ready.contains_key(&id) && world.ready.contains_key(&late), "{tier:?}");
        world.run_to_end();
    }
}

#[test]
fn room_that_is_made_for_one_is_not_taken_by_another() {
    for tier in [Tier::Disk, Tier::Host] {
        let mut world = full(tier, &[100, 100, 100, 305, 10]);
        let large = ask_on(&mut world, tier, 3);
        let answer_all = |world: &mut World| {
            while let Some((&call, _)) = world.calls.first_key_value() {
                world.answer(call);
            }
        };
        answer_all(&mut world);
        assert_eq!(world.deletes.len() + world.unstages.len(), 3, "{tier:?}");
        // There are 10 bytes beside what is being removed, but the large one would not fit beside them.
        let small = ask_on(&mut world, tier, 4);
        answer_all(&mut world);
        assert_eq!(world.waiting(), [large, small], "{tier:?}");
        world.settle();
        assert_eq!(world.waiting(), [small], "{tier:?}");
        world.release(large);
        world.settle();
        assert!(world.ready.contains_key(&small), "{tier:?}");
        world.run_to_end();
    }
}

#[test]
fn a_copy_on_the_disk_is_kept_until_it_is_staged() {
    let mut world = World::with(Limits { disk_bytes: 250, ..limits() }, &[100; 5]);
    // Without a session nothing is staged.
    world.detach();
    let asks: Vec<_> = (0..3).map(|reference| world.ask(reference)).collect();
    world.settle();
    assert_eq!((on(&world, Tier::Disk), world.deletes.len()), (vec![0, 1], 0), "both are needed");
    world.attach();
    world.settle();
    assert!(asks.iter().all(|id| world.ready.contains_key(id)));
    world.run_to_end();
}

#[test]
fn files_that_are_being_staged_stay_whoever_waits_for_them() {
    // The asks for the stage leave, by release or because their time is over, and others need the room on the disk.
    for (asks, expires) in [(1, false), (2, false), (3, false), (1, true), (2, true)] {
        let mut world = World::with(Limits { disk_bytes: 250, ..limits() }, &[100; 8]);
        let asked: Vec<_> = (0..asks)
            .map(|_| {
                let ask = world.new_ask(0);
                world.submit(Ask { deadline: secs(20), ..ask })
            })
            .collect();
        (0..2).for_each(|_| drop(world.answer(world.first())));
        let stage = world.first();
        match expires {
            true => world.wait(secs(20)),
            false => asked.into_iter().for_each(|id| world.release(id)),
        }
        // Their files are read until the stage has ended, which is checked whenever something is deleted.
        for reference in 1..6 {
            let id = ask_on(&mut world, Tier::Disk, reference);
            while let Some(call) = world.calls.keys().copied().find(|&call| call != stage) {
                world.answer(call);
                world.remove_copies();
            }
            assert!(world.ready.contains_key(&id), "{asks} asks, {reference}");
            world.release(id);
            assert!(on(&world, Tier::Disk).contains(&0), "{asks} asks, {reference}");
        }
        world.answer(stage);
        use_once(&mut world, Tier::Disk, 6);
        use_once(&mut world, Tier::Disk, 7);
        assert_eq!(on(&world, Tier::Disk), [6, 7]);
        world.run_to_end();
    }
}

#[test]
fn leases_on_files_that_are_gone_end_with_a_failure_and_pins_are_fetched_again() {
    for (leases, pins) in [(1, 0), (2, 0), (0, 1), (0, 2), (1, 1), (3, 2)] {
        let mut world = World::with(limits(), &[100; 2]);
        let leased: Vec<_> = (0..leases).map(|_| ask_on(&mut world, Tier::Disk, 0)).collect();
        let pinned: Vec<_> = (0..pins)
            .map(|_| {
                let ask = world.new_ask(0);
                world.submit(Ask { tier: Tier::Disk, pin: true, ..ask })
            })
            .collect();
        let other = ask_on(&mut world, Tier::Disk, 1);
        world.settle();
        let content = world.ready[leased.first().or(pinned.first()).unwrap()];
        world.disk.remove(&content);
        let id = world.ask(0);
        world.settle();
        assert!(world.ready.contains_key(&id), "it is fetched again");
        let failed = leased.iter().map(|id| world.failed.get(id));
        assert!(failed.into_iter().all(|fault| fault == Some(&Fault::Changed)), "{:?}", world.failed);
        assert_eq!(world.failed.len(), leases, "nobody else fails: {:?}", world.failed);
        let leased = |id: &AskId| world.open.get(id).is_some_and(|open| open.ready.is_some());
        assert!(pinned.iter().chain([&other]).all(leased), "{leases} leases, {pins} pins");
        let resident = world.exchange.residents(Tier::Disk);
        let resident = resident.iter().find(|resident| resident.content == content).unwrap();
        assert_eq!(resident.pins as usize, pins);
        world.run_to_end();
    }
}

#[test]
fn pins_take_half_of_a_tier_at_most() {
    for tier in [Tier::Disk, Tier::Host] {
        let limits = Limits { disk_bytes: 600, host_bytes: 600, ..limits() };
        let mut world = World::with(limits, &[100; 8]);
        let pin = |world: &mut World, reference| {
            let ask = world.new_ask(reference);
            let id = world.submit(Ask { tier, pin: true, ..ask });
            world.settle();
            id
        };
        let pins: Vec<_> = (0..4).map(|reference| pin(&mut world, reference)).collect();
        assert!(pins[..3].iter().all(|id| world.ready.contains_key(id)), "{tier:?}: {:?}", world.failed);
        assert_eq!(world.failed.get(&pins[3]), Some(&Fault::PinsFull(tier)));
        let again = pin(&mut world, 0);
        assert!(world.ready.contains_key(&again), "{tier:?}: another pin of the same takes no more");
        // Dynamic loading goes on in the other half.
        for reference in 3..8 {
            use_once(&mut world, tier, reference);
        }
        let pinned = on(&world, tier);
        assert!([0, 1, 2].iter().all(|reference| pinned.contains(reference)), "{tier:?}");
        world.release(pins[1]);
        let other = pin(&mut world, 4);
        assert!(world.ready.contains_key(&other), "{tier:?}");
        world.run_to_end();
    }
}

#[test]
fn what_takes_more_than_pins_leave_is_refused() {
    let mut world = World::with(Limits { host_bytes: 400, ..limits() }, &[150, 300]);
    let ask = world.new_ask(0);
    world.submit(Ask { pin: true, ..ask });
    world.settle();
    let id = world.ask(1);
    world.settle();
    assert_eq!(world.failed.get(&id), Some(&Fault::TooLarge { bytes: 300, limit: 250 }));
    world.run_to_end();
}

#[test]
fn a_large_adapter_is_overtaken_for_a_while_only() {
    // By asks of its own tenant, which came later, and by those of another, whose turn comes first.
    for (tier, tenant) in [(Tier::Disk, 1), (Tier::Disk, 2), (Tier::Host, 1), (Tier::Host, 2)] {
        let mut world = World::with(Limits { disk_bytes: 400, host_bytes: 400, ..limits() }, &[10; 80]);
        world.original(79).bytes = 100;
        // Small ones fit beside this one, and the large one does not.
        world.original(78).bytes = 310;
        let held = ask_on(&mut world, tier, 78);
        world.settle();
        let large = ask_on(&mut world, tier, 79);
        world.settle();
        let mut passed = 0;
        for reference in 0..77 {
            let ask = world.new_ask(reference);
            let id = world.submit(Ask { tier, tenant: Tenant { id: tenant, weight: 1 }, ..ask });
            world.settle();
            let ready = world.ready.contains_key(&id);
            world.release(id);
            if !ready {
                break;
            }
            passed += 1;
        }
        assert_eq!(passed, 40, "{tier:?}, tenant {tenant}: 400 bytes are four times 100");
        assert!(!world.ready.contains_key(&large));
        world.release(held);
        world.settle();
        assert!(world.ready.contains_key(&large), "{tier:?}, tenant {tenant}");
        world.run_to_end();
    }
}

#[test]
fn one_that_nearly_fits_is_overtaken_no_longer_than_a_large_one() {
    for tier in [Tier::Disk, Tier::Host] {
        let limits = Limits { disk_bytes: 400, host_bytes: 400, ..limits() };
        let mut world = World::with(limits, &[40; 60]);
        world.original(59).bytes = 50;
        let held: Vec<_> = (0..9).map(|reference| ask_on(&mut world, tier, reference)).collect();
        world.settle();
        // 40 bytes are free, and one of 50 waits. Others of 40 bytes overtake it five times: 200 bytes are four times 50.
        let large = ask_on(&mut world, tier, 59);
        world.settle();
        let mut passed = 0;
        for reference in 10..50 {
            let id = ask_on(&mut world, tier, reference);
            world.settle();
            let ready = world.ready.contains_key(&id);
            world.release(id);
            if !ready {
                break;
            }
            passed += 1;
        }
        assert_eq!(passed, 5, "{tier:?}");
        world.release(held[0]);
        world.settle();
        assert!(world.ready.contains_key(&large), "{tier:?}");
        world.run_to_end();
    }
}

#[test]
fn what_an_ask_is_expected_to_need_leaves_last_and_is_counted() {
    for tier in [Tier::Disk, Tier::Host] {
        let mut world = full(tier, &[100; 8]);
        let needed = |world: &World| {
            let stats = world.exchange.stats();
            stats.disk.needed_evictions + stats.host.needed_evictions
        };
        // The grants have expired, and 0 is being looked up: it is the least recently used, and is expected.
        world.wait(secs(60));
        ask_on(&mut world, tier, 0);
        let lookup = world.first();
        let settle_others = |world: &mut World| {
            loop {
                world.remove_copies();
                let others = world.calls.keys().find(|&&call| call != lookup).copied();
                let Some(call) = others else { return };
                world.answer(call);
            }
        };
        let kept: Vec<_> = [3, 4].iter().map(|&reference| ask_at(&mut world, tier, reference)).collect();
        settle_others(&mut world);
        assert_eq!((on(&world, tier), needed(&world)), (vec![0, 3, 4], 0), "{tier:?}");
        let last = ask_at(&mut world, tier, 5);
        settle_others(&mut world);
        assert!(world.ready.contains_key(&last), "{tier:?}");
        assert_eq!((on(&world, tier), needed(&world)), (vec![3, 4, 5], 1), "{tier:?}: there was no other");
        world.release(kept[0]);
        world.run_to_end();
    }
}

/// An ask of another tenant, which has permits of its own.
fn ask_at(world: &mut World, tier: Tier, reference: u128) -> AskId {
    let ask = world.new_ask(reference);
    world.submit(Ask { tier, tenant: Tenant { id: 2, weight: 1 }, ..ask })
}

#[test]
fn a_load_into_a_slot_keeps_the_host_copy() {
    let mut world = World::with(three(Tier::Host), &[100; 6]);
    let id = world.ask(0);
    world.settle();
    let content = world.ready[&id];
    world.slot(content, Slot::Loading);
    world.release(id);
    for reference in 1..5 {
        use_once(&mut world, Tier::Host, reference);
    }
    assert!(on(&world, Tier::Host).contains(&0), "the load reads it");
    world.slot(content, Slot::Ready);
    for reference in 1..5 {
        use_once(&mut world, Tier::Host, reference);
    }
    assert!(!on(&world, Tier::Host).contains(&0));
    assert_eq!(world.exchange.slot_of(content), Slot::Ready, "the device has a copy of its own");
    world.slot(content, Slot::Empty);
    assert_eq!(world.exchange.slot_of(content), Slot::Empty);
    world.run_to_end();
}

#[test]
fn a_load_of_a_copy_that_is_leaving_does_not_keep_it() {
    for slot in [Slot::Loading, Slot::Ready, Slot::Empty] {
        let mut world = World::with(three(Tier::Host), &[100; 4]);
        let id = world.ask(0);
        world.settle();
        let content = world.ready[&id];
        world.release(id);
        for reference in 1..4 {
            world.ask(reference);
        }
        while let Some((&call, _)) = world.calls.first_key_value() {
            world.answer(call);
        }
        assert_eq!(world.unstages, [content]);
        world.slot(content, Slot::Loading);
        world.slot(content, slot);
        world.settle();
        assert!(world.waiting().is_empty() && !on(&world, Tier::Host).contains(&0), "{slot:?}");
        world.slot(content, Slot::Empty);
        world.run_to_end();
    }
}

#[test]
fn an_eviction_from_a_slot_that_a_waiting_request_needs_is_counted() {
    // Whether the request is released when its sequence has been admitted, and what is evicted then.
    for (admitted, load_only, evictions, needed) in
        [(false, false, 1, 1), (true, false, 1, 0), (false, true, 0, 0), (true, true, 0, 0)]
    {
        let mut world = World::with(limits(), &[20]);
        let id = world.ask(0);
        world.settle();
        let content = world.ready[&id];
        world.slot(content, Slot::Loading);
        if !load_only {
            world.slot(content, Slot::Ready);
        }
        if admitted {
            world.release(id);
        }
        world.slot(content, Slot::Empty);
        let device = world.exchange.stats().device;
        assert_eq!(
            (device.evictions, device.needed_evictions),
            (evictions, needed),
            "{admitted} {load_only}"
        );
        world.run_to_end();
    }
}

#[test]
fn a_tenant_that_holds_less_of_host_memory_is_next() {
    // Tenant 1 holds everything and waits for more; tenants 2 and 3 come later.
    for (weight, expected) in [(1, [1, 2, 3]), (4, [2, 2, 3])] {
        let mut world = World::with(Limits { host_bytes: 410, ..limits() }, &[100; 20]);
        let ask_for = |world: &mut World, tenant, reference| {
            let ask = world.new_ask(reference);
            let weight = if tenant == 1 { 1 } else { weight };
            world.submit(Ask { tenant: Tenant { id: tenant, weight }, ..ask })
        };
        let held: Vec<_> = (0..4).map(|reference| ask_for(&mut world, 1, reference)).collect();
        world.settle();
        let mut waiting: Vec<_> = (4..8).map(|reference| (ask_for(&mut world, 1, reference), 1)).collect();
        waiting.push((ask_for(&mut world, 2, 8), 2));
        waiting.push((ask_for(&mut world, 2, 9), 2));
        waiting.push((ask_for(&mut world, 3, 10), 3));
        world.settle();
        let mut order = Vec::new();
        for id in held.into_iter().take(3) {
            world.release(id);
            world.settle();
            let next = waiting.iter().position(|(id, _)| world.ready.contains_key(id)).unwrap();
            order.push(waiting.remove(next).1);
        }
        order.sort_unstable();
        assert_eq!(order, expected, "weight {weight}");
        world.run_to_end();
    }
}

#[test]
fn copies_that_are_on_the_disk_at_the_start_need_no_fetch() {
    let mut world = World::with(three(Tier::Disk), &[100; 5]);
    world.originals.values_mut().for_each(|original| original.fresh_for = ms(0));
    for reference in 0..4u8 {
        let mut name = [0; 32];
        name[0] = reference;
        let (content, version) = (Content(name), exchange::Version(name));
        world.disk.insert(content, 100);
        let outputs =
            world.exchange.handle(Input::OnDisk { content, bytes: 100, versions: vec![version] }, world.now);
        // There is room for three.
        let expected = if reference < 3 { vec![] } else { vec![Output::Delete(content)] };
        assert_eq!(outputs, expected);
        world.deletes.extend(outputs.iter().map(|_| content));
    }
    world.remove_copies();
    for (reference, fetched) in [(0, 0), (1, 0), (3, 1), (2, 2)] {
        use_once(&mut world, Tier::Disk, reference);
        // Without room for all, 3 takes the place of 2, which was used least recently, and 2 that of 0.
        assert_eq!(world.exchange.stats().disk.loads, fetched, "{reference}");
    }
    world.run_to_end();
}
