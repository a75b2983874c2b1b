//! Budgets of sources and of tenants, and that a sick source delays nobody else.

use std::{collections::BTreeMap, time::Duration};

use exchange::{Ask, Budget, Fault, Input, Limits, Output, Tenant};

use crate::world::{Original, Pending, World, limits, ms, secs};

fn roomy() -> Limits {
    Limits { disk_bytes: 100_000, host_bytes: 100_000, tenant_calls: 1000, ..limits() }
}

/// Calls that run, by kind.
fn running(world: &World) -> [usize; 3] {
    world.exchange.stats().running
}

#[test]
fn calls_stay_within_the_budgets_of_source_and_tenant() {
    let limits = roomy();
    // Asks as (source, tenant, how many), and the lookups that begin, of 4 for each source and 2 for each tenant, and
    // one for every tenant.
    for (asks, expected) in [
        (&[(0, 1, 1)][..], 1),
        (&[(0, 1, 2)], 2),
        (&[(0, 1, 9)], 2),
        (&[(0, 1, 9), (0, 2, 1)], 3),
        (&[(0, 1, 9), (0, 2, 9)], 4),
        (&[(0, 1, 9), (0, 2, 9), (0, 3, 9)], 5),
        (&[(0, 1, 9), (0, 2, 9), (0, 3, 1), (0, 4, 2), (0, 5, 9)], 7),
        (&[(0, 1, 9), (1, 1, 9)], 4),
        (&[(0, 1, 9), (1, 1, 9), (2, 1, 9)], 6),
        (&[(0, 1, 9), (0, 2, 9), (1, 1, 1), (1, 2, 1)], 6),
        (&[(0, 1, 1), (1, 2, 1), (2, 3, 1), (3, 4, 1)], 4),
    ] {
        let mut world = World::with(limits, &[20; 200]);
        let mut references = 0..;
        for &(source, tenant, count) in asks {
            for reference in references.by_ref().take(count) {
                world.ask_at(source, tenant, reference);
            }
        }
        assert_eq!(running(&world), [expected, 0, 0], "{asks:?}");
        // All of them are served in the end.
        world.settle();
        assert_eq!(world.ready.len(), world.open.len(), "{asks:?}");
        world.run_to_end();
    }
}

#[test]
fn a_tenant_is_bounded_over_all_sources() {
    for most in [1, 3, 5] {
        let mut world = World::with(Limits { tenant_calls: most, ..roomy() }, &[20; 20]);
        for reference in 0..20 {
            world.ask_at(reference as u64, 1, reference);
        }
        assert_eq!(running(&world), [most as usize, 0, 0]);
        world.ask_at(0, 2, 0);
        assert_eq!(running(&world), [most as usize, 0, 0], "the same call");
        world.ask_at(19, 2, 19);
        assert_eq!(running(&world), [most as usize + 1, 0, 0], "one that the first tenant waits for in vain");
        world.run_to_end();
    }
}

#[test]
fn a_slow_call_gives_its_permit_to_the_next() {
    let mut world = World::with(roomy(), &[20; 10]);
    for reference in 0..8 {
        world.ask(reference);
    }
    // Two run, two more when those are slow, and no more than two are slow.
    let mut seen = Vec::new();
    for _ in 0..4 {
        seen.push(running(&world)[0]);
        world.wait(secs(5));
    }
    assert_eq!(seen, [2, 4, 4, 4]);
    world.run_to_end();
}

