//! Who may read what: grants, refusals, and failures that are remembered.

use std::time::Duration;

use exchange::{Fault, Input, Output, ReferenceId, Tier};

use crate::world::{World, limits, ms, secs};

/// Asks, settles, and says whether the source was asked and whether the ask got its lease.
fn try_once(world: &mut World, tenant: u64, credential: u128) -> (bool, bool) {
    let id = world.ask_as(tenant, credential, 0);
    let asked = world.calls.values().any(|pending| matches!(pending.output, Output::Lookup { .. }));
    world.settle();
    let ready = world.ready.contains_key(&id);
    world.release(id);
    (asked, ready)
}

#[test]
fn a_grant_holds_for_its_time_and_the_source_is_asked_otherwise() {
    // The time that an answer may be used for, and for each of the waits, whether the source is asked behind it.
    for (fresh_for, waits) in [
        (0, &[(0, true), (0, true), (1, true)][..]),
        (60_000, &[(0, true), (0, false), (59_999, false), (1, true), (1, false)]),
        (1, &[(0, true), (0, false), (1, true), (0, false)]),
        (500, &[(0, true), (499, false), (499, true), (2, false), (10_000, true)]),
    ] {
        let mut world = World::with(limits(), &[20]);
        world.original(0).fresh_for = ms(fresh_for);
        for (step, &(wait, asked)) in waits.iter().enumerate() {
            world.wait(ms(wait));
            assert_eq!(try_once(&mut world, 1, 7), (asked, true), "step {step} of {fresh_for}");
        }
        world.run_to_end();
    }
}

#[test]
fn who_may_not_read_is_refused_whatever_is_cached() {
    for tier in [Tier::Host, Tier::Disk] {
        let mut world = World::with(limits(), &[20]);
        world.original(0).denied = [1, 2, 3].into();
        let ask = world.new_ask(0);
        world.submit(exchange::Ask { tier, ..ask });
        world.settle();
        for credential in 0..4 {
            // It is asked at the source like everybody, so that no time tells whether the adapter is here.
            let asked = credential > 0;
            assert_eq!(try_once(&mut world, 5, credential), (asked, credential == 0), "{credential}");
        }
        world.run_to_end();
    }
}

#[test]
fn good_and_bad_credentials_at_once_do_not_touch_each_other() {
    for bad_first in [true, false] {
        for bad in 1..4u128 {
            let mut world = World::with(limits(), &[20]);
            world.original(0).denied = (0..bad).collect();
            let order: Vec<u128> = if bad_first { (0..6).collect() } else { (0..6).rev().collect() };
            let asks: Vec<_> = order
                .iter()
                .map(|&credential| (world.ask_as(credential as u64, credential, 0), credential))
                .collect();
            world.settle();
            for (id, credential) in asks {
                let denied = matches!(world.failed.get(&id), Some(Fault::Denied(_)));
                assert_eq!((denied, world.ready.contains_key(&id)), (credential < bad, credential >= bad));
            }
            world.run_to_end();
        }
    }
}

#[test]
fn a_fetch_that_is_refused_goes_on_with_another_credential() {
    for revoked in 1..4 {
        let mut world = World::with(limits(), &[20]);
        let asks: Vec<_> = (0..4).map(|credential| world.ask_as(credential as u64, credential, 0)).collect();
        while matches!(world.calls[&world.first()].output, Output::Lookup { .. }) {
            world.answer(world.first());
        }
        // The source changes its mind about the first ones.
        world.original(0).denied = (0..revoked).collect();
        for _ in 0..revoked {
            let call = world.first();
            let Output::Fetch { .. } = world.calls[&call].output else { panic!() };
            world.fail(call, Fault::Denied("not any more".into()));
        }
        world.settle();
        for (credential, id) in asks.into_iter().enumerate() {
            assert_eq!(world.ready.contains_key(&id), credential as u128 >= revoked, "{revoked}");
        }
        // Their grants are void.
        world.wait(secs(2));
        let again = world.ask_as(0, 0, 0);
        world.settle();
        assert!(matches!(world.failed.get(&again), Some(Fault::Denied(_))));
        world.run_to_end();
    }
}

