//! Blocks: growth, preemption, and the prefix cache.

use scheduler::{Limits, Request, RequestId, RopeScaling};

use crate::{
    shard::{Payload, plain},
    world::{World, limits, prompt, request, salted},
};

/// A request whose adapter begins to act at a position.
fn begins(id: u64, number: u16, adapters_from: u32, prompt: Vec<u32>) -> Request<Payload> {
    Request { adapters_from, ..request(id, number, prompt, 1) }
}

#[test]
fn blocks_before_an_adapter_begins_are_the_base_models() {
    let mut world = World::new(limits());
    let text = prompt(1, 26);
    assert_eq!(world.cached(request(1, 0, text.clone(), 1)), 0);
    // The block in which it begins is its own, and so are those behind it.
    for (id, number, from, hit) in [
        (2, 1, 14, 12),
        (3, 1, 14, 24),
        (4, 2, 14, 12),
        (5, 2, 16, 16),
        (6, 1, 13, 12),
        (7, 1, 12, 12),
        (8, 1, 3, 0),
        (9, 1, 0, 0),
        (10, 1, 4, 4),
        (11, 0, 0, 24),
    ] {
        assert_eq!(world.cached(begins(id, number, from, text.clone())), hit, "{id}");
    }
}

#[test]
fn blocks_that_an_adapter_left_to_the_base_model_serve_everybody() {
    let mut world = World::new(limits());
    let text = prompt(1, 26);
    assert_eq!(world.cached(begins(1, 1, 14, text.clone())), 0);
    assert_eq!(world.cached(request(2, 0, text.clone(), 1)), 12);
    assert_eq!(world.cached(begins(3, 2, 10, text)), 8);
}

#[test]
fn blocks_are_taken_as_a_sequence_grows() {
    let mut world = World::new(limits());
    world.submit(request(1, 0, prompt(1, 6), 100)).unwrap();
    let mut held = Vec::new();
    for _ in 0..7 {
        world.plan();
        held.push(64 - world.scheduler.stats().free_blocks);
        world.run();
    }
    // 6 positions and one more a step, in blocks of 4.
    assert_eq!(held, [2, 2, 2, 3, 3, 3, 3]);
    world.run_to_end();
}

#[test]
fn the_youngest_gives_way_and_loses_nothing() {
    let mut world = World::new(Limits { num_blocks: 12, ..limits() });
    for id in 0..3 {
        world.submit(request(id, 0, prompt(id, 6), 30)).unwrap();
    }
    let mut victims = Vec::new();
    while victims.is_empty() {
        let plan = world.plan().unwrap();
        victims.extend(plan.dropped);
        world.run();
    }
    assert_eq!(victims, [RequestId(2)]);
    world.run_to_end();
    assert_eq!(world.finished, [0, 1, 2].map(RequestId), "the older end first");
}

#[test]
fn nobody_is_admitted_into_blocks_that_others_need_next() {
    let mut world =
        World::new(Limits { num_blocks: 16, max_rows: 99, max_prefill_rows: Some(99), ..limits() });
    for id in 0..8 {
        world.submit(request(id, 0, prompt(id, 12), 12)).unwrap();
    }
    // 3 blocks for the prompt, one for the token in flight, and one to grow into.
    (0..3).for_each(|_| assert!(world.turn()));
    let stats = world.scheduler.stats();
    assert_eq!((stats.running, stats.preemptions), (3, 0));
    world.run_to_end();
}

#[test]
fn results_in_flight_of_a_preempted_sequence_count() {
    // Two sequences grow to 3 blocks each, and there are 4: the second gives way with a token in flight.
    let mut world = World::new(Limits { num_blocks: 4, prefix_caching: false, ..limits() });
    world.submit(request(1, 0, prompt(1, 3), 10)).unwrap();
    world.submit(request(2, 0, prompt(2, 3), 10)).unwrap();
    let mut seen = false;
    while let Some(plan) = world.plan() {
        seen |= plan.dropped == [RequestId(2)] && world.open.contains_key(&RequestId(2));
        if world.scheduler.stats().in_flight == scheduler::MAX_IN_FLIGHT {
            world.run();
        }
    }
    assert!(seen, "the second was preempted");
    world.run_to_end();
}