#[test]
fn a_slow_call_that_finds_no_room_gives_its_permit_back_later() {
    // Slow calls that end, one after the other, at ten seconds: each makes room for one that is late.
    for ended in 0..=2 {
        let mut world = World::with(roomy(), &[20; 12]);
        for reference in 0..12 {
            world.ask(reference);
        }
        (0..2).for_each(|_| world.wait(secs(5)));
        assert_eq!(running(&world)[0], 4, "two are slow, and two that have become so find no room");
        for _ in 0..ended {
            world.answer(world.first());
            assert_eq!(running(&world)[0], 4, "after {ended} ends");
        }
        world.run_to_end();
    }
    // A call of another tenant has what it needs, whatever is late.
    for late in 1..=8 {
        let limits = Limits { lookups: Budget { source: late, tenant: late, deadline: secs(30) }, ..roomy() };
        let mut world = World::with(limits, &[20; 40]);
        for reference in 0..2 * u128::from(late) {
            world.ask(reference);
        }
        (0..2).for_each(|_| world.wait(secs(5)));
        assert_eq!(running(&world)[0], 2 * late as usize, "both pools are full");
        world.ask_as(2, 0, 39);
        assert_eq!(running(&world)[0], 2 * late as usize + 1);
        assert!(world.calls.values().any(|pending| pending.asked.reference == 39));
        // It has no second one before enough of the others have ended.
        world.ask_as(2, 0, 38);
        assert_eq!(running(&world)[0], 2 * late as usize + 1);
        let began = |world: &World| world.calls.values().any(|pending| pending.asked.reference == 38);
        while !began(&world) {
            world.answer(world.first());
        }
        assert!(running(&world)[0] >= late as usize, "{late}: others need not have ended");
        world.run_to_end();
    }
}

/// The kind of a call.
fn kind(output: &Output<crate::world::Asked>) -> usize {
    match output {
        Output::Lookup { .. } => 0,
        Output::Fetch { .. } => 1,
        _ => 2,
    }
}

/// Answers all calls but those of a kind for references from `SICK` on.
fn settle_all_but(world: &mut World, hanging: usize) {
    loop {
        world.remove_copies();
        let hangs = |pending: &Pending| pending.asked.reference >= SICK && kind(&pending.output) == hanging;
        let next = world.calls.iter().find(|(_, pending)| !hangs(pending)).map(|(&call, _)| call);
        let Some(call) = next else { return };
        world.answer(call);
    }
}

#[test]
fn aborted_calls_that_hang_hide_no_others_of_their_lane() {
    let budget = Budget { source: 40, tenant: 40, deadline: secs(30) };
    let limits = Limits { lookups: budget, fetches: budget, stages: budget, ..roomy() };
    for hanging_kind in 0..3 {
        for hanging in [1, 2, 7, 8, 9, 20] {
            let mut world = World::with(limits, &[20]);
            for reference in SICK..SICK + hanging {
                let original = Original { fresh_for: secs(1000), ..Original::new(reference, 20) };
                world.originals.insert(reference, original);
                world.ask(reference);
            }
            settle_all_but(&mut world, hanging_kind);
            assert_eq!(world.calls.len() as u128, hanging);
            // They are aborted, and asked for again when the failure is forgotten. The first ones are not gone yet.
            world.wait(secs(30));
            world.wait(secs(2));
            for reference in SICK..SICK + hanging {
                world.ask(reference);
            }
            settle_all_but(&mut world, hanging_kind);
            assert_eq!(world.waiting().len() as u128, hanging, "{hanging} of {hanging_kind}");
            let id = world.ask(0);
            settle_all_but(&mut world, hanging_kind);
            assert!(world.ready.contains_key(&id), "{hanging} of kind {hanging_kind} hang");
            world.run_to_end();
        }
    }
}

/// The fault of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sickness {
    /// It never answers.
    Hangs,
    /// It sends a byte a second.
    Drips,
    Refuses,
    /// What it has is no adapter.
    Corrupt,
    Huge,
}

const SICKNESSES: [Sickness; 5] =
    [Sickness::Hangs, Sickness::Drips, Sickness::Refuses, Sickness::Corrupt, Sickness::Huge];

/// Time that a call takes where nothing is wrong.
const CALL: Duration = ms(40);

/// References from here on are sick.
const SICK: u128 = 100;

