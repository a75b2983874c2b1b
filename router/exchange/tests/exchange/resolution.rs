//! The way from a reference to a lease: equal calls are made once, sizes are refused before bytes are read, and changes
//! at the source are new contents.

use exchange::{Ask, CallId, Fault, Input, Limits, Output, ReferenceId, SourceId, StageFault, Tenant, Tier};

use crate::world::{Asked, World, limits, ms, secs};

fn is_lookup(output: &Output<Asked>) -> bool {
    matches!(output, Output::Lookup { .. })
}

/// Settles the world and counts the lookups, fetches and stages that are made on the way.
fn settle(world: &mut World) -> [usize; 3] {
    let mut made = [0; 3];
    let mut count = |outputs: &[Output<Asked>]| {
        for output in outputs {
            match output {
                Output::Lookup { .. } => made[0] += 1,
                Output::Fetch { .. } => made[1] += 1,
                Output::Stage { .. } => made[2] += 1,
                _ => {}
            }
        }
    };
    count(&world.calls.values().map(|pending| pending.output.clone()).collect::<Vec<_>>());
    loop {
        world.remove_copies();
        let Some((&call, _)) = world.calls.first_key_value() else { return made };
        let outputs = world.answer(call);
        count(&outputs);
    }
}

#[test]
fn equal_calls_are_made_once() {
    // Tenants, credentials and references of the asks, and the lookups, fetches and stages that they take.
    for (tenants, credentials, references, expected) in [
        (1, 1, &[0][..], [1, 1, 1]),
        (5, 1, &[0], [1, 1, 1]),
        (1, 2, &[0], [2, 1, 1]),
        (3, 3, &[0], [3, 1, 1]),
        // Adapters 1 and 2 have the same bytes.
        (1, 1, &[1, 2], [2, 2, 1]),
        (2, 2, &[1, 2], [4, 2, 1]),
        (1, 1, &[0, 1], [2, 2, 2]),
        (4, 2, &[0, 1, 2], [6, 3, 2]),
        // Adapter 3 is read in place.
        (1, 1, &[3], [1, 1, 1]),
        (3, 2, &[3], [2, 1, 1]),
        (2, 2, &[0, 1, 2, 3], [8, 4, 3]),
    ] {
        let roomy = Limits { tenant_calls: 100, ..limits() };
        let mut world = World::with(roomy, &[20, 30, 30, 40]);
        world.original(2).family = 1;
        world.original(3).in_place = true;
        for _ in 0..3 {
            for tenant in 0..tenants {
                for credential in 0..credentials {
                    for &reference in references {
                        world.ask_as(tenant, credential, reference);
                    }
                }
            }
        }
        let case = format!("{tenants} tenants, {credentials} credentials, references {references:?}");
        assert_eq!(settle(&mut world), expected, "{case}");
        assert_eq!(world.ready.len(), world.open.len(), "{case}");
        world.run_to_end();
    }
}

#[test]
fn what_is_known_is_ready_without_a_call() {
    for (tier, in_place) in [(Tier::Host, false), (Tier::Disk, false), (Tier::Host, true), (Tier::Disk, true)]
    {
        let mut world = World::with(limits(), &[20]);
        world.original(0).in_place = in_place;
        let ask = world.new_ask(0);
        world.submit(Ask { tier, ..ask });
        world.settle();
        let ask = world.new_ask(0);
        let id = world.submit(Ask { tier, ..ask });
        assert!(world.calls.is_empty() && world.ready.contains_key(&id), "{tier:?}, in place: {in_place}");
        world.run_to_end();
    }
}

#[test]
fn sizes_are_refused_before_bytes_are_read() {
    let small = Limits { disk_bytes: 100, host_bytes: 60, adapter_bytes: 80, ..limits() };
    // Bytes of the adapter, whether it is read in place, and the bound that it exceeds.
    for (bytes, in_place, limit) in [
        (59, false, None),
        (60, false, Some(60)),
        (61, false, Some(60)),
        (80, false, Some(60)),
        (81, false, Some(80)),
        (u64::MAX, false, Some(80)),
        (u64::MAX / 2, true, Some(80)),
        (59, true, None),
        (80, true, Some(60)),
        (1, false, None),
        (0, false, None),
    ] {
        let mut world = World::with(small, &[bytes]);
        world.padding = 1;
        world.original(0).in_place = in_place;
        let id = world.ask(0);
        let mut staged = 0;
        while let Some((&call, _)) = world.calls.first_key_value() {
            // Until its header is read, an adapter counts with the bytes of its files, which are one less here.
            let may_stage = bytes <= 60;
            let outputs = world.answer(call);
            let stages = outputs.iter().filter(|output| matches!(output, Output::Stage { .. })).count();
            assert!(may_stage || stages == 0, "{bytes} bytes are staged");
            staged += stages;
            let fetches = outputs.iter().filter(|output| matches!(output, Output::Fetch { .. })).count();
            assert!(bytes <= 80 || fetches == 0, "{bytes} bytes are fetched");
        }
        match limit {
            None => assert!(world.ready.contains_key(&id) && staged > 0, "{bytes}"),
            Some(limit) => {
                let Some(Fault::TooLarge { bytes: told, limit: bound }) = world.failed.get(&id) else {
                    panic!("{bytes}: {:?}", world.failed)
                };
                assert!(*bound == limit && *told >= bytes, "{bytes}: {told} of {bound}");
            }
        }
        world.run_to_end();
    }
}

