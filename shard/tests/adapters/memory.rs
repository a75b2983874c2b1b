//! The limit on host memory.

use std::time::Duration;

use lorax_shard::adapters::PrepareError;
use model::testing;

use crate::{
    World,
    fake::Fault,
    ticks,
    tiny::{READ_TIMEOUT, write_adapter},
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of one of the small model's adapters.
async fn adapter_bytes() -> usize {
    World::new(1 << 20).prepare("one").await.bytes
}

#[tokio::test]
async fn whole_pieces_count() {
    let world = World::new(40_000);
    world.script.set_piece(10_000);
    for seed in 0..12 {
        write_adapter(&world.at(&format!("adapter-{seed}")), seed);
        world.prepare(&format!("adapter-{seed}")).await;
        let held = world.adapters.held();
        assert!(held.iter().all(|(_, bytes)| bytes % 10_000 == 0));
        assert!(held.iter().map(|(_, bytes)| bytes).sum::<usize>() <= 40_000, "{held:?}");
    }
    assert!(!world.adapters.held().is_empty());
}

#[tokio::test]
async fn the_limit_holds_while_many_are_read_at_once() {
    let bytes = adapter_bytes().await;
    for room in 1..4 {
        let world = World::new(bytes * room + bytes / 2);
        let names: Vec<String> = (0..24).map(|seed| format!("adapter-{seed}")).collect();
        let mut reads = tokio::task::JoinSet::new();
        for (seed, name) in (0..).zip(names) {
            write_adapter(&world.at(&name), seed);
            let adapters = world.adapters.clone();
            reads.spawn(async move { adapters.prepare("local", &name).await.unwrap() });
        }
        while let Some(read) = tokio::time::timeout(PATIENCE, reads.join_next()).await.unwrap() {
            read.unwrap();
            let held = world.adapters.held();
            assert!(held.len() <= room, "{} are held where {room} have room", held.len());
        }
        assert_eq!(world.adapters.held().len(), room);
    }
}

#[tokio::test]
async fn one_that_is_too_large_is_refused_unread() {
    let bytes = adapter_bytes().await;
    let world = World::new(bytes);
    for rank in [4, 5, 8, 16, 64, 100, 512, 4096, 100_000, 1_000_000] {
        let folder = world.at("large");
        let mut files = testing::adapter(&["q_proj", "down_proj"], 3, 1);
        files.config["r"] = rank.into();
        // Whoever read the tensors would refuse it for them.
        files.tensors.values_mut().for_each(|tensor| tensor.data[0] = f32::NAN);
        files.write_adapter(&folder).unwrap();
        let refused = world.adapters.prepare("local", "large").await.unwrap_err();
        let PrepareError::TooLarge { bytes: large, limit, .. } = refused else { panic!("{refused}") };
        assert!(large > limit && limit == bytes, "rank {rank}: {large}");
    }
    assert_eq!(world.script.count("stage"), 0);
    world.prepare("one").await;
}

#[tokio::test]
async fn one_that_cannot_be_read_takes_nobodys_memory() {
    let world = World::new(adapter_bytes().await);
    let one = world.prepare("one").await.content;
    let mut files = testing::adapter(&["q_proj", "down_proj"], 3, 1);
    files.tensors.pop_first();
    files.write_adapter(&world.at("broken")).unwrap();
    for _ in 0..3 {
        assert!(world.adapters.prepare("local", "broken").await.is_err());
        assert_eq!(world.adapters.held().iter().map(|held| held.0).collect::<Vec<_>>(), [one]);
    }
}

#[tokio::test]
async fn what_a_slot_holds_is_the_slots_memory() {
    let bytes = adapter_bytes().await;
    let world = World::new(bytes);
    ticks().await;
    let one = world.prepare("one").await.content;
    let slot = world.adapters.get(one).unwrap();
    let two = world.prepare("two").await.content;
    assert_eq!(world.adapters.held(), [(two, bytes)]);
    assert!(world.adapters.get(one).is_some(), "it need not be read again");
    let staged = world.script.count("stage");
    world.prepare("one").await;
    assert_eq!(world.script.count("stage"), staged);
    drop(slot);
    assert!(world.adapters.get(one).is_none());
}

#[tokio::test]
async fn a_reader_that_hangs_or_panics_fails_alone() {
    let world = World::new(1 << 20);
    write_adapter(&world.at("three"), 3);
    world.script.fail("stage", Fault::Panic);
    let failed = world.adapters.prepare("local", "one").await.unwrap_err().to_string();
    assert_eq!(failed, "adapter one: reading it was interrupted");
    world.script.fail("stage", Fault::OutOfMemory);
    let failed = world.adapters.prepare("local", "one").await.unwrap_err().to_string();
    assert_eq!(failed, "adapter one: out of memory: 77 bytes for a test");
    world.script.fail("stage", Fault::Hang);
    let slow = format!("adapter one could not be read within {} s", READ_TIMEOUT.as_secs_f32());
    // As many as may be read at a time, and more.
    for _ in 0..2 {
        let failed = world.adapters.prepare("local", "one").await.unwrap_err().to_string();
        assert_eq!(failed, slow);
    }
    // Those that hang are let go only when this one is done.
    world.script.mend("stage");
    let prepared = tokio::time::timeout(PATIENCE, world.adapters.prepare("local", "three")).await.unwrap();
    assert!(prepared.is_ok());
}

#[test]
fn one_that_waits_in_vain_for_memory_gives_its_thread_back() {
    let mut threads = tokio::runtime::Builder::new_current_thread();
    let runtime = threads.enable_all().max_blocking_threads(2).build().unwrap();
    let (world, failures) = runtime.block_on(async {
        let world = World::new(adapter_bytes().await);
        // It has all of the memory and one of the two threads.
        world.script.fail("stage", Fault::Hang);
        let mut failures = Vec::new();
        for name in ["one", "two", "two", "two"] {
            failures
                .push(tokio::time::timeout(3 * READ_TIMEOUT, world.adapters.prepare("local", name)).await);
        }
        (world, failures)
    });
    world.script.mend("stage");
    for failure in failures {
        assert!(matches!(failure, Ok(Err(PrepareError::Slow { .. }))), "{failure:?}");
    }
    let prepared = world.adapters.prepare("local", "two");
    runtime.block_on(async { tokio::time::timeout(PATIENCE, prepared).await.unwrap().unwrap() });
}
