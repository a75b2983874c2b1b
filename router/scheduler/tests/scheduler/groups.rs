//! Groups: the members of one compute their prompt once, whatever else happens.

use std::time::Duration;

use proptest::{collection::vec, prelude::*};
use scheduler::{GroupId, Limits, Request, RequestId, RowsPlan, Tenant};

use crate::{
    shard::Payload,
    world::{World, key, limits, prompt, request},
};

/// The members of a group: requests with consecutive names from `first` on, and a prompt that no other group has.
fn group(first: u64, members: u64, adapter: u16, len: usize, max_new: u32) -> Vec<Request<Payload>> {
    let prompt: Vec<_> = prompt(first, len).iter().map(|token| token + 100 * first as u32).collect();
    let member =
        |id| Request { group: Some(GroupId(first)), ..request(id, adapter, prompt.clone(), max_new) };
    (first..first + members).map(member).collect()
}

fn submit(world: &mut World, requests: Vec<Request<Payload>>) {
    requests.into_iter().for_each(|request| world.submit(request).unwrap());
}

/// Prompt rows that a group needs: all of its prompt once, and for the others what lies behind the last full block.
fn rows_needed(members: u64, len: usize, block_size: u32) -> u64 {
    let shared = (len - 1) / block_size as usize * block_size as usize;
    len as u64 + (members - 1) * (len - shared) as u64
}

fn roomy(prefix_caching: bool) -> Limits {
    Limits {
        num_blocks: 8192,
        block_size: 16,
        max_rows: 1024,
        max_sequences: 256,
        max_logit_rows: 1024,
        max_prefill_rows: Some(512),
        prefix_caching,
        ..limits()
    }
}

#[test]
fn the_choices_of_many_requests_compute_each_prompt_once() {
    for prefix_caching in [true, false] {
        let mut world = World::new(roomy(prefix_caching));
        for first in 0..128 {
            submit(&mut world, group(first * 8, 8, 0, 1000, 4));
        }
        world.run_to_end();
        assert_eq!(world.finished.len(), 1024);
        let needed = 128 * rows_needed(8, 1000, 16);
        assert_eq!((needed, world.prompt_rows), (128 * 1056, needed), "prefix caching {prefix_caching}");
    }
}

#[test]
fn every_length_of_a_prompt_is_shared_up_to_its_last_full_block() {
    for prefix_caching in [true, false] {
        for len in 1..14 {
            let mut world = World::new(Limits { prefix_caching, ..limits() });
            submit(&mut world, group(len as u64, 3, 1, len, 5));
            world.run_to_end();
            assert_eq!(world.prompt_rows, rows_needed(3, len, 4), "{len} tokens");
        }
    }
}

#[test]
fn groups_and_others_share_nothing_without_a_prefix_cache() {
    let mut world = World::new(Limits { prefix_caching: false, ..limits() });
    let mut first = group(1, 2, 0, 13, 3);
    let prompt = first[0].prompt.to_vec();
    let second = Request { group: Some(GroupId(2)), ..request(8, 0, prompt.clone(), 3) };
    first.extend([second, request(9, 0, prompt, 3)]);
    submit(&mut world, first);
    world.run_to_end();
    assert_eq!(world.prompt_rows, 13 + 1 + 13 + 13);
}

#[test]
fn who_waits_for_a_prompt_keeps_nobody_else_waiting() {
    let mut world = World::new(Limits { max_rows: 64, max_prefill_rows: Some(64), ..limits() });
    submit(&mut world, group(0, 3, 0, 21, 3));
    world.submit(request(5, 0, prompt(5, 6), 3)).unwrap();
    let plan = world.plan().unwrap();
    let begun: Vec<_> = plan.added.iter().map(|added| added.id.0).collect();
    assert_eq!(begun, [0, 5], "the leader, and who came behind the group");
    let stats = world.scheduler.stats();
    assert_eq!((stats.waiting, stats.waiting_since), (2, Some(Duration::ZERO)));
    // They come before whoever arrived behind them.
    world.submit(request(6, 0, prompt(6, 6), 3)).unwrap();
    world.run();
    let plan = world.plan().unwrap();
    let begun: Vec<_> = plan.added.iter().map(|added| added.id.0).collect();
    assert_eq!(begun, [1, 2, 6]);
    world.run_to_end();
}