#[test]
fn a_fetch_that_grows_beyond_its_size_is_ended() {
    for (bytes, in_place, ended) in [
        (0, false, false),
        (20, false, false),
        (21, false, true),
        (u64::MAX, false, true),
        (400, true, false),
    ] {
        let mut world = World::with(limits(), &[20]);
        world.original(0).in_place = in_place;
        let id = world.ask(0);
        world.answer(world.first());
        let call = world.first();
        let outputs = world.give(Input::Progress { call, bytes });
        assert_eq!(outputs.contains(&Output::Abort(call)), ended, "{bytes}");
        let limit = 20;
        assert_eq!(world.failed.get(&id), ended.then_some(&Fault::TooLarge { bytes, limit }), "{bytes}");
        world.run_to_end();
    }
}

#[test]
fn a_stage_that_needs_more_room_is_made_again_with_it() {
    let mut world = World::with(limits(), &[20]);
    world.padding = 1;
    let id = world.ask(0);
    let mut asked = Vec::new();
    while let Some((&call, pending)) = world.calls.first_key_value() {
        if let Output::Stage { max_bytes, .. } = pending.output {
            asked.push(max_bytes);
        }
        world.answer(call);
    }
    assert_eq!(asked, [20, 21], "the size of the files, then the exact one");
    world.release(id);
    // The next time the exact size is known.
    world.detach();
    world.host.clear();
    world.attach();
    world.ask(0);
    let Output::Stage { max_bytes, .. } = world.calls[&world.first()].output else { panic!() };
    assert_eq!(max_bytes, 21);
    world.run_to_end();
}

#[test]
fn a_call_that_is_not_answered_fails_and_keeps_its_room_until_it_ends() {
    for calls in 0..3 {
        let mut world = World::with(limits(), &[20, 30]);
        let ask = world.new_ask(0);
        let id = world.submit(Ask { deadline: world.now + secs(300), ..ask });
        for _ in 0..calls {
            world.answer(world.first());
        }
        let call = world.first();
        let reserved = |world: &World| {
            let stats = world.exchange.stats();
            stats.disk.reserved_bytes + stats.host.reserved_bytes
        };
        world.wait(secs(29));
        assert!(world.failed.is_empty());
        let outputs = {
            world.now += secs(1);
            world.give(Input::Tick)
        };
        assert_eq!(outputs, [Output::Abort(call), Output::Failed { ask: id, fault: Fault::Slow }]);
        assert_eq!(reserved(&world), if calls == 0 { 0 } else { 20 }, "after {calls} answers");
        // Asks for the same wait until it has ended, and use what it has brought late.
        world.wait(secs(2));
        let again = world.ask(0);
        assert_eq!(world.calls.len(), 1, "no second call like it");
        world.answer(call);
        world.settle();
        assert!(world.ready.contains_key(&again), "after {calls} answers");
        world.run_to_end();
    }
}

#[test]
fn an_ask_that_is_given_up_leaves_calls_that_others_need() {
    // The budget allows 2 lookups of a tenant, so the third waits.
    let mut world = World::with(limits(), &[20, 30, 40]);
    let asks: Vec<_> = (0..3).map(|reference| world.ask(reference)).collect();
    let other = world.ask_as(1, 0, 2);
    assert_eq!(world.calls.len(), 2);
    world.release(asks[2]);
    world.release(asks[0]);
    assert_eq!(world.calls.len(), 2, "a running call goes on");
    world.release(other);
    assert_eq!(world.exchange.stats().queued, [0; 3], "one that nobody needs is not made");
    world.settle();
    assert_eq!(world.ready.keys().collect::<Vec<_>>(), [&asks[1]]);
    world.run_to_end();
}

