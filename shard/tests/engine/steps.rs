//! Steps of whole sequences, and those that contradict the protocol.

use kernels::CapturedStep;
use lorax_shard::step::{Member, NewSequence, Rows, Step};
use model::adapter::ContentHash;

use crate::{
    fake::{Fake, Fault, Script},
    harness::{Shard, prompt, rows},
    tiny,
};

#[tokio::test]
async fn chunks_and_steps_in_flight_change_no_token() {
    let shard = Shard::start();
    let plain = shard.generate(None, 20, false).await;
    assert_eq!(plain.len(), 9);
    for (chunk, ahead) in [(7, false), (20, true), (1, true)] {
        assert_eq!(shard.generate(None, chunk, ahead).await, plain, "chunk {chunk}, ahead {ahead}");
    }
    let one = shard.staged("one").await;
    let two = shard.staged("two").await;
    let (with_one, with_two) =
        (shard.generate(Some((0, one)), 20, false).await, shard.generate(Some((1, two)), 20, false).await);
    assert!(with_one != plain && with_two != plain && with_one != with_two, "adapters have a say");
    assert_eq!(shard.generate(Some((1, one)), 7, true).await, with_one, "in any slot");
}

#[tokio::test]
async fn steps_that_contradict_the_protocol_are_refused_and_harm_nobody() {
    let shard = Shard::start();
    let plain = shard.generate(None, 20, false).await;
    let of = |members| NewSequence {
        sequence: 1,
        tokens: vec![1, 2],
        prompt_len: 2,
        members,
        ..NewSequence::default()
    };
    let new = |slot: Option<u32>| of(slot.map(Member::alone).into_iter().collect());
    let rows =
        |sequence, position, count, new_blocks: &[u32]| rows(sequence, position, count, new_blocks, true);
    let step = |added: Vec<NewSequence>, rows: Vec<Rows>| Step { added, rows, ..Step::default() };
    let cases = [
        (step(vec![], vec![rows(8, 0, 1, &[0])]), "sequence 8 does not run"),
        (step(vec![new(None), new(None)], vec![]), "sequence 1 runs already"),
        (
            step(vec![of(vec![Member::alone(0); 5])], vec![]),
            "adapter of a sequence 5 is out of range, limit 5",
        ),
        (Step { dropped: vec![4], ..Step::default() }, "sequence 4 does not run"),
        (Step { unload: vec![2], ..Step::default() }, "slot 2 is out of range, limit 2"),
        (step(vec![new(Some(1))], vec![rows(1, 0, 2, &[0])]), "slot 1 is not ready"),
        (step(vec![new(None)], vec![rows(1, 0, 2, &[16])]), "block 16 is out of range, limit 16"),
        (step(vec![new(None)], vec![rows(1, 0, 2, &[])]), "sequence 1 has 0 blocks, position 2 needs more"),
        (
            step(vec![new(None)], vec![Rows { released_blocks: 1, ..rows(1, 0, 2, &[0]) }]),
            "sequence 1 has released 1 blocks, position 0 is in one of them",
        ),
        (
            step(vec![new(None)], vec![Rows { released_blocks: usize::MAX, ..rows(1, 17, 1, &[0]) }]),
            "sequence 1 has released 18446744073709551615 blocks, position 17 is in one of them",
        ),
        (step(vec![new(None)], vec![rows(1, 0, 33, &[0, 1, 2])]), "rows 33 is out of range, limit 33"),
        (
            step(
                vec![new(None), NewSequence { sequence: 2, ..new(None) }],
                vec![rows(1, 0, 2, &[0]), rows(2, 0, 2, &[0])],
            ),
            "the rows of a step: block 0 is stored into twice in one step",
        ),
    ];
    for (step, cause) in cases {
        let mut router = shard.attach().await;
        router.send(step).await;
        assert_eq!(router.events.error().await, cause);
    }
    let mut router = shard.attach().await;
    router.send(Step { load: vec![(0, ContentHash([7; 32]))], ..Step::default() }).await;
    assert_eq!(router.slot_event().await, (0, Some("it was never staged here".into())));
    assert_eq!(shard.generate(None, 20, false).await, plain, "nothing of it is left");
}

#[tokio::test]
async fn a_load_goes_on_while_its_adapter_is_unstaged() {
    let (shard, script) = Shard::scripted();
    let one = shard.staged("one").await;
    let expected = shard.generate(Some((0, one)), 20, false).await;
    let mut router = shard.attach().await;
    for slot in [1, 0, 1] {
        shard.staged("one").await;
        let copy = std::sync::Arc::downgrade(&shard.adapters.staged(one).unwrap().adapter);
        router.send(Step { unload: vec![0, 1], ..Step::default() }).await;
        router.result().await;
        script.fail("loaded", Fault::Hang);
        router.send(Step { load: vec![(slot, one)], ..Step::default() }).await;
        router.result().await;
        shard.adapters.unstage(router.session, one).await.unwrap();
        assert!(shard.adapters.staged(one).is_none());
        script.mend("loaded");
        assert_eq!(router.slot_event().await, (slot, None));
        let mut step = Step { added: vec![prompt(5)], ..Step::default() };
        step.added[0].members = vec![Member::alone(slot)];
        step.rows = vec![rows(5, 0, 20, &[3, 9], true)];
        router.send(step).await;
        assert_eq!(router.tokens().await, expected[..1]);
        router.send(Step { dropped: vec![5], unload: vec![slot], ..Step::default() }).await;
        router.result().await;
        assert_eq!(copy.strong_count(), 0, "its memory is free when no slot needs it");
        // It cannot be loaded any more.
        router.send(Step { load: vec![(slot, one)], ..Step::default() }).await;
        assert_eq!(router.slot_event().await, (slot, Some("it was never staged here".into())));
    }
}

#[tokio::test]
async fn decode_steps_are_captured_for_any_number_of_slots() {
    let step = |(rows, runs), is_affine| CapturedStep { rows, runs, is_affine };
    let bare: Vec<_> = [1, 2, 4].map(|rows| step((rows, 0), false)).to_vec();
    let of_kind = |is_affine| [(1, 1), (2, 2), (4, 2), (4, 4)].map(|sizes| step(sizes, is_affine)).to_vec();
    let (plain, affine) = (of_kind(false), of_kind(true));
    for slots in [0, 1, 2] {
        let with_slots = |steps: usize| if slots > 0 { steps } else { 0 };
        for (steps, loads, biases) in [
            (vec![], 0, 0),
            (bare.clone(), 0, 0),
            ([&*bare, &plain].concat(), 1, 0),
            ([&*bare, &affine].concat(), 1, 1),
            ([&*bare, &plain, &affine].concat(), 2, 1),
            ([&*affine, &plain, &bare].concat(), 2, 1),
        ] {
            let script = Script::default();
            script.set_captured(&steps);
            let folder = tempfile::tempdir().unwrap();
            tiny::engine_with_slots(Fake::new(script.clone()), folder.path(), slots);
            let staged = (script.count("load"), script.count("stage a bias"));
            assert_eq!(staged, (with_slots(loads), with_slots(biases)), "{slots} slots: {steps:?}");
            let runs = steps.iter().filter(|step| slots > 0 || step.runs == 0).count();
            // A prefill runs twice, too.
            assert_eq!(script.count("embed"), 2 + 2 * runs, "{slots} slots: {steps:?}");
        }
    }
}
