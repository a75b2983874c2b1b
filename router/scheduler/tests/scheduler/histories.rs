//! Long random histories: whatever happens in whatever order, every request gets the tokens it gets alone, and nothing
//! is left behind.

use std::{sync::Arc, time::Duration};

use proptest::{collection::vec, prelude::*};
use scheduler::{GroupId, Limits, Request, RequestId, RopeScaling, SubmitError, Tenant};

use crate::{
    shard::{Payload, STOP},
    world::{Plan, World, ensemble, limits, request, salted},
};

/// Adapters that run together. Each list has two variants.
const LISTS: [&[u16]; 6] = [&[1, 2], &[2, 1], &[1, 2, 3], &[4, 5], &[6, 1, 2, 3], &[3, 3]];

/// A request for an adapter, which may begin to act within the prompt, or for a list of them.
fn request_of(id: u64, (number, begins): (u16, u32), prompt: Vec<u32>, max_new: u32) -> Request<Payload> {
    let adapters_from = begins % prompt.len().max(1) as u32;
    match number.checked_sub(7) {
        None => Request { adapters_from, ..request(id, number, prompt, max_new) },
        Some(list) => ensemble(id, LISTS[list as usize / 2], (list % 2) as u8, prompt, max_new),
    }
}

/// Between the names of a group's members: more than there are operations.
const MEMBERS: u64 = 1000;

#[derive(Debug, Clone)]
enum Op {
    Submit {
        flow: (u64, u16, u128),
        stem: (u64, usize),
        tail: Vec<u32>,
        max_new: u32,
        members: u64,
        flags: Flags,
    },
    Cancel(prop::sample::Index),
    Plan,
    Run,
    Answer {
        nth: usize,
        well: bool,
    },
    Wait(u64),
    Restart,
}

#[derive(Debug, Clone, Copy)]
struct Flags {
    stop: bool,
    prompt_logprobs: bool,
    hidden_states: bool,
    refused: bool,
    /// Where the adapter begins to act, modulo the prompt's length.
    begins: u32,
}

fn op() -> impl Strategy<Value = Op> {
    let often = prop::bool::weighted;
    let begins = prop_oneof![3 => Just(0), 1 => 0..40u32];
    let flags = (often(0.7), often(0.15), often(0.1), often(0.05), begins);
    let flags = flags.prop_map(|(stop, prompt_logprobs, hidden_states, refused, begins)| Flags {
        stop,
        prompt_logprobs,
        hidden_states,
        refused,
        begins,
    });
    let flow =
        (0..4u64, 0..7 + 2 * LISTS.len() as u16, prop_oneof![4 => Just(0), 1 => Just(1), 1 => Just(1 << 64)]);
    let max_new = prop_oneof![1 => Just(0), 9 => 1..30u32];
    let members = prop_oneof![3 => Just(1), 1 => 2..5u64];
    let submit = (flow, (0..3u64, 0..40usize), vec(0..2u32, 0..6), max_new, members, flags);
    prop_oneof![
        6 => submit.prop_map(|(flow, stem, tail, max_new, members, flags)| {
            Op::Submit { flow, stem, tail, max_new, members, flags }
        }),
        1 => any::<prop::sample::Index>().prop_map(Op::Cancel),
        16 => Just(Op::Plan),
        16 => Just(Op::Run),
        3 => (0..3usize, prop::bool::weighted(0.9)).prop_map(|(nth, well)| Op::Answer { nth, well }),
        1 => (1..8000u64).prop_map(Op::Wait),
        1 => prop::bool::weighted(0.02).prop_map(|restart| if restart { Op::Restart } else { Op::Plan }),
    ]
}