#[test]
fn a_call_begins_in_the_name_of_any_tenant_that_has_a_permit() {
    let mut world = World::with(limits(), &[20, 30, 40]);
    for reference in [0, 1] {
        world.ask(reference);
    }
    let first = world.ask(2);
    assert_eq!(world.calls.len(), 2, "tenant 1 has no permit for a third");
    let other = world.ask_as(2, 0, 2);
    assert_eq!(world.calls.len(), 3, "tenant 2 has");
    world.release(other);
    world.settle();
    assert!(world.ready.contains_key(&first), "whoever it was begun for");
    world.run_to_end();
}

#[test]
fn a_call_changes_hands_when_the_ask_that_it_was_for_is_given_up() {
    let mut world = World::with(limits(), &[20, 30, 40, 50]);
    for reference in [0, 1] {
        world.ask(reference);
    }
    let asks = [world.ask(2), world.ask(3), world.ask(2), world.ask(2)];
    world.release(asks[0]);
    world.release(asks[2]);
    assert_eq!((world.calls.len(), world.exchange.stats().queued), (2, [2, 0, 0]));
    world.answer(world.first());
    let next = world.calls.values().filter(|pending| pending.asked.reference == 3).count();
    assert_eq!(next, 1, "the ask that is left came after the one for 3");
    world.settle();
    assert!(world.ready.contains_key(&asks[3]));
    world.run_to_end();
}

#[test]
fn a_changed_revision_is_a_new_content_and_leases_keep_the_old_one() {
    for in_place in [false, true] {
        let mut world = World::with(limits(), &[20]);
        world.original(0).in_place = in_place;
        let old = world.ask(0);
        world.settle();
        world.original(0).revision = 1;
        let early = world.ask(0);
        world.settle();
        assert_eq!(world.ready[&early], world.ready[&old], "the grant says so for a minute");
        world.wait(secs(60));
        let new = world.ask(0);
        world.settle();
        assert_ne!(world.ready[&new], world.ready[&old]);
        let leases = |world: &World| -> Vec<u32> {
            world.exchange.residents(Tier::Host).iter().map(|resident| resident.leases).collect()
        };
        assert_eq!(leases(&world), [2, 1], "both are held");
        world.release(old);
        world.release(early);
        assert_eq!(leases(&world), [0, 1], "the old one ages out");
        world.run_to_end();
    }
}

#[test]
fn a_change_is_found_at_once_after_a_reload_or_where_grants_do_not_last() {
    for reload in [true, false] {
        let mut world = World::with(limits(), &[20]);
        world.original(0).fresh_for = if reload { secs(60) } else { ms(0) };
        let old = world.ask(0);
        world.settle();
        world.original(0).revision = 1;
        if reload {
            world.give(Input::Reload(ReferenceId(0)));
        }
        let new = world.ask(0);
        world.settle();
        assert_ne!(world.ready[&new], world.ready[&old], "reload: {reload}");
        world.run_to_end();
    }
}

#[test]
fn a_reload_leaves_other_references_alone() {
    let mut world = World::with(limits(), &[20, 30]);
    world.ask(0);
    world.ask(1);
    world.settle();
    world.give(Input::Reload(ReferenceId(0)));
    world.ask(1);
    assert!(world.calls.is_empty());
    world.ask(0);
    assert!(is_lookup(&world.calls[&world.first()].output));
    world.run_to_end();
}

#[test]
fn a_version_that_is_gone_is_looked_up_again() {
    // The files change between lookup and fetch, or, where they are read in place, before the stage.
    for (in_place, answers) in [(false, 1), (true, 1), (true, 2)] {
        let mut world = World::with(limits(), &[20]);
        world.original(0).in_place = in_place;
        let id = world.ask(0);
        for _ in 0..answers {
            world.answer(world.first());
        }
        world.original(0).revision = 1;
        world.settle();
        let expected = world.originals[&0].content();
        assert_eq!(world.ready.get(&id), Some(&expected), "in place: {in_place}");
        world.run_to_end();
    }
}

#[test]
fn files_that_change_all_the_time_fail_their_asks() {
    let mut world = World::with(limits(), &[20]);
    let id = world.ask(0);
    while let Some((&call, pending)) = world.calls.first_key_value() {
        if matches!(pending.output, Output::Fetch { .. }) {
            world.original(0).revision += 1;
        }
        world.answer(call);
    }
    assert_eq!((world.original(0).revision, world.failed.get(&id)), (3, Some(&Fault::Changed)));
    world.run_to_end();
}

#[test]
fn a_copy_that_is_lost_is_fetched_again() {
    let mut world = World::with(limits(), &[20]);
    let id = world.ask(0);
    for _ in 0..2 {
        world.answer(world.first());
    }
    world.disk.clear();
    world.settle();
    assert!(world.ready.contains_key(&id));
    assert_eq!(world.exchange.stats().disk.loads, 2);
    world.run_to_end();
}