#[test]
fn a_shared_prefix_is_computed_once() {
    let mut world = World::new(limits());
    let with = |id: u64, adapter: u16, len: usize| request(id, adapter, prompt(1, len), 1);
    for (request, hit) in [
        (with(1, 0, 13), 0),
        // The last token is always computed: 3 blocks of 4.
        (with(2, 0, 13), 12),
        (with(3, 0, 12), 8),
        (with(4, 0, 30), 12),
        (with(5, 0, 30), 28),
        (with(6, 0, 3), 0),
        // Another adapter's KV differs.
        (with(7, 1, 13), 0),
        (with(8, 1, 13), 12),
        (with(9, 2, 13), 0),
    ] {
        let id = request.id;
        assert_eq!(world.cached(request), hit, "{id:?}");
    }
}

#[test]
fn generated_tokens_are_a_prefix_too() {
    let mut world = World::new(limits());
    assert_eq!(world.cached(request(1, 0, prompt(1, 5), 12)), 0);
    let mut longer = prompt(1, 5);
    longer.extend(plain(&request(0, 0, longer.clone(), 12), RopeScaling::Fixed));
    // 5 + 12 positions, the last of which was never computed: 4 blocks of 4.
    longer.push(3);
    assert_eq!(world.cached(request(2, 0, longer, 1)), 16);
}

#[test]
fn log_probabilities_of_a_prompt_need_all_of_it() {
    let mut world = World::new(limits());
    let scored = |id: u64| Request { prompt_logprobs: true, ..request(id, 0, prompt(1, 13), 1) };
    assert_eq!(world.cached(request(1, 0, prompt(1, 13), 1)), 0);
    assert_eq!(world.cached(scored(2)), 0);
    // What it computes serves others all the same.
    let mut world = World::new(limits());
    assert_eq!(world.cached(scored(1)), 0);
    assert_eq!(world.cached(request(2, 0, prompt(1, 13), 1)), 12);
}

#[test]
fn without_a_prefix_cache_nothing_is_shared() {
    let mut world = World::new(Limits { prefix_caching: false, ..limits() });
    for id in 0..3 {
        assert_eq!(world.cached(request(id, 0, prompt(1, 13), 1)), 0);
    }
    assert_eq!(world.scheduler.stats().free_blocks, 64);
}

#[test]
fn a_prefix_is_not_shared_before_it_has_been_computed() {
    let mut world = World::new(limits());
    world.submit(request(1, 0, prompt(1, 13), 9)).unwrap();
    world.plan();
    world.submit(request(2, 0, prompt(1, 13), 9)).unwrap();
    world.plan();
    world.run_to_end();
    assert_eq!(world.scheduler.stats().cached_tokens, 0);
}

#[test]
fn running_sequences_share_blocks() {
    let mut world = World::new(limits());
    world.submit(request(1, 0, prompt(1, 13), 9)).unwrap();
    world.turn();
    let free = world.scheduler.stats().free_blocks;
    world.submit(request(2, 0, prompt(1, 13), 9)).unwrap();
    world.plan().unwrap();
    // Two sequences of 4 blocks, 3 of which are the same.
    assert_eq!((free, world.scheduler.stats().free_blocks), (60, 59));
    world.cancel(RequestId(1));
    world.run_to_end();
}

