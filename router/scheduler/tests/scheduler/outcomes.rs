//! Ends of requests other than with their last token: refused, scored, or cancelled; and the bound of a step's message.

use scheduler::{Event, FailReason, Limits, Request, RequestId};

use crate::{
    shard::Payload,
    world::{World, key, limits, prompt, request},
};

fn scored(id: u64, len: usize) -> Request<Payload> {
    Request { prompt_logprobs: true, ..request(id, 0, prompt(id, len), 0) }
}

/// Every row is computed, also that of the last token, and none comes from the cache.
#[test]
fn hidden_states_take_every_row() {
    let hidden =
        |id: u64, len: usize, new| Request { hidden_states: true, ..request(id, 0, prompt(9, len), new) };
    for len in [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 40] {
        let mut world = World::new(limits());
        for id in 0..3 {
            world.submit(hidden(id, len, 0)).unwrap();
            world.run_to_end();
        }
        assert_eq!(world.finished.len(), 3, "{len} tokens");
    }
    let mut world = World::new(limits());
    let refused = world.submit(hidden(1, 4, 2)).unwrap_err();
    assert_eq!(refused.to_string(), "both new tokens and hidden states are asked for");
}

/// Where rows attend to both sides, a step has all rows of a sequence or none, and the next sequence that fits may come in.
#[test]
fn sequences_that_attend_to_both_sides_are_not_divided() {
    let limits = Limits { bidirectional: true, max_rows: 16, max_logit_rows: 16, ..limits() };
    let lens = [9, 9, 5, 16, 1, 12, 3, 7, 2, 15];
    let mut world = World::new(limits.clone());
    for (id, len) in lens.iter().enumerate() {
        let request = request(id as u64, 0, prompt(id as u64, *len), 0);
        world.submit(Request { hidden_states: true, ..request }).unwrap();
    }
    let first = world.plan().unwrap();
    let rows: Vec<_> = first.rows.iter().map(|rows| (rows.id.0, rows.rows)).collect();
    assert_eq!(rows, [(0, 9), (2, 5), (4, 1)]);
    world.run_to_end();
    assert_eq!(world.finished.len(), lens.len());
    let long = Request { hidden_states: true, ..request(99, 0, prompt(1, 17), 0) };
    let refused = world.submit(long).unwrap_err().to_string();
    assert_eq!(refused, "the 17 tokens must be computed in one step, which has 16 rows");
}

#[test]
fn a_refused_sequence_fails_alone() {
    // The refused one's place in its step, its adapter, the length of its prompt, and whether it is scored.
    for (place, adapter, len, logprobs) in [
        (0, 0, 4, false),
        (1, 0, 4, false),
        (2, 0, 4, false),
        (0, 1, 4, false),
        (1, 1, 4, false),
        (2, 2, 4, false),
        (0, 0, 60, false),
        (1, 0, 60, false),
        (2, 1, 60, false),
        (0, 0, 1, false),
        (1, 0, 4, true),
        (2, 0, 60, true),
    ] {
        let case = format!("place {place}, adapter {adapter}, {len} tokens, scored: {logprobs}");
        let mut world = World::new(Limits { max_rows: 64, max_prefill_rows: Some(48), ..limits() });
        // The adapters are there already.
        for number in 1..3 {
            world.submit(request(100 + number, number as u16, vec![1], 1)).unwrap();
            world.run_to_end();
        }
        for id in 0..3 {
            let request = match id == place {
                true => Request {
                    prompt_logprobs: logprobs,
                    ..request(id, adapter, prompt(50, len), if logprobs { 0 } else { 9 })
                },
                false => request(id, (id % 3) as u16, prompt(id, 4), 9),
            };
            world.submit(request).unwrap();
        }
        world.shard.refuses.insert(RequestId(place));
        let first = world.plan().unwrap();
        assert!(first.added.iter().any(|added| added.id.0 == place), "{case}");
        // A second step with rows of it is in flight when the refusal comes.
        world.plan();
        let events = world.run().unwrap();
        let failed = |event: &&Event| matches!(event, Event::Failed { .. });
        let reason = FailReason::Refused { index: 0 };
        let failed: Vec<_> = events.iter().filter(failed).collect();
        assert_eq!(failed, [&Event::Failed { id: RequestId(place), reason }], "{case}");
        let running = world.scheduler.stats().running;
        assert_eq!(world.plan().unwrap().dropped, [RequestId(place)], "{case}");
        assert_eq!(running, 2, "{case}");
        world.run_to_end();
        assert_eq!(world.failed.len(), 1, "{case}");
    }
}

#[test]
fn refusals_of_requests_that_have_ended_are_ignored() {
    let mut world = World::new(limits());
    for id in 0..3 {
        world.submit(request(id, 0, prompt(id, 4), 4)).unwrap();
    }
    world.shard.refuses.extend([0, 1].map(RequestId));
    world.plan();
    // One is cancelled, and its name belongs to a new request by then.
    world.cancel(RequestId(0));
    world.submit(request(0, 0, prompt(9, 4), 2)).unwrap();
    let events = world.run().unwrap();
    let reason = FailReason::Refused { index: 1 };
    assert!(events.contains(&Event::Failed { id: RequestId(1), reason }), "{events:?}");
    assert!(world.failed.len() == 1 && world.open.contains_key(&RequestId(0)));
    world.shard.refuses.clear();
    world.run_to_end();
    assert!(world.finished.contains(&RequestId(0)) && world.finished.contains(&RequestId(2)));
    assert_eq!(world.scheduler.complete(99, &[], &[RequestId(2)]), [], "a step that is not in flight");
}