#[test]
fn answers_to_calls_that_are_not_known_are_ignored() {
    let mut world = World::with(limits(), &[20]);
    let id = world.ask(0);
    world.settle();
    let content = world.ready[&id];
    let call = CallId(77);
    for input in [
        Input::LookedUp { call, result: Err(Fault::Slow) },
        Input::Fetched { call, result: Err(Fault::Slow) },
        Input::Staged { call, result: Err(StageFault::Gone) },
        Input::Staged { call: CallId(1), result: Err(StageFault::Gone) },
        Input::Progress { call, bytes: 1 },
        Input::Release(exchange::AskId(999)),
        Input::Deleted(content),
        Input::Unstaged(content),
    ] {
        assert_eq!(world.give(input.clone()), [], "{input:?}");
    }
    assert!(world.open[&id].ready.is_some());
    world.run_to_end();
}

#[test]
fn the_answer_to_another_kind_of_call_is_ignored() {
    let mut world = World::with(limits(), &[20]);
    let id = world.ask(0);
    let call = world.first();
    for input in [
        Input::Fetched { call, result: Err(Fault::Slow) },
        Input::Staged { call, result: Err(StageFault::Gone) },
        Input::Progress { call, bytes: u64::MAX },
    ] {
        assert_eq!(world.give(input.clone()), [], "{input:?}");
    }
    world.settle();
    assert!(world.ready.contains_key(&id));
    world.run_to_end();
}

#[test]
fn an_ask_with_no_time_or_a_name_in_use_fails_at_once() {
    let mut world = World::with(limits(), &[20]);
    let ask = world.new_ask(0);
    let late = world.submit(Ask { deadline: world.now, ..ask });
    assert_eq!(world.failed.get(&late), Some(&Fault::Slow));
    let ask = world.new_ask(0);
    world.submit(ask.clone());
    let twice = world.exchange.handle(Input::Ask(ask.clone()), world.now);
    assert_eq!(twice, [Output::Failed { ask: ask.id, fault: Fault::Duplicate }]);
    world.settle();
    assert!(world.ready.contains_key(&ask.id), "the first one goes on");
    world.run_to_end();
}

#[test]
fn a_deadline_fails_its_ask_alone() {
    let mut world = World::with(limits(), &[20]);
    let ask = world.new_ask(0);
    let short = world.submit(Ask { deadline: world.now + secs(3), ..ask });
    let long = world.ask(0);
    assert_eq!(world.exchange.next_timer(), Some(secs(3)));
    world.wait(secs(4));
    assert_eq!(world.failed.get(&short), Some(&Fault::Slow));
    world.settle();
    assert!(world.ready.contains_key(&long));
    // Nobody has failed but the ask, so nothing is remembered against the reference.
    let ask = world.new_ask(0);
    let (source, tenant) = (SourceId(0), Tenant { id: 5, weight: 0 });
    let next = world.submit(Ask { source, tenant, ..ask });
    assert!(world.ready.contains_key(&next));
    world.run_to_end();
}

#[test]
fn a_reload_reaches_a_lookup_that_is_running() {
    // Asks that wait for the lookup, with how many credentials, and whether its answer comes before it is given up.
    for (asks, credentials, fails) in [
        (1, 1, false),
        (2, 1, false),
        (5, 1, false),
        (1, 1, true),
        (3, 1, true),
        (2, 2, false),
        (4, 2, false),
        (3, 3, false),
        (3, 3, true),
        (6, 3, true),
    ] {
        let mut world = World::with(Limits { tenant_calls: 100, ..limits() }, &[20, 20]);
        let ids: Vec<_> = (0..asks).map(|ask| world.ask_as(ask, u128::from(ask % credentials), 0)).collect();
        let other = world.ask_as(9, 0, 1);
        let lookups: Vec<_> = world.calls.keys().copied().collect();
        world.give(Input::Reload(ReferenceId(0)));
        // What the lookups have seen is from before the change.
        for call in lookups {
            let of_other = world.calls[&call].asked.reference == 1;
            assert_eq!(world.calls[&call].aborted, !of_other, "{asks} asks");
            match fails && !of_other {
                true => drop(world.fail(call, Fault::Slow)),
                false => drop(world.answer(call)),
            }
        }
        world.original(0).revision = 1;
        world.settle();
        let new = world.originals[&0].content();
        assert!(ids.iter().all(|id| world.ready.get(id) == Some(&new)), "{asks} asks: {:?}", world.failed);
        assert!(world.ready.contains_key(&other));
        world.run_to_end();
    }
}
