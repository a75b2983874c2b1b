//! Steps of whole sequences, and those that contradict the protocol.

use std::{fs, path::Path};

use kernels::CapturedStep;
use lorax_shard::step::{NewSequence, Rows, Step};
use model::adapter::ContentHash;

use crate::{
    fake::{Fake, Script},
    harness::{Shard, rows},
    tiny::{self, write_adapter},
};

#[tokio::test]
async fn chunks_and_steps_in_flight_change_no_token() {
    let shard = Shard::start();
    let plain = shard.generate(None, 20, false).await;
    assert_eq!(plain.len(), 9);
    for (chunk, ahead) in [(7, false), (20, true), (1, true)] {
        assert_eq!(shard.generate(None, chunk, ahead).await, plain, "chunk {chunk}, ahead {ahead}");
    }
    let one = shard.adapters.prepare("local", "one").await.unwrap().content;
    let two = shard.adapters.prepare("local", "two").await.unwrap().content;
    let (with_one, with_two) =
        (shard.generate(Some((0, one)), 20, false).await, shard.generate(Some((1, two)), 20, false).await);
    assert!(with_one != plain && with_two != plain && with_one != with_two, "adapters have a say");
    assert_eq!(shard.generate(Some((1, one)), 7, true).await, with_one, "in any slot");
}

#[tokio::test]
async fn steps_that_contradict_the_protocol_are_refused_and_harm_nobody() {
    let shard = Shard::start();
    let plain = shard.generate(None, 20, false).await;
    let new =
        |slot| NewSequence { sequence: 1, tokens: vec![1, 2], prompt_len: 2, slot, ..NewSequence::default() };
    let rows =
        |sequence, position, count, new_blocks: &[u32]| rows(sequence, position, count, new_blocks, true);
    let step = |added: Vec<NewSequence>, rows: Vec<Rows>| Step { added, rows, ..Step::default() };
    let cases = [
        (step(vec![], vec![rows(8, 0, 1, &[0])]), "sequence 8 does not run"),
        (step(vec![new(None), new(None)], vec![]), "sequence 1 runs already"),
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
    assert_eq!(router.slot_event().await, (0, Some("it was never prepared".into())));
    assert_eq!(shard.generate(None, 20, false).await, plain, "nothing of it is left");
}

#[tokio::test]
async fn adapters_that_memory_has_no_room_for_are_read_again_for_their_slots() {
    let plenty = Shard::start();
    let (mut expected, mut bytes) = (Vec::new(), 0);
    for name in ["one", "two"] {
        let prepared = plenty.adapters.prepare("local", name).await.unwrap();
        bytes = prepared.bytes;
        expected.push((prepared.content, plenty.generate(Some((0, prepared.content)), 20, false).await));
    }
    // Room for one.
    let scarce = Shard::with_host_memory(bytes);
    for name in ["one", "two"] {
        scarce.adapters.prepare("local", name).await.unwrap();
    }
    let (one, two) = (expected[0].0, expected[1].0);
    assert!(scarce.adapters.get(one).is_none() && scarce.adapters.get(two).is_some());
    for slot in [0, 1] {
        for (content, tokens) in &expected {
            assert_eq!(scarce.generate(Some((slot, *content)), 20, false).await, *tokens);
        }
    }
    let mut router = scarce.attach().await;
    router.send(Step { load: vec![(0, one), (1, two)], ..Step::default() }).await;
    let mut ready = [router.slot_event().await, router.slot_event().await];
    ready.sort();
    assert_eq!(ready, [(0, None), (1, None)], "both at the same time");
}

#[tokio::test]
async fn what_cannot_be_read_again_is_reported() {
    let plenty = Shard::start();
    let bytes = plenty.adapters.prepare("local", "one").await.unwrap().bytes;
    type Spoil = fn(&Path);
    let spoils: [(Spoil, &str); 2] = [
        (|folder| write_adapter(folder, 3), "its files have changed"),
        (|folder| fs::remove_dir_all(folder).unwrap(), "adapter one: adapter_config.json is missing"),
    ];
    for (spoil, cause) in spoils {
        let shard = Shard::with_host_memory(bytes);
        let one = shard.adapters.prepare("local", "one").await.unwrap().content;
        let two = shard.adapters.prepare("local", "two").await.unwrap().content;
        spoil(&shard.folder.path().join("adapters/one"));
        let mut router = shard.attach().await;
        router.send(Step { load: vec![(0, one)], ..Step::default() }).await;
        assert_eq!(router.slot_event().await, (0, Some(cause.into())));
        router.send(Step { load: vec![(0, two)], ..Step::default() }).await;
        assert_eq!(router.slot_event().await, (0, None), "the slot is free again");
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
            tiny::engine_with_slots(Fake::new(script.clone()), folder.path(), 1 << 20, slots);
            let staged = (script.count("load"), script.count("stage a bias"));
            assert_eq!(staged, (with_slots(loads), with_slots(biases)), "{slots} slots: {steps:?}");
            let runs = steps.iter().filter(|step| slots > 0 || step.runs == 0).count();
            // A prefill runs twice, too.
            assert_eq!(script.count("embed"), 2 + 2 * runs, "{slots} slots: {steps:?}");
        }
    }
}