#[test]
fn a_prompt_is_scored_without_an_answer() {
    for len in [1, 2, 3, 4, 5, 8, 15, 16, 17, 18, 40, 63] {
        for (rows, logits) in [(64, 64), (16, 64), (64, 5), (1, 1)] {
            let limits =
                Limits { max_rows: 64, max_prefill_rows: Some(rows), max_logit_rows: logits, ..limits() };
            let mut world = World::new(limits);
            world.submit(scored(1, len)).unwrap();
            let (mut planned, mut events) = (0, Vec::new());
            while let Some(plan) = world.plan() {
                planned += plan.rows.iter().map(|rows| rows.rows).sum::<u32>();
                assert!(plan.rows.iter().all(|rows| !rows.sample));
                events.extend(world.run().unwrap());
            }
            // All positions but the last, and one row for a prompt of one token.
            assert_eq!(planned as usize, (len - 1).max(1), "{len} tokens");
            assert_eq!(events.last(), Some(&Event::Scored { id: RequestId(1) }), "{len} tokens");
            world.run_to_end();
        }
    }
}

#[test]
fn prompts_are_scored_beside_answers_and_through_preemptions() {
    let mut world = World::new(Limits { num_blocks: 20, prefix_caching: false, ..limits() });
    for id in 0..30 {
        let request = if id % 3 == 0 { scored(id, 30) } else { request(id, 0, prompt(id, 8), 30) };
        world.submit(request).unwrap();
    }
    world.run_to_end();
    assert_eq!(world.finished.len(), 30);
    assert!(world.scheduler.stats().preemptions > 0, "blocks ran out");
}

#[test]
fn a_step_passed_over_has_scored_nothing() {
    let mut world = World::new(limits());
    world.submit(scored(1, 5)).unwrap();
    world.submit(request(2, 0, prompt(2, 5), 5)).unwrap();
    let first = world.plan().unwrap();
    let second = world.plan().unwrap();
    let events = world.scheduler.complete(second.id, &[], &[]);
    let reason = FailReason::NoResult { step: first.id };
    assert!(events.contains(&Event::Failed { id: RequestId(1), reason }), "{events:?}");
    world.scheduler.check();
}

#[test]
fn the_message_of_a_step_has_a_bounded_number_of_tokens() {
    // A limit, prompts that arrive together, and how many of them each step adds.
    for (limit, prompts, expected) in [
        (100, &[10, 10, 10][..], &[3][..]),
        (30, &[10, 10, 10], &[3]),
        (29, &[10, 10, 10], &[2, 1]),
        (10, &[10, 10, 10], &[1, 1, 1]),
        (1, &[10, 10, 10], &[1, 1, 1]),
        (15, &[20, 10, 10], &[1, 1, 1]),
        (20, &[20, 10, 10], &[1, 2]),
        (15, &[5, 20, 5, 5], &[1, 1, 2]),
        (25, &[5, 20, 5, 5], &[2, 2]),
        (1, &[1, 1], &[1, 1]),
    ] {
        let mut world =
            World::new(Limits { max_added_tokens: limit, max_prefill_rows: Some(32), ..limits() });
        for (id, len) in (0..).zip(prompts) {
            world.submit(request(id, 0, prompt(id, *len), 40)).unwrap();
        }
        let mut added = Vec::new();
        while added.iter().sum::<usize>() < prompts.len() {
            added.push(world.plan().unwrap().added.len());
            world.run();
        }
        assert_eq!(added, expected, "limit {limit}, prompts {prompts:?}");
        world.run_to_end();
    }
}

#[test]
fn a_prompt_that_is_all_cached_counts_with_all_its_tokens() {
    // What made the message too large: many long prompts of which each step computes a row or two.
    let limits = Limits { num_blocks: 2_000, max_added_tokens: 4_000, ..limits() };
    let mut world = World::new(limits);
    world.submit(request(1, 0, prompt(1, 1_000), 1)).unwrap();
    world.run_to_end();
    for id in 2..9 {
        world.submit(request(id, 0, prompt(1, 1_000), 20)).unwrap();
    }
    assert_eq!(world.plan().unwrap().added.len(), 4);
    assert_eq!(world.plan().unwrap().added.len(), 3);
    world.run_to_end();
    assert!(world.shard.most_added <= 4_000, "{} tokens", world.shard.most_added);
}

#[test]
fn a_slot_whose_load_failed_is_emptied_on_all_ranks() {
    // Whether others want the slot at once, and whether they need its bytes.
    for (others, bytes) in
        [(0, 0), (1, 0), (3, 0), (0, 10), (1, 10), (3, 10), (0, 25), (1, 25), (3, 25), (5, 25)]
    {
        let mut world = World::new(Limits { adapter_bytes: bytes, num_slots: 2, ..limits() });
        world.submit(request(1, 1, prompt(1, 3), 3)).unwrap();
        assert_eq!(world.plan().unwrap().load, [(0, key(1))]);
        world.run();
        for id in 0..others {
            world.submit(request(10 + id, 2 + id as u16, prompt(id, 3), 3)).unwrap();
        }
        assert!(world.answer(0, false));
        let plan = world.plan().unwrap();
        assert_eq!(plan.unload, [0], "{others} others, {bytes} bytes");
        assert_eq!(plan.load.len(), (others as usize).min(if bytes == 10 { 1 } else { 2 }));
        world.run_to_end();
        assert_eq!(world.finished.len(), others as usize);
    }
}
