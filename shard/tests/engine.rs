//! The step loop on a small model: what it answers, and which steps it refuses.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::Path, sync::Arc, thread};

use kernels::{DType, cpu::CpuBackend};
use lorax_shard::{
    adapters::{Adapters, Roots},
    engine::{Command, Engine, Limits, StepError},
    step::{Event, NewSequence, Rows, Step},
};
use model::{
    Model,
    adapter::{BaseModel, ContentHash},
    testing,
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};

type Events = mpsc::Receiver<Result<Event, StepError>>;

/// An engine that runs on a thread of its own.
struct Shard {
    commands: mpsc::Sender<Command>,
    adapters: Arc<Adapters<CpuBackend>>,
    folder: tempfile::TempDir,
}

impl Shard {
    fn start() -> Shard {
        Shard::with_host_memory(1 << 20)
    }

    /// One that keeps so many bytes of adapters in host memory.
    fn with_host_memory(bytes: usize) -> Shard {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        testing::model().write_model(&at("model")).unwrap();
        for (name, seed) in [("one", 1), ("two", 2)] {
            write_adapter(&at("adapters").join(name), seed);
        }
        let ops = Arc::new(CpuBackend::new(DType::F32, 1).unwrap());
        let model = Arc::new(Model::load(&*ops, &at("model"), &mut |_| {}).unwrap());
        let roots = Roots::new(Some(&at("adapters")), &[]).unwrap();
        let base = BaseModel { config: model.config().clone(), path: at("model"), dtype: DType::F32 };
        let adapters =
            Arc::new(Adapters::new(ops.clone(), base, model.sites(), roots, bytes, Handle::current()));
        let limits = Limits { num_slots: 2, max_rows: 32, max_sequences: 4, max_logit_rows: 32 };
        let mut engine = Engine::new(ops, model, adapters.clone(), limits).unwrap();
        engine.rehearse().unwrap();
        engine.set_blocks(16).unwrap();
        let (commands, received) = mpsc::channel(16);
        thread::spawn(move || engine.run(received).unwrap());
        Shard { commands, adapters, folder }
    }

    /// Forgets everything and listens.
    async fn attach(&self) -> Events {
        let (done, reset) = oneshot::channel();
        assert!(self.commands.send(Command::Reset(done)).await.is_ok());
        reset.await.unwrap();
        let (events, received) = mpsc::channel(16);
        assert!(self.commands.send(Command::Attach(events)).await.is_ok());
        received
    }

    async fn send(&self, step: Step) {
        assert!(self.commands.send(Command::Step(Ok(Box::new(step)))).await.is_ok());
    }

    /// Greedy tokens of a prompt, its first chunk of `chunk` rows, under the adapter in a slot; `ahead` sends a step before
    /// the one before is answered.
    async fn generate(&self, slot: Option<(u32, ContentHash)>, chunk: usize, ahead: bool) -> Vec<u32> {
        let mut events = self.attach().await;
        let prompt: Vec<u32> = (0..20).map(|i| i * 7 % 96).collect();
        if let Some(load) = slot {
            self.send(Step { load: vec![load], ..Step::default() }).await;
            while !matches!(events.recv().await.unwrap().unwrap(), Event::Slot { error: None, .. }) {}
        }
        let slot = slot.map(|(slot, _)| slot);
        let new = NewSequence { sequence: 5, tokens: prompt, prompt_len: 20, slot, ..NewSequence::default() };
        let rows = |position, rows, new_blocks: &[u32], sample| Rows {
            sequence: 5,
            position,
            rows,
            new_blocks: new_blocks.to_vec(),
            sample,
        };
        let mut steps = vec![Step {
            added: vec![new],
            rows: vec![rows(0, chunk, &[3, 9], chunk == 20)],
            ..Step::default()
        }];
        if chunk < 20 {
            steps.push(Step { rows: vec![rows(chunk, 20 - chunk, &[], true)], ..Step::default() });
        }
        steps.extend((20..28).map(|at| Step { rows: vec![rows(at, 1, &[], true)], ..Step::default() }));
        let mut tokens = Vec::new();
        let mut in_flight = 0;
        for step in steps {
            self.send(step).await;
            in_flight += 1;
            while in_flight > usize::from(ahead) {
                tokens.extend(answer(&mut events).await);
                in_flight -= 1;
            }
        }
        if in_flight > 0 {
            tokens.extend(answer(&mut events).await);
        }
        tokens
    }
}

fn write_adapter(folder: &Path, seed: u64) {
    testing::adapter(&["q_proj", "down_proj"], 3, seed).write_adapter(folder).unwrap();
}

/// How the next load into a slot ends: the slot, and the error.
async fn slot_event(events: &mut Events) -> (u32, Option<String>) {
    loop {
        if let Event::Slot { slot, error, .. } = events.recv().await.unwrap().unwrap() {
            return (slot, error);
        }
    }
}

/// Tokens of the next result.
async fn answer(events: &mut Events) -> Vec<u32> {
    loop {
        if let Event::Step(result) = events.recv().await.unwrap().unwrap() {
            return result.tokens.into_iter().map(|(_, sampled)| sampled.token).collect();
        }
    }
}

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
    let rows = |sequence, position, rows, new_blocks: &[u32]| Rows {
        sequence,
        position,
        rows,
        new_blocks: new_blocks.to_vec(),
        sample: true,
    };
    let step = |added: Vec<NewSequence>, rows: Vec<Rows>| Step { added, rows, ..Step::default() };
    let cases = [
        (step(vec![], vec![rows(8, 0, 1, &[0])]), "sequence 8 does not run"),
        (step(vec![new(None), new(None)], vec![]), "sequence 1 runs already"),
        (Step { dropped: vec![4], ..Step::default() }, "sequence 4 does not run"),
        (Step { unload: vec![2], ..Step::default() }, "slot 2 is out of range, limit 2"),
        (step(vec![new(Some(1))], vec![rows(1, 0, 2, &[0])]), "slot 1 is not ready"),
        (step(vec![new(None)], vec![rows(1, 0, 2, &[16])]), "block 16 is out of range, limit 16"),
        (step(vec![new(None)], vec![rows(1, 0, 2, &[])]), "sequence 1 has 0 blocks, position 2 needs more"),
        (step(vec![new(None)], vec![rows(1, 0, 33, &[0, 1, 2])]), "rows 33 is out of range, limit 33"),
        (step(vec![new(None)], vec![rows(1, 250, 7, &[0])]), "position 257 is out of range, limit 257"),
    ];
    for (step, cause) in cases {
        let mut events = shard.attach().await;
        shard.send(step).await;
        assert_eq!(events.recv().await.unwrap().unwrap_err().to_string(), cause);
        assert!(events.recv().await.is_none(), "the stream has ended");
    }
    let mut events = shard.attach().await;
    shard.send(Step { load: vec![(0, ContentHash([7; 32]))], ..Step::default() }).await;
    assert_eq!(slot_event(&mut events).await, (0, Some("it was never prepared".into())));
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
    let mut events = scarce.attach().await;
    scarce.send(Step { load: vec![(0, one), (1, two)], ..Step::default() }).await;
    let mut ready = [slot_event(&mut events).await, slot_event(&mut events).await];
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
        let mut events = shard.attach().await;
        shard.send(Step { load: vec![(0, one)], ..Step::default() }).await;
        assert_eq!(slot_event(&mut events).await, (0, Some(cause.into())));
        shard.send(Step { load: vec![(0, two)], ..Step::default() }).await;
        assert_eq!(slot_event(&mut events).await, (0, None), "the slot is free again");
    }
}
