//! Rotary frequencies that depend on the length. The simulated shard keeps to them, and what every request gets is
//! compared with what it gets alone.

use scheduler::{Limits, Request, RequestId, RopeScaling, StepPlan};

use crate::{
    shard::Payload,
    world::{World, limits, prompt, request},
};

fn scaled(rope: RopeScaling) -> Limits {
    Limits { rope, ..limits() }
}

/// Runs a request alone: the plans of its steps.
fn plans(rope: RopeScaling, request: Request<Payload>) -> Vec<StepPlan<Payload>> {
    let mut world = World::new(scaled(rope));
    world.submit(request).unwrap();
    let mut plans = Vec::new();
    loop {
        let plan = world.plan();
        let idle = plan.is_none() && world.run().is_none();
        plans.extend(plan);
        if idle {
            break;
        }
    }
    world.run_to_end();
    plans
}

#[test]
fn a_sequence_that_grows_past_the_context_is_computed_again() {
    // The original context, the length of the prompt, new tokens, and the tokens with which it is added again.
    for (context, len, answer, again) in [
        (20, 5, 30, Some(21)),
        (20, 19, 30, Some(21)),
        (20, 20, 30, Some(21)),
        (20, 21, 30, None),
        (20, 40, 30, None),
        (20, 5, 15, None),
        (20, 5, 16, None),
        (20, 5, 17, Some(21)),
        (20, 20, 1, None),
        (20, 20, 2, Some(21)),
        (1, 1, 5, Some(2)),
        (64, 60, 100, Some(65)),
        (16, 15, 9, Some(17)),
    ] {
        let rope = RopeScaling::Switch { context };
        let plans = plans(rope, request(1, 0, prompt(3, len), answer));
        let added = plans.iter().flat_map(|plan| &plan.added);
        let added: Vec<_> = added.map(|added| added.prompt.len() + added.generated.len()).collect();
        assert_eq!(
            added,
            [Some(len), again].into_iter().flatten().collect::<Vec<_>>(),
            "{context} {len} {answer}"
        );
        let dropped = plans.iter().flat_map(|plan| &plan.dropped).filter(|id| **id == RequestId(1)).count();
        assert_eq!(dropped, 1 + usize::from(again.is_some()), "{context} {len} {answer}");
    }
}

#[test]
fn frequencies_that_follow_the_length_need_no_second_computation() {
    for (context, len, answer) in
        [(20, 5, 30), (20, 20, 30), (20, 21, 9), (1, 1, 40), (8, 64, 9), (64, 60, 100), (7, 3, 60), (9, 9, 9)]
    {
        for rope in [RopeScaling::Dynamic { context }, RopeScaling::Fixed] {
            let plans = plans(rope, request(1, 0, prompt(3, len), answer));
            assert_eq!(plans.iter().flat_map(|plan| &plan.added).count(), 1, "{rope:?}");
        }
    }
}

#[test]
fn prefixes_are_shared_under_equal_frequencies_alone() {
    let (switch, dynamic) = (RopeScaling::Switch { context: 20 }, RopeScaling::Dynamic { context: 20 });
    // The lengths of two prompts of which one begins with the other, and what the second finds of the first.
    for (rope, first, second, hit) in [
        (RopeScaling::Fixed, 13, 41, 12),
        (switch, 13, 20, 12),
        (switch, 13, 21, 0),
        (switch, 20, 21, 0),
        (switch, 21, 20, 0),
        (switch, 21, 41, 20),
        (switch, 41, 21, 20),
        (switch, 41, 20, 0),
        (dynamic, 13, 20, 12),
        (dynamic, 20, 21, 0),
        (dynamic, 21, 20, 0),
        (dynamic, 21, 21, 20),
        (dynamic, 21, 22, 0),
        (dynamic, 41, 40, 0),
        (dynamic, 41, 41, 40),
    ] {
        let mut world = World::new(scaled(rope));
        world.cached(request(1, 0, prompt(1, first), 1));
        let found = world.cached(request(2, 0, prompt(1, second), 1));
        assert_eq!(found, hit, "{rope:?}: {first}, then {second}");
    }
}

#[test]
fn what_is_generated_past_the_context_is_shared_as_it_was_computed() {
    for context in [10, 12, 16, 20, 23, 24, 30, 31, 32, 40] {
        for rope in [RopeScaling::Switch { context }, RopeScaling::Dynamic { context }] {
            let mut world = World::new(scaled(rope));
            // Some begin below and grow past it, others continue what those have generated.
            for id in 0..12 {
                let len = 9 + 3 * id as usize;
                world.submit(request(id, (id % 2) as u16, prompt(1, len), 40 - id as u32)).unwrap();
                world.turn();
            }
            world.run_to_end();
            assert_eq!(world.finished.len(), 12);
            let shares = rope == RopeScaling::Switch { context } || context >= 24;
            assert!(world.scheduler.stats().cached_tokens > 0 || !shares, "{rope:?}");
        }
    }
}
