//! A device that is slow, full or broken, and what others see of the loop meanwhile.

use lorax_shard::step::{Event, Step};

use crate::{
    fake::{Fault, TICK},
    harness::{Shard, prompt, rows, until},
};

/// The first rows of a prompt, from which nothing is sampled.
fn first_chunk() -> Step {
    Step { added: vec![prompt(5)], rows: vec![rows(5, 0, 8, &[3, 9], false)], ..Step::default() }
}

fn chunk(position: usize) -> Step {
    Step { rows: vec![rows(5, position, 4, &[], false)], ..Step::default() }
}

#[tokio::test]
async fn a_step_without_logits_is_answered_when_it_has_run() {
    let (shard, script) = Shard::scripted();
    let mut router = shard.attach().await;
    script.hold();
    let before = script.marks();
    router.send(first_chunk()).await;
    until(|| script.marks() == before + 2).await;
    let turns = shard.heartbeat.turns();
    until(|| shard.heartbeat.turns() > turns + 10).await;
    assert!(router.events.is_quiet(), "the device has not begun it");
    script.step();
    until(|| shard.heartbeat.turns() > turns + 20).await;
    assert!(router.events.is_quiet(), "the device has not ended it");
    script.step();
    let result = router.result().await;
    assert_eq!((result.id, result.outputs.len()), (1, 0));
    // The next is launched while this one runs, and answered after it.
    let first = router.send(chunk(8)).await;
    until(|| script.marks() == before + 4).await;
    let second = router.send(chunk(12)).await;
    until(|| script.marks() == before + 6).await;
    assert!(router.events.is_quiet());
    script.release();
    assert_eq!(router.result().await.id, first);
    assert_eq!(router.result().await.id, second);
}

#[tokio::test]
async fn the_duration_of_a_step_is_the_devices() {
    let (shard, _) = Shard::scripted();
    assert_eq!(shard.longest_step.as_secs_f64(), TICK);
    let mut router = shard.attach().await;
    let tick = (TICK * 1e6) as u64;
    for step in [first_chunk(), chunk(8), Step { rows: vec![rows(5, 12, 8, &[], true)], ..Step::default() }] {
        router.send(step).await;
        assert_eq!(router.result().await.duration_us, tick);
    }
    let cpu = Shard::start();
    let mut router = cpu.attach().await;
    router.send(first_chunk()).await;
    assert!(router.result().await.duration_us > 0);
    assert!(!cpu.longest_step.is_zero());
}

#[tokio::test]
async fn a_full_device_fails_the_load_alone() {
    let (shard, script) = Shard::scripted();
    let expected = shard.generate(None, 20, false).await;
    let one = shard.staged("one").await;
    let mut router = shard.attach().await;
    for slot in [0, 1, 0] {
        script.fail("load", Fault::OutOfMemory);
        router.send(Step { load: vec![(slot, one)], ..Step::default() }).await;
        let cause = "out of memory: 77 bytes for a test";
        assert_eq!(router.slot_event().await, (slot, Some(cause.into())));
        script.mend("load");
        router.send(Step { load: vec![(slot, one)], ..Step::default() }).await;
        assert_eq!(router.slot_event().await, (slot, None), "the slot can be filled later");
    }
    // What was in a slot before is not there any more.
    script.fail("load", Fault::OutOfMemory);
    router.send(Step { load: vec![(1, one)], ..Step::default() }).await;
    assert!(router.slot_event().await.1.is_some());
    script.mend("load");
    let held = shard.attach().await.held;
    assert_eq!(held.slots.iter().map(|slot| slot.0).collect::<Vec<_>>(), [0]);
    assert_eq!(shard.generate(None, 20, false).await, expected, "steps go on");
}

#[tokio::test]
async fn a_device_that_fails_ends_the_loop() {
    for op in ["upload", "embed", "mark", "seconds_between", "collect", "load", "loaded"] {
        let (shard, script) = Shard::scripted();
        let one = shard.staged("one").await;
        let mut router = shard.attach().await;
        script.fail(op, Fault::Device);
        router
            .send(Step {
                load: vec![(0, one)],
                added: vec![prompt(5)],
                rows: vec![rows(5, 0, 20, &[3, 9], true)],
                ..Step::default()
            })
            .await;
        while router.events.next().await.is_some() {}
        let ended = tokio::time::timeout(crate::harness::PATIENCE, shard.ended).await.unwrap().unwrap();
        assert_eq!(ended.unwrap_err().to_string(), format!("{op}: test error 7"));
    }
}

#[tokio::test]
async fn a_loop_that_panics_leaves_no_stream_open() {
    let (shard, script) = Shard::scripted();
    let mut router = shard.attach().await;
    script.fail("embed", Fault::Panic);
    router.send(first_chunk()).await;
    assert!(router.events.next().await.is_none());
    assert!(tokio::time::timeout(crate::harness::PATIENCE, shard.ended).await.unwrap().is_err());
}

#[tokio::test]
async fn the_heartbeat_shows_the_age_of_the_oldest_work() {
    let (shard, script) = Shard::scripted();
    let heartbeat = &shard.heartbeat;
    let mut router = shard.attach().await;
    until(|| heartbeat.oldest().is_none()).await;
    // A step that the device does not end.
    script.hold();
    router.send(first_chunk()).await;
    // The oldest work may still be the beginning of the session, which ends.
    let mut age = None;
    until(|| {
        age = heartbeat.oldest();
        age.is_some()
    })
    .await;
    let turns = heartbeat.turns();
    until(|| heartbeat.turns() > turns && heartbeat.oldest() > age).await;
    // One that is launched behind it is younger than the first.
    router.send(chunk(8)).await;
    until(|| script.marks() == 6).await;
    assert!(heartbeat.oldest() > age);
    script.release();
    for _ in 0..2 {
        assert!(matches!(router.event().await, Event::Step(_)));
    }
    until(|| heartbeat.oldest().is_none()).await;
    // A loop that hangs makes no turn, and its command ages.
    script.fail("embed", Fault::Hang);
    router.send(chunk(12)).await;
    until(|| heartbeat.oldest().is_some()).await;
    let age = heartbeat.oldest().unwrap();
    until(|| heartbeat.oldest().unwrap() > age * 2).await;
}