/// Lets 10 ms pass, and answers the calls that are due.
fn tick(world: &mut World, sickness: Option<Sickness>) {
    world.wait(ms(10));
    let calls: Vec<_> = world.calls.iter().map(|(&call, pending)| (call, pending.clone())).collect();
    for (call, pending) in calls {
        let due = world.now >= pending.begun + CALL;
        let (fetch, stage) = match pending.output {
            Output::Fetch { .. } => (true, false),
            Output::Stage { .. } => (false, true),
            _ => (false, false),
        };
        match sickness.filter(|_| pending.asked.reference >= SICK) {
            _ if pending.aborted => drop(world.fail(call, Fault::Slow)),
            Some(Sickness::Hangs) => {}
            Some(Sickness::Drips) if fetch => {
                let bytes = (world.now - pending.begun).as_secs();
                world.give(Input::Progress { call, bytes });
            }
            Some(Sickness::Refuses) if due => drop(world.fail(call, Fault::Denied("no".into()))),
            Some(Sickness::Corrupt) if stage && due => {
                world.fail(call, Fault::Invalid("not an adapter".into()));
            }
            _ if due => drop(world.answer(call)),
            _ => {}
        }
    }
    world.remove_copies();
}

/// Thirty asks of three tenants for well adapters, one every 30 ms, some of which are cached by then. Returns the time
/// that each has waited. Another tenant asks for sick ones at the same time, at the same source or at its own.
fn waits(sickness: Option<Sickness>, source: u64) -> Vec<Duration> {
    let mut world = World::with(roomy(), &[20; 20]);
    for reference in SICK..SICK + 6 {
        let bytes = if sickness == Some(Sickness::Huge) { 8000 } else { 60 };
        world.originals.insert(reference, Original::new(reference, bytes));
        if sickness.is_some() {
            world.ask_at(source, 7, reference);
        }
    }
    let (mut asked, mut waits) = (Vec::new(), BTreeMap::new());
    for step in 0..1000u64 {
        if step.is_multiple_of(3) && asked.len() < 30 {
            let id = world.ask_at(0, step / 3 % 3, u128::from(step / 3 % 20));
            asked.push((id, world.now));
        }
        if sickness.is_some() && step.is_multiple_of(50) {
            world.ask_at(source, 7, SICK + u128::from(step / 50 % 6));
        }
        tick(&mut world, sickness);
        for &(id, at) in &asked {
            if world.ready.contains_key(&id) {
                waits.entry(id).or_insert(world.now - at);
            }
        }
    }
    assert_eq!(waits.len(), 30, "{sickness:?}");
    waits.into_values().collect()
}

#[test]
fn a_sick_source_delays_only_those_who_name_it() {
    let alone = waits(None, 0);
    assert!(alone.contains(&ms(120)) && alone.contains(&ms(10)), "{alone:?}");
    for sickness in SICKNESSES {
        for source in [0, 9] {
            assert_eq!(waits(Some(sickness), source), alone, "{sickness:?} at source {source}");
        }
    }
}

#[test]
fn a_tenants_own_hanging_references_delay_its_others_until_they_count_as_slow() {
    for hanging in 1..=2u128 {
        let mut world = World::with(roomy(), &[20]);
        for reference in SICK..SICK + hanging {
            world.originals.insert(reference, Original::new(reference, 20));
            world.ask(reference);
        }
        let id = world.ask(0);
        while !world.ready.contains_key(&id) {
            tick(&mut world, Some(Sickness::Hangs));
        }
        let waited = if hanging == 1 { ms(120) } else { secs(5) + ms(120) };
        assert_eq!(world.now, waited, "{hanging}");
    }
}

/// The tenants whose lookups begin one after the other, where so many at a time are allowed.
fn order(at_once: u32, asks: &[(u64, u32, usize)]) -> Vec<u64> {
    let budget = Budget { source: at_once, tenant: at_once, deadline: secs(30) };
    let mut world = World::with(Limits { lookups: budget, ..roomy() }, &[20; 60]);
    let mut references = 0..;
    for &(tenant, weight, count) in asks {
        for reference in references.by_ref().take(count) {
            let ask = world.new_ask(reference);
            world.submit(Ask { tenant: Tenant { id: tenant, weight }, ..ask });
        }
    }
    let mut order = Vec::new();
    loop {
        let lookup = world.calls.iter().find(|(_, pending)| matches!(pending.output, Output::Lookup { .. }));
        let Some((&call, pending)) = lookup else { return order };
        order.push(pending.asked.tenant);
        world.answer(call);
    }
}

