//! What a stage leaves in host memory, and what it does not.

use std::{
    collections::HashSet,
    fs,
    future::poll_fn,
    pin::pin,
    sync::{Arc, Weak},
    task::Poll,
    thread,
    time::Duration,
};

use lorax_shard::adapters::{AdapterFile, StageAnswer, StageError, StageOrder};
use model::testing;
use tokio::{task::JoinSet, time::timeout};

use crate::{
    SESSION, World,
    fake::Fault,
    tiny::{self, write_adapter},
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Polls a future once.
async fn poll_once<F: Future>(mut future: std::pin::Pin<&mut F>) -> Option<F::Output> {
    poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

/// Waits until the backend was asked to stage so often.
async fn staging(world: &World, count: usize) {
    let asked = async {
        while world.script.count("stage") < count {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, asked).await.unwrap();
}

#[tokio::test]
async fn memory_goes_back_when_the_router_says_so() {
    let world = World::new();
    let mut copies = Vec::new();
    for seed in 0..10 {
        let name = format!("adapter-{seed}");
        write_adapter(&world.at(&name), seed);
        let staged = world.stage(&name).await;
        let copy = world.adapters.staged(staged.content).unwrap();
        assert_eq!(copy.properties, staged);
        copies.push((staged.content, Arc::downgrade(&copy.adapter)));
    }
    assert!(copies.iter().all(|(_, copy)| copy.strong_count() == 1), "nothing is evicted");
    let free = |copy: &Weak<_>| copy.strong_count() == 0;
    for i in [3, 0, 9, 5] {
        let (content, copy) = &copies[i];
        world.adapters.unstage(SESSION, *content).await.unwrap();
        assert!(free(copy) && world.adapters.staged(*content).is_none());
        // There is nothing to remove any more.
        world.adapters.unstage(SESSION, *content).await.unwrap();
    }
    assert_eq!(copies.iter().filter(|(_, copy)| !free(copy)).count(), 6);
    let held: HashSet<_> =
        world.adapters.begin_session(SESSION).iter().map(|properties| properties.content).collect();
    let expected = [1, 2, 4, 6, 7, 8].map(|i: usize| copies[i].0);
    assert_eq!(held, HashSet::from(expected));
    // One that was unstaged can be staged again.
    assert_eq!(world.stage("adapter-3").await.content, copies[3].0);
}

#[tokio::test]
async fn many_contents_are_staged_at_once() {
    let world = World::new();
    let mut stages = JoinSet::new();
    for seed in 0..50 {
        let folder = world.at(&format!("adapter-{seed}"));
        write_adapter(&folder, 100 + seed);
        let (adapters, order) = (world.adapters.clone(), tiny::order(&folder, SESSION));
        stages.spawn(async move { adapters.stage(order).await.unwrap() });
    }
    let answers = timeout(PATIENCE, stages.join_all()).await.unwrap();
    assert!(answers.iter().all(|answer| matches!(answer, StageAnswer::Staged(_))));
    assert_eq!(world.adapters.begin_session(SESSION).len(), 50);
    // The same content is read once.
    let order = tiny::order(&world.at("one"), SESSION);
    let stages: JoinSet<_> = (0..50)
        .map(|_| {
            let (adapters, order) = (world.adapters.clone(), order.clone());
            async move { adapters.stage(order).await.unwrap() }
        })
        .collect();
    let answers = timeout(PATIENCE, stages.join_all()).await.unwrap();
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    assert_eq!(world.script.count("stage"), 51);
}

#[tokio::test]
async fn one_that_needs_more_room_is_not_read() {
    let world = World::new();
    for rank in [4, 5, 8, 16, 64, 100, 512, 4096, 100_000, 1_000_000] {
        let folder = world.at("large");
        let mut files = testing::adapter(&["q_proj", "down_proj"], 3, 1);
        files.config["r"] = rank.into();
        // Whoever read the tensors would refuse it for them.
        files.tensors.values_mut().for_each(|tensor| tensor.data[0] = f32::NAN);
        files.write_adapter(&folder).unwrap();
        let answer = world.adapters.stage(StageOrder { max_bytes: 1000, ..world.order("large") }).await;
        let Ok(StageAnswer::NeedsRoom(bytes)) = answer else { panic!("{rank}: {answer:?}") };
        assert!(bytes > 1000, "rank {rank}: {bytes}");
        let answer = world.adapters.stage(StageOrder { max_bytes: bytes - 1, ..world.order("large") }).await;
        assert_eq!(answer.unwrap(), StageAnswer::NeedsRoom(bytes));
    }
    assert_eq!(world.script.count("stage"), 0);
    let order = world.order("one");
    let room = world.stage("one").await.host_bytes as u64;
    world.adapters.unstage(SESSION, order.content).await.unwrap();
    let exact = StageOrder { max_bytes: room, ..order };
    assert!(matches!(world.adapters.stage(exact).await, Ok(StageAnswer::Staged(_))));
}

#[tokio::test]
async fn whole_pieces_count() {
    let world = World::new();
    for piece in [1, 7, 1000, 4096, 10_000, 65_536, 99_999, 1 << 20, 1 << 24, 1 << 30] {
        world.script.set_piece(piece);
        let staged = world.stage("one").await;
        assert!(staged.host_bytes > 0 && staged.host_bytes % piece == 0, "{piece}: {}", staged.host_bytes);
        world.adapters.unstage(SESSION, staged.content).await.unwrap();
    }
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_and_leaves_nothing() {
    type Spoil = fn(&mut testing::Files);
    let ways: [(Spoil, &str); 11] = [
        (|files| files.config["r"] = 0.into(), "adapter bad: adapter_config.json: r is missing"),
        (|files| files.config["r"] = "four".into(), "adapter bad: adapter_config.json: "),
        (|files| files.config["peft_type"] = "IA3".into(), "adapter bad: adapter_config.json: peft_type"),
        (|files| files.config["use_qalora"] = true.into(), "adapter bad: adapter_config.json: use_qalora"),
        (|files| files.config = 7.into(), "adapter bad: adapter_config.json: "),
        (|files| files.config["target_modules"] = "nothing".into(), "adapter bad: adapter_config.json: "),
        (|files| _ = files.tensors.pop_first(), "adapter bad: the adapter's tensor "),
        (|files| files.tensors.clear(), "adapter bad: no tensor matches"),
        (|files| first(files).data[0] = f32::NAN, "adapter bad: tensor base_model"),
        (|files| first(files).data[0] = f32::INFINITY, "adapter bad: tensor base_model"),
        (|files| zero(files), "adapter bad: the adapter changes nothing"),
    ];
    let world = World::new();
    for (spoil, words) in ways {
        let mut files = testing::adapter(&["q_proj", "down_proj"], 3, 1);
        spoil(&mut files);
        files.write_adapter(&world.at("bad")).unwrap();
        let refused = world.adapters.stage(world.order("bad")).await.unwrap_err();
        assert!(refused.to_string().starts_with(words), "{refused} is not {words}");
        assert!(!refused.is_passing());
        assert_eq!(world.adapters.begin_session(SESSION), []);
    }
    // A good one may come with the same name.
    write_adapter(&world.at("bad"), 7);
    world.stage("bad").await;
}

fn first(files: &mut testing::Files) -> &mut testing::Tensor {
    files.tensors.values_mut().next().unwrap()
}

fn zero(files: &mut testing::Files) {
    files.tensors.values_mut().for_each(|tensor| tensor.data.fill(0.0));
}

#[tokio::test]
async fn files_are_found_where_the_order_says() {
    let world = World::new();
    // Ludwig has PEFT's files in a subfolder.
    write_adapter(&world.at("ludwig").join("model_weights"), 4);
    let mut order = world.order("ludwig/model_weights");
    order.parts[0].folder.pop();
    for file in &mut order.parts[0].files {
        file.name = std::path::Path::new("model_weights").join(&file.name);
    }
    assert!(matches!(world.adapters.stage(order).await, Ok(StageAnswer::Staged(_))));
    // Files of the cache have no stamps, and safetensors come first.
    let mut order = world.order("one");
    order.parts[0].files.iter_mut().for_each(|file| file.stamp = None);
    order.parts[0].files.insert(0, AdapterFile { name: "adapter_model.bin".into(), stamp: None });
    assert!(matches!(world.adapters.stage(order).await, Ok(StageAnswer::Staged(_))));
    // What is no regular file is no adapter's, and a pipe without a writer holds nobody up.
    let order = |name: &str| {
        let mut order = world.order("two");
        order.parts[0].files[1] = AdapterFile { name: name.into(), stamp: None };
        order
    };
    let pipe = world.at("two").join("pipe-adapter_model.bin");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    fs::create_dir_all(world.at("two").join("folder/adapter_model.safetensors")).unwrap();
    fs::rename(&pipe, world.at("two").join("adapter_model.bin")).unwrap();
    for name in ["adapter_model.bin", "folder/adapter_model.safetensors"] {
        let refused = timeout(PATIENCE, world.adapters.stage(order(name))).await.unwrap().unwrap_err();
        assert_eq!(refused.to_string(), "adapter two: not a regular file", "{name}");
        assert!(!refused.is_passing());
    }
    // Nobody can read a socket.
    let _socket =
        std::os::unix::net::UnixListener::bind(world.at("two").join("folder/adapter_model.bin")).unwrap();
    let refused = world.adapters.stage(order("folder/adapter_model.bin")).await.unwrap_err();
    assert!(matches!(refused, StageError::Io { .. }), "{refused}");
}

#[tokio::test]
async fn a_session_that_ends_takes_its_stages_with_it() {
    let world = World::new();
    world.script.fail("stage", Fault::Hang);
    let order = world.order("one");
    let mut stage = pin!(world.adapters.stage(order.clone()));
    assert!(poll_once(stage.as_mut()).await.is_none());
    staging(&world, 1).await;
    assert_eq!(world.adapters.begin_session(SESSION + 1), []);
    // One of the new session waits until the old one has ended.
    let mut next = pin!(world.adapters.stage(StageOrder { session: SESSION + 1, ..order.clone() }));
    assert!(poll_once(next.as_mut()).await.is_none());
    world.script.mend("stage");
    let refused = timeout(PATIENCE, stage).await.unwrap().unwrap_err();
    assert_eq!(refused.to_string(), format!("a stage of session {SESSION} in session {}", SESSION + 1));
    assert!(matches!(timeout(PATIENCE, next).await.unwrap(), Ok(StageAnswer::Staged(_))));
    assert_eq!(world.script.count("stage"), 2);
    // Neither can a session that has ended remove anything.
    let refused = world.adapters.unstage(SESSION, order.content).await.unwrap_err();
    assert!(matches!(refused, StageError::OtherSession { .. }));
    assert_eq!(world.adapters.begin_session(SESSION + 2).len(), 1);
}

#[tokio::test]
async fn a_stage_that_was_cancelled_leaves_nothing() {
    let world = World::new();
    world.script.fail("stage", Fault::Hang);
    let content = world.order("one").content;
    {
        let mut stage = pin!(world.adapters.stage(world.order("one")));
        assert!(poll_once(stage.as_mut()).await.is_none());
        staging(&world, 1).await;
    }
    // Whoever unstages it waits for the thread, whose memory is taken until then.
    let mut unstage = pin!(world.adapters.unstage(SESSION, content));
    assert!(poll_once(unstage.as_mut()).await.is_none());
    world.script.mend("stage");
    timeout(PATIENCE, unstage).await.unwrap().unwrap();
    let held = world.adapters.begin_session(SESSION);
    assert!(held.iter().all(|held| held.content != content), "{held:?}");
    world.stage("one").await;
}

#[tokio::test]
async fn readers_that_hang_or_panic_keep_nobody_from_reading() {
    let world = World::new();
    world.script.fail("stage", Fault::Panic);
    let failed = world.adapters.stage(world.order("one")).await.unwrap_err();
    assert_eq!(failed.to_string(), "adapter one: reading it was interrupted");
    assert!(failed.is_passing());
    world.script.fail("stage", Fault::OutOfMemory);
    let failed = world.adapters.stage(world.order("one")).await.unwrap_err();
    assert_eq!(failed.to_string(), "adapter one: out of memory: 77 bytes for a test");
    assert!(failed.is_passing());
    // More than may read at the same time.
    let hanging = thread::available_parallelism().unwrap().get() + 1;
    world.script.fail("stage", Fault::Hang);
    let mut stages = JoinSet::new();
    for seed in 0..hanging as u64 {
        let folder = world.at(&format!("hanging-{seed}"));
        write_adapter(&folder, 100 + seed);
        let (adapters, order) = (world.adapters.clone(), tiny::order(&folder, SESSION));
        stages.spawn(async move { adapters.stage(order).await });
    }
    // All of them read, because those that are slow let others.
    staging(&world, 2 + hanging).await;
    while let Some(failed) = timeout(PATIENCE, stages.join_next()).await.unwrap() {
        assert!(matches!(failed.unwrap(), Err(StageError::Slow { .. })));
    }
    world.script.mend("stage");
    world.stage("two").await;
}