#[test]
fn a_refusal_ends_a_grant_at_once() {
    let mut world = World::with(limits(), &[20]);
    assert_eq!(try_once(&mut world, 1, 1), (true, true));
    world.original(0).denied.insert(1);
    assert_eq!(try_once(&mut world, 1, 1), (false, true), "within its time");
    world.wait(secs(60));
    assert_eq!(try_once(&mut world, 1, 1), (true, false));
    assert_eq!(try_once(&mut world, 1, 1), (false, false), "the refusal is remembered");
    world.original(0).denied.clear();
    world.wait(secs(1));
    assert_eq!(try_once(&mut world, 1, 1), (true, true));
    world.run_to_end();
}

#[test]
fn failures_are_remembered_for_a_short_time_that_grows() {
    let faults = [
        Fault::NotFound("no".into()),
        Fault::Denied("no".into()),
        Fault::Unavailable("gone away".into()),
        Fault::Invalid("not an adapter".into()),
        Fault::TooLarge { bytes: 9, limit: 8 },
        Fault::Slow,
    ];
    for fault in faults {
        // At which of the calls it fails.
        for at in 0..3 {
            let mut world = World::with(limits(), &[20]);
            world.original(0).fresh_for = ms(0);
            let fail_once = |world: &mut World| {
                let id = world.ask(0);
                while let Some((&call, pending)) = world.calls.first_key_value() {
                    let is_at = match pending.output {
                        Output::Lookup { .. } => at == 0,
                        Output::Fetch { .. } => at == 1,
                        _ => at == 2,
                    };
                    if is_at {
                        world.fail(call, fault.clone())
                    } else {
                        world.answer(call)
                    };
                }
                assert_eq!(world.failed.get(&id), Some(&fault), "at call {at}");
            };
            for seconds in [1, 2, 4, 8, 8] {
                fail_once(&mut world);
                for wait in [Duration::ZERO, ms(seconds * 1000 - 1)] {
                    world.wait(wait);
                    let id = world.ask(0);
                    world.settle();
                    assert_eq!(world.failed.get(&id), Some(&fault), "{fault:?} at {at} within {seconds} s");
                }
                world.wait(ms(1));
            }
            let id = world.ask(0);
            world.settle();
            assert!(world.ready.contains_key(&id), "{fault:?} at {at}");
            world.run_to_end();
        }
    }
}

#[test]
fn a_failure_that_is_long_ago_counts_as_the_first() {
    let mut world = World::with(limits(), &[20]);
    for _ in 0..4 {
        world.ask(0);
        world.fail(world.first(), Fault::Slow);
        // The time of the last failure, and the longest one beside.
        world.wait(secs(17));
    }
    world.ask(0);
    world.fail(world.first(), Fault::Slow);
    world.wait(ms(999));
    world.ask(0);
    assert!(world.calls.is_empty());
    world.wait(ms(1));
    world.ask(0);
    assert!(!world.calls.is_empty(), "a second is over");
    world.run_to_end();
}

#[test]
fn failures_are_of_one_reference_and_one_credential() {
    let mut world = World::with(limits(), &[20, 30]);
    world.ask_as(1, 1, 0);
    world.fail(world.first(), Fault::Unavailable("for this one".into()));
    for (tenant, credential, reference, fails) in [
        (1, 1, 0, true),
        (2, 1, 0, true),
        (1, 2, 0, false),
        (1, 1, 1, false),
        (2, 2, 1, false),
        (9, 0, 0, false),
    ] {
        let id = world.ask_as(tenant, credential, reference);
        assert_eq!(world.failed.contains_key(&id), fails, "{tenant} {credential} {reference}");
    }
    world.give(Input::Reload(ReferenceId(0)));
    let id = world.ask_as(1, 1, 0);
    assert!(!world.failed.contains_key(&id), "a reload forgets it");
    world.run_to_end();
}

#[test]
fn a_content_that_cannot_be_served_is_remembered_under_all_its_names() {
    let mut world = World::with(limits(), &[20, 20]);
    world.original(1).family = 0;
    let first = world.ask(0);
    for _ in 0..2 {
        world.answer(world.first());
    }
    let fault = Fault::Invalid("use_dora".into());
    world.fail(world.first(), fault.clone());
    let second = world.ask_as(2, 5, 1);
    world.settle();
    assert_eq!([&first, &second].map(|id| world.failed.get(id)), [Some(&fault); 2]);
    assert_eq!(world.exchange.stats().host.loads, 0);
    world.run_to_end();
}