/// Whatever becomes of the leader, the next member computes what is missing, and the others wait for that one.
#[test]
fn another_member_takes_the_place_of_a_leader_that_ends() {
    for prefix_caching in [true, false] {
        for turns in 0..4 {
            let mut world = World::new(Limits { prefix_caching, ..limits() });
            submit(&mut world, group(0, 4, 1, 41, 3));
            (0..turns).for_each(|_| assert!(world.turn()));
            world.cancel(RequestId(0));
            world.run_to_end();
            assert_eq!(world.finished.len(), 3, "cancelled after {turns} turns");
            let most = 41 + rows_needed(3, 41, 4);
            assert!(world.prompt_rows <= most, "{} rows of {most}", world.prompt_rows);
        }
        let mut world = World::new(Limits { prefix_caching, ..limits() });
        world.shard.refuses.insert(RequestId(0));
        submit(&mut world, group(0, 3, 0, 9, 3));
        world.run_to_end();
        assert_eq!((world.finished.len(), world.failed.len()), (2, 1));
    }
}

#[test]
fn a_member_that_waits_can_be_cancelled() {
    for cancelled in [vec![1], vec![1, 2], vec![2, 0], vec![0, 1, 2], vec![2, 1, 0]] {
        let mut world = World::new(limits());
        submit(&mut world, group(0, 3, 0, 21, 3));
        world.plan();
        cancelled.iter().for_each(|&id| world.cancel(RequestId(id)));
        world.run_to_end();
        assert_eq!(world.finished.len(), 3 - cancelled.len(), "{cancelled:?}");
        assert_eq!(world.scheduler.stats().waiting, 0);
    }
}

#[test]
fn an_adapter_that_cannot_be_loaded_fails_the_whole_group() {
    let mut world = World::new(limits());
    submit(&mut world, group(0, 4, 2, 9, 3));
    world.submit(request(7, 0, prompt(7, 9), 3)).unwrap();
    world.plan();
    world.run();
    assert_eq!(world.scheduler.stats().loading_adapters, 1);
    assert!(world.answer(0, false), "{:?} is being loaded", key(2));
    assert_eq!(world.failed.len(), 4);
    world.run_to_end();
    assert_eq!(world.finished, [RequestId(7)]);
}

/// The leader ends at once, and others take its blocks before the second member has a seat.
#[test]
fn a_prompt_whose_blocks_are_gone_is_computed_by_one_member() {
    // Without a prefix cache, what others leave is free and is taken first.
    for (prefix_caching, computed) in [(true, 2), (false, 1)] {
        let limits = Limits { num_blocks: 30, max_sequences: 4, prefix_caching, ..limits() };
        let mut world = World::new(limits);
        submit(&mut world, group(0, 4, 0, 33, 1));
        // Tenants that have had less service are next.
        for id in 10..18 {
            let tenant = Tenant { id, weight: 1 };
            world.submit(Request { tenant, ..request(id, 0, prompt(id, 40), 2) }).unwrap();
        }
        let mut from_the_start = 0;
        while !world.open.is_empty() {
            while let Some(plan) = world.plan() {
                let computing = |rows: &&RowsPlan| rows.id.0 < 4 && rows.position < 32;
                let computing: Vec<_> = plan.rows.iter().filter(computing).collect();
                assert!(computing.len() <= 1, "{computing:?} compute the same");
                from_the_start += computing.iter().filter(|rows| rows.position == 0).count();
            }
            world.run();
        }
        assert_eq!((from_the_start, world.scheduler.stats().preemptions), (computed, 0));
        assert_eq!(world.finished.len(), 12);
    }
}

#[derive(Debug, Clone)]
struct Shape {
    members: u64,
    adapter: u16,
    len: usize,
    max_new: u32,
    turns: usize,
}

fn shape() -> impl Strategy<Value = Shape> {
    let numbers = (1..6u64, 0..4u16, 1..60usize, 1..12u32, 0..4usize);
    numbers.prop_map(|(members, adapter, len, max_new, turns)| Shape {
        members,
        adapter,
        len,
        max_new,
        turns,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// Where memory lasts, the rows are those that are needed, however groups, seats and steps fall together.
    #[test]
    fn a_prompt_is_computed_once(
        shapes in vec(shape(), 1..12),
        (block_size, seats, rows) in (1..9u32, 1..9u32, 8..40u32),
        prefix_caching in any::<bool>(),
    ) {
        let limits = Limits {
            num_blocks: 4096,
            block_size,
            max_sequences: seats,
            max_rows: rows,
            max_prefill_rows: None,
            prefix_caching,
            ..limits()
        };
        let mut world = World::new(limits);
        let mut needed = 0;
        for (number, shape) in (0..).zip(&shapes) {
            let Shape { members, adapter, len, max_new, turns } = *shape;
            submit(&mut world, group(number * 100, members, adapter, len, max_new));
            needed += rows_needed(members, len, block_size);
            (0..turns).for_each(|_| _ = world.turn());
        }
        world.run_to_end();
        prop_assert_eq!(world.prompt_rows, needed);
    }
}