#[test]
fn tenants_take_turns_by_weight() {
    assert_eq!(order(1, &[(1, 1, 4)]), [1, 1, 1, 1]);
    assert_eq!(
        order(1, &[(1, 1, 6), (2, 1, 2)]),
        [1, 2, 1, 2, 1, 1, 1, 1],
        "whoever comes later is not behind"
    );
    assert_eq!(order(1, &[(1, 1, 3), (2, 1, 3), (3, 1, 3)]), [1, 2, 3, 1, 2, 3, 1, 2, 3]);
    for weight in [1, 2, 3, 10] {
        // The first tenant has begun with all of them.
        let order = order(11, &[(1, 1, 20), (2, weight, 40)]);
        let both = &order[11..31];
        let of_second = both.iter().filter(|&&tenant| tenant == 2).count() as u32;
        let expected = 20 * weight / (1 + weight);
        assert!(of_second.abs_diff(expected) <= 1, "weight {weight}: {both:?}");
    }
}

#[test]
fn who_asks_once_at_a_time_gets_no_more_than_a_turn() {
    let one = Budget { source: 1, tenant: 1, deadline: secs(30) };
    let mut world = World::with(Limits { lookups: one, ..roomy() }, &[20; 60]);
    for reference in 0..10 {
        world.ask_at(0, 1, reference);
    }
    let mut begun = Vec::new();
    for reference in 20..30 {
        world.ask_at(0, 2, reference);
        let is_lookup = |pending: &&Pending| matches!(pending.output, Output::Lookup { .. });
        for _ in 0..2 {
            let pending = world.calls.values().find(is_lookup).unwrap().clone();
            let Output::Lookup { call, payload } = pending.output else { panic!() };
            begun.push(payload.tenant);
            world.answer(call);
        }
    }
    let of_first = begun.iter().filter(|&&tenant| tenant == 1).count();
    assert_eq!((of_first, begun.len()), (10, 20), "{begun:?}");
    world.run_to_end();
}

/// Budgets of the size that servers have by default, and room for everything.
fn usual() -> Limits {
    let budget = |source| Budget { source, tenant: source / 2, deadline: secs(60) };
    Limits {
        lookups: budget(32),
        fetches: budget(16),
        stages: budget(8),
        disk_bytes: 1 << 30,
        host_bytes: 1 << 30,
        ..roomy()
    }
}

/// A world in which each of some tenants, from 0 on, asks for so many adapters whose calls of a kind hang.
fn hanging_tenants(limits: Limits, tenants: u64, adapters: u128, hanging: usize) -> World {
    let mut world = World::with(limits, &[20; 30]);
    for tenant in 0..tenants {
        for nth in 0..adapters {
            let reference = SICK + u128::from(tenant) * adapters + nth;
            world.originals.insert(reference, Original::new(reference, 20));
            world.ask_at(0, tenant, reference);
            settle_all_but(&mut world, hanging);
        }
    }
    world
}

/// The time that a tenant waits for adapters that are well, one after the other, while calls of a kind hang.
fn waits_of_guest(world: &mut World, hanging: usize) -> Vec<Duration> {
    let waits = (0..10).map(|reference| {
        let (id, begun) = (world.ask_at(0, GUEST, reference), world.now);
        while !world.ready.contains_key(&id) {
            world.wait(ms(10));
            let due = |pending: &Pending| {
                let hangs = pending.asked.reference >= SICK && kind(&pending.output) == hanging;
                !hangs && world.now >= pending.begun + CALL
            };
            let due: Vec<_> =
                world.calls.iter().filter(|(_, pending)| due(pending)).map(|(&call, _)| call).collect();
            due.into_iter().for_each(|call| drop(world.answer(call)));
            world.remove_copies();
            assert!(world.now < begun + secs(300), "it waits for ever");
        }
        world.now - begun
    });
    waits.collect()
}