fn some_limits() -> impl Strategy<Value = Limits> {
    let sizes = (4..40u32, 1..7u32, 1..5u32, prop_oneof![Just(0), Just(10), Just(25)]);
    let budgets = (1..24u32, 1..7u32, 1..24u32, prop::option::of(1..16u32), 1..80u32);
    let window = prop_oneof![Just(0), 1..40u32];
    let rope = prop_oneof![
        2 => Just(RopeScaling::Fixed),
        1 => (1..40u32).prop_map(|context| RopeScaling::Switch { context }),
        1 => (1..40u32).prop_map(|context| RopeScaling::Dynamic { context }),
    ];
    let model = (any::<bool>(), window, rope, prop::bool::weighted(0.15));
    (sizes, budgets, model).prop_map(|(sizes, budgets, (prefix_caching, kv_window, rope, bidirectional))| {
        Limits {
            adapter_cycle_time: Duration::from_millis(300),
            num_blocks: sizes.0,
            block_size: sizes.1,
            num_slots: sizes.2,
            adapter_bytes: sizes.3,
            max_rows: budgets.0,
            max_sequences: budgets.1,
            max_logit_rows: budgets.2,
            max_prefill_rows: budgets.3,
            max_added_tokens: budgets.4,
            prefix_caching,
            // An encoder has neither windows nor rotary frequencies that follow the length.
            kv_window: if bidirectional { 0 } else { kv_window },
            rope: if bidirectional { RopeScaling::Fixed } else { rope },
            bidirectional,
        }
    })
}

/// A prompt of a few stems, so that many begin alike.
fn prompt((stem, len): (u64, usize), tail: &[u32]) -> Vec<u32> {
    let stem = (0..len as u64).map(|position| ((stem + position * position) % 5) as u32);
    stem.chain(tail.iter().copied()).collect()
}

/// Plays a history to its end, and returns the plans of its steps.
fn play(limits: &Limits, ops: &[Op]) -> Vec<Plan> {
    let mut world = World::new(limits.clone());
    let mut plans = Vec::new();
    for (id, op) in (0..).zip(ops) {
        match op {
            Op::Submit { flow: (tenant, number, salt), stem, tail, max_new, members, flags } => {
                let group = (*members > 1).then_some(GroupId(id));
                // Nothing is generated where rows attend to both sides, nor where hidden states are asked for.
                let hidden_states = flags.hidden_states || limits.bidirectional;
                let max_new = if hidden_states { 0 } else { *max_new };
                let request = |id| Request {
                    group,
                    hidden_states,
                    tenant: Tenant { id: *tenant, weight: 1 + (*tenant as u32) * 3 },
                    stop_ids: if flags.stop { Arc::new([STOP]) } else { Arc::new([]) },
                    prompt_logprobs: flags.prompt_logprobs,
                    ..request_of(id, (*number, flags.begins), prompt(*stem, tail), max_new)
                };
                if flags.refused {
                    world.shard.refuses.insert(RequestId(id));
                }
                for member in 0..*members {
                    let error = world.submit(salted(*salt, request(id + member * MEMBERS))).err();
                    let expected = error.is_none_or(|error| match error {
                        SubmitError::TooLong { .. } | SubmitError::EmptyPrompt => true,
                        SubmitError::NothingToCompute => {
                            max_new == 0 && !flags.prompt_logprobs && !hidden_states
                        }
                        SubmitError::TooManyRows { rows, limit } => limits.bidirectional && rows > limit,
                        SubmitError::TooManyAdapters { adapters, slots } => adapters > slots as usize,
                        SubmitError::AdapterTooLarge { bytes, limit } => bytes > limit && *number >= 7,
                        _ => false,
                    });
                    assert!(expected, "{error:?}");
                }
            }
            Op::Cancel(index) if !world.open.is_empty() => {
                let ids: Vec<_> = world.open.keys().copied().collect();
                world.cancel(*index.get(&ids));
            }
            Op::Cancel(_) => {}
            Op::Plan => plans.extend(world.plan()),
            Op::Run => drop(world.run()),
            Op::Answer { nth, well } => drop(world.answer(*nth, *well)),
            Op::Wait(milliseconds) => world.now += Duration::from_millis(*milliseconds),
            Op::Restart => world.restart(),
        }
    }
    world.run_to_end();
    plans
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_request_gets_the_tokens_it_gets_alone(limits in some_limits(), ops in vec(op(), 1..500)) {
        play(&limits, &ops);
    }

    #[test]
    fn a_roomy_server_keeps_the_same_promise(ops in vec(op(), 1..500)) {
        play(&limits(), &ops);
    }

    #[test]
    fn the_same_history_gives_the_same_plans(limits in some_limits(), ops in vec(op(), 1..200)) {
        prop_assert_eq!(play(&limits, &ops), play(&limits, &ops));
    }
}