#[test]
fn the_least_recently_used_prefix_leaves_and_a_tail_before_its_head() {
    let mut world = World::new(Limits { num_blocks: 8, ..limits() });
    // 3 full blocks each; the fourth of each is free again.
    world.cached(request(1, 0, prompt(1, 13), 1));
    world.cached(request(2, 0, prompt(2, 13), 1));
    assert_eq!(world.scheduler.stats().cached_blocks, 6);
    assert_eq!(world.cached(request(3, 0, prompt(1, 13), 1)), 12, "used again");
    // 4 blocks, of which 2 are free: the last two of the second prefix leave.
    world.cached(request(4, 0, prompt(4, 13), 1));
    assert_eq!(world.cached(request(5, 0, prompt(1, 13), 1)), 12);
    assert_eq!(world.cached(request(6, 0, prompt(2, 5), 1)), 4);
}

#[test]
fn a_large_request_is_not_overtaken_for_ever() {
    let mut world = World::new(Limits { num_blocks: 10, prefix_caching: false, ..limits() });
    let small = |id: u64| request(id, 0, prompt(id, 3), 6);
    world.submit(small(1)).unwrap();
    world.submit(small(2)).unwrap();
    world.turn();
    world.submit(request(100, 0, prompt(7, 33), 4)).unwrap();
    // Small ones keep coming; each would fit before the large one.
    for id in 3..40 {
        world.submit(small(id)).unwrap();
        world.turn();
    }
    assert!(world.finished.contains(&RequestId(100)));
    world.run_to_end();
}

#[test]
fn blocks_are_shared_under_equal_adapters_and_salts_alone() {
    let prompt = || prompt(1, 13);
    let one = |id, adapter, salt| salted(salt, request(id, adapter, prompt(), 1));
    let mut world = World::new(Limits { num_slots: 4, ..limits() });
    // Adapter, salt, and the tokens that come from the cache.
    for (id, (adapter, salt, hit)) in (1..).zip([
        (0, 0, 0),
        (0, 0, 12),
        (0, 1, 0),
        (0, 1 << 64, 0),
        (0, u128::MAX, 0),
        (0, 1, 12),
        (0, 1 << 64, 12),
        (1, 0, 0),
        (1, 1, 0),
        (1, 1, 12),
        (2, 1, 0),
        (0, 0, 12),
    ]) {
        let hits = world.cached(one(id, adapter, salt));
        assert_eq!(hits, hit, "adapter {adapter}, salt {salt}");
    }
    // Tenants are not told apart by the cache: whoever gives them equal salts lets them share.
    let tenant = scheduler::Tenant { id: 7, weight: 1 };
    assert_eq!(world.cached(Request { tenant, ..one(100, 0, 1) }), 12);
}

#[test]
fn preempted_sequences_come_back_and_lose_nothing() {
    // Blocks, answers, whether blocks are cached, and how many preemptions there are at least.
    for (num_blocks, answer, prefix_caching, least) in [
        (12, 30, true, 1),
        (12, 30, false, 1),
        (16, 40, true, 1),
        (16, 50, false, 2),
        (20, 60, true, 2),
        (24, 60, true, 2),
        (24, 70, false, 2),
        (30, 80, true, 2),
        (40, 120, true, 2),
        (40, 140, false, 4),
    ] {
        let mut world = World::new(Limits { num_blocks, prefix_caching, ..limits() });
        for id in 0..12 {
            world.submit(request(id, (id % 3) as u16, prompt(id, 6), answer - id as u32)).unwrap();
        }
        let mut resumed = 0;
        loop {
            let plan = world.plan();
            resumed += plan.iter().flat_map(|plan| &plan.added).filter(|a| !a.generated.is_empty()).count();
            if plan.is_none() && !world.turn() {
                break;
            }
        }
        // Every token has been compared with what the request gets alone.
        world.run_to_end();
        let preemptions = world.scheduler.stats().preemptions;
        let case =
            format!("{num_blocks} blocks, answers of {answer}: {preemptions} preemptions, {resumed} resumed");
        assert!(preemptions >= least && resumed as u64 >= least, "{case}");
        assert_eq!(world.finished.len(), 12, "{case}");
    }
}