const GUEST: u64 = 1000;

#[test]
fn tenants_whose_calls_hang_do_not_delay_one_that_has_none() {
    // Tenant 0 is the one that all callers without a key belong to. At the start, and when the calls count as slow.
    for hanging in 0..3 {
        let mut alone = hanging_tenants(usual(), 0, 0, hanging);
        let expected = waits_of_guest(&mut alone, hanging);
        assert_eq!(expected, [3 * CALL; 10]);
        for (tenants, adapters) in
            [(1, 1), (1, 4), (1, 8), (1, 9), (1, 40), (2, 8), (2, 30), (3, 8), (3, 30), (8, 8), (20, 4)]
        {
            for waited in [0, 1, 2] {
                let mut world = hanging_tenants(usual(), tenants, adapters, hanging);
                (0..waited).for_each(|_| world.wait(secs(5)));
                let waits = waits_of_guest(&mut world, hanging);
                assert_eq!(
                    waits, expected,
                    "{tenants} tenants, {adapters} adapters of kind {hanging}, {waited}"
                );
            }
        }
    }
}

/// Some tenants ask for many cold adapters each, all at once. Returns the calls of each that have ended by kind, and how
/// long a guest has waited that asks for an adapter now and then.
fn shares_of_hogs(weights: &[u32], guest_every: Duration) -> (BTreeMap<u64, [usize; 3]>, Vec<Duration>) {
    let adapters = 400 / weights.len().max(2) as u128;
    let mut world = World::with(usual(), &[20; 30]);
    for nth in 0..adapters {
        for (tenant, &weight) in (0..).zip(weights) {
            let reference = SICK + u128::from(tenant) * adapters + nth;
            world.originals.insert(reference, Original::new(reference, 20));
            let ask = world.new_ask(reference);
            world.submit(Ask { tenant: Tenant { id: tenant, weight }, ..ask });
        }
    }
    let (mut begun, mut waits, mut guest) = (BTreeMap::<u64, [usize; 3]>::new(), Vec::new(), None);
    let mut reference = 0;
    while waits.len() < 8 {
        if guest.is_none() && world.now >= guest_every * (waits.len() as u32 + 1) {
            guest = Some((world.ask_at(0, GUEST, reference), world.now));
            reference += 1;
        }
        world.wait(ms(10));
        let due = world.calls.iter().filter(|(_, pending)| world.now >= pending.begun + CALL);
        let due: Vec<_> =
            due.map(|(&call, pending)| (call, pending.asked.tenant, kind(&pending.output))).collect();
        for (call, tenant, kind) in due {
            begun.entry(tenant).or_default()[kind] += 1;
            world.answer(call);
        }
        let ready: Vec<_> = world.ready.keys().copied().filter(|id| world.open.contains_key(id)).collect();
        for id in ready {
            if let Some((asked, at)) = guest.filter(|(asked, _)| *asked == id) {
                waits.push(world.now - at);
                assert_eq!(asked, id);
                guest = None;
            }
            world.release(id);
        }
        world.remove_copies();
    }
    begun.remove(&GUEST);
    (begun, waits)
}

#[test]
fn tenants_with_many_cold_adapters_have_equal_shares_and_a_light_one_does_not_wait_for_them() {
    for hogs in 1..=6 {
        for guest_every in [ms(130), ms(170)] {
            let (ended, waits) = shares_of_hogs(&vec![1; hogs], guest_every);
            let case = format!("{hogs} hogs, a guest every {guest_every:?}: {ended:?}");
            assert_eq!(ended.len(), hogs, "{case}");
            for kind in 0..3 {
                let calls = ended.values().map(|calls| calls[kind]);
                let (least, most) = (calls.clone().min().unwrap(), calls.max().unwrap());
                assert!(least >= 10 && most - least <= 4, "{case}");
            }
            assert_eq!(waits, [3 * CALL; 8], "{case}");
        }
    }
}
