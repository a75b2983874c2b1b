//! An engine of a small model on a thread of its own, and the router's part of the protocol.

use std::{sync::Arc, thread, time::Duration};

use kernels::{Backend, DType, cpu::CpuBackend};
use lifecycle::Supervisor;
use lorax_shard::{
    adapters::Adapters,
    engine::{Command, Engine, EventStream, Heartbeat, Held, StepError},
    step::{Event, Mask, Masks, Member, NewSequence, Output, Rows, SessionEvent, Step, StepResult},
};
use model::{
    adapter::ContentHash,
    testing::{self, Files},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{
    fake::{Fake, Script},
    tiny,
};

/// Longer than anything that is waited for here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// An engine that runs on a thread of its own.
pub(crate) struct Shard<B: Backend> {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) adapters: Arc<Adapters<B>>,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) heartbeat: Arc<Heartbeat>,
    pub(crate) longest_step: Duration,
    /// How the engine has ended.
    pub(crate) ended: oneshot::Receiver<kernels::Result<()>>,
    session: std::sync::atomic::AtomicU64,
}

impl Shard<CpuBackend> {
    pub(crate) fn start() -> Shard<CpuBackend> {
        Shard::new(CpuBackend::new(DType::F32, 1).unwrap())
    }
}

impl Shard<Fake> {
    /// One whose device does what a test asks for.
    pub(crate) fn scripted() -> (Shard<Fake>, Script) {
        let script = Script::default();
        (Shard::new(Fake::new(script.clone())), script)
    }
}

impl<B: Backend> Shard<B> {
    fn new(ops: B) -> Shard<B> {
        Shard::of(&testing::model(), ops)
    }

    /// One of a model like that of [`testing::model`].
    pub(crate) fn of(files: &Files, ops: B) -> Shard<B> {
        let folder = tempfile::tempdir().unwrap();
        let (engine, adapters) = tiny::engine_of(files, ops, folder.path(), 2);
        Shard::run(folder, engine, adapters)
    }

    /// One of a folder with a model and adapters.
    pub(crate) fn in_folder(folder: tempfile::TempDir, ops: B) -> Shard<B> {
        let (engine, adapters) = tiny::engine_in(ops, folder.path(), 2);
        Shard::run(folder, engine, adapters)
    }

    fn run(folder: tempfile::TempDir, engine: Engine<B>, adapters: Arc<Adapters<B>>) -> Shard<B> {
        // Tests stage adapters before the first session of the steps.
        adapters.begin_session(0);
        let (commands, received) = mpsc::channel(16);
        let (heartbeat, longest_step) = (engine.heartbeat(), engine.longest_step());
        let (end, ended) = oneshot::channel();
        let pulse = Supervisor::reporting_to(|_| ()).unwrap().watch("engine", PATIENCE);
        thread::spawn(move || {
            // A test that does not care how it ends has dropped the other end.
            let _ = end.send(engine.run(received, &pulse));
        });
        Shard { commands, adapters, folder, heartbeat, longest_step, ended, session: 0.into() }
    }

    pub(crate) async fn command(&self, command: Command) {
        assert!(self.commands.send(command).await.is_ok(), "the engine has ended");
    }

    /// Begins a session; returns what outlived the one before.
    pub(crate) async fn begin(&self, session: u64) -> Held {
        self.session.store(session, std::sync::atomic::Ordering::Relaxed);
        let (held, answer) = oneshot::channel();
        self.command(Command::Attach { session, held }).await;
        timeout(PATIENCE, answer).await.unwrap().unwrap()
    }

    /// Opens the stream with a number.
    pub(crate) async fn open(&self, stream: u64) -> Events {
        let (events, received) = mpsc::channel(16);
        self.command(Command::Execute(EventStream::new(stream, events).0)).await;
        Events(received)
    }

    /// Sends one step of a stream, as it is.
    pub(crate) async fn send_as(&self, stream: u64, step: Step) {
        self.command(Command::Step { stream, step: Ok(Box::new(step)) }).await;
    }

    /// Begins the next session with its stream. All have the number of the session.
    pub(crate) async fn attach(&self) -> Router<'_, B> {
        let session = self.session.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
        let held = self.begin(session).await;
        Router { shard: self, session, last_step: 0, held, events: self.open(session).await }
    }

    /// Stages an adapter.
    pub(crate) async fn staged(&self, name: &str) -> ContentHash {
        let session = self.session.load(std::sync::atomic::Ordering::Relaxed);
        let folder = self.folder.path().join("adapters").join(name);
        crate::tiny::stage(&self.adapters, &folder, session).await.content
    }

    /// Greedy tokens of a prompt, its first chunk of `chunk` rows, under the adapter in a slot; `ahead` sends a step before
    /// the one before is answered.
    pub(crate) async fn generate(
        &self,
        slot: Option<(u32, ContentHash)>,
        chunk: usize,
        ahead: bool,
    ) -> Vec<u32> {
        let mut router = self.attach().await;
        if let Some(load) = slot {
            router.send(Step { load: vec![load], ..Step::default() }).await;
            assert_eq!(router.slot_event().await, (load.0, None));
        }
        let new = NewSequence {
            members: slot.map(|(slot, _)| Member::alone(slot)).into_iter().collect(),
            ..prompt(5)
        };
        let mut steps = vec![Step {
            added: vec![new],
            rows: vec![rows(5, 0, chunk, &[3, 9], chunk == 20)],
            ..Step::default()
        }];
        if chunk < 20 {
            steps.push(Step { rows: vec![rows(5, chunk, 20 - chunk, &[], true)], ..Step::default() });
        }
        steps.extend((20..28).map(|at| Step { rows: vec![rows(5, at, 1, &[], true)], ..Step::default() }));
        let mut tokens = Vec::new();
        let mut in_flight = 0;
        for step in steps {
            router.send(step).await;
            in_flight += 1;
            while in_flight > usize::from(ahead) {
                tokens.extend(router.tokens().await);
                in_flight -= 1;
            }
        }
        if in_flight > 0 {
            tokens.extend(router.tokens().await);
        }
        tokens
    }
}

/// Waits until something that other threads do is seen.
pub(crate) async fn until(mut seen: impl FnMut() -> bool) {
    let watch = async {
        while !seen() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, watch).await.unwrap();
}

/// A prompt of 20 tokens.
pub(crate) fn prompt(sequence: u64) -> NewSequence {
    let tokens = (0..20).map(|i| i * 7 % 96).collect();
    NewSequence { sequence, tokens, prompt_len: 20, ..NewSequence::default() }
}

pub(crate) fn rows(sequence: u64, position: usize, rows: usize, new_blocks: &[u32], sample: bool) -> Rows {
    let (new_blocks, sample) = (new_blocks.to_vec(), sample.into());
    Rows { sequence, position, rows, new_blocks, sample, ..Rows::default() }
}

/// The sampled tokens of a result, with their sequences.
pub(crate) fn tokens_of(result: &StepResult) -> Vec<(u64, u32)> {
    let token = |output: &Output| match output {
        Output::Token { sequence, sampled } => Some((*sequence, sampled.token)),
        _ => None,
    };
    result.outputs.iter().filter_map(token).collect()
}

/// The events of one stream.
pub(crate) struct Events(mpsc::Receiver<Result<SessionEvent, StepError>>);

impl Events {
    /// The next event, an error, or the stream's end.
    pub(crate) async fn next(&mut self) -> Option<Result<SessionEvent, StepError>> {
        timeout(PATIENCE, self.0.recv()).await.unwrap()
    }

    /// The error that the stream ends with.
    pub(crate) async fn error(&mut self) -> String {
        let error = self.next().await.unwrap().unwrap_err().to_string();
        assert!(self.next().await.is_none(), "the stream has ended");
        error
    }

    /// Whether there is nothing to read yet.
    pub(crate) fn is_quiet(&mut self) -> bool {
        matches!(self.0.try_recv(), Err(mpsc::error::TryRecvError::Empty))
    }
}

/// A router that keeps to the protocol: one session and its stream.
pub(crate) struct Router<'a, B: Backend> {
    shard: &'a Shard<B>,
    pub(crate) session: u64,
    last_step: u64,
    pub(crate) held: Held,
    pub(crate) events: Events,
}

impl<B: Backend> Router<'_, B> {
    /// Sends the next step of the session.
    pub(crate) async fn send(&mut self, step: Step) -> u64 {
        self.last_step += 1;
        let (id, session) = (self.last_step, self.session);
        self.shard.send_as(session, Step { id, session, ..step }).await;
        id
    }

    /// Sends masks of a step of the session.
    pub(crate) async fn send_masks(&self, step: u64, masks: Vec<Mask>) {
        let masks = Masks { session: self.session, step, masks };
        self.shard.command(Command::Masks { stream: self.session, masks }).await;
    }

    pub(crate) async fn event(&mut self) -> Event {
        let SessionEvent { session, event } = self.events.next().await.unwrap().unwrap();
        assert_eq!(session, self.session);
        event
    }

    /// The next result of a step.
    pub(crate) async fn result(&mut self) -> StepResult {
        loop {
            if let Event::Step(result) = self.event().await {
                return result;
            }
        }
    }

    /// Tokens of the next result.
    pub(crate) async fn tokens(&mut self) -> Vec<u32> {
        tokens_of(&self.result().await).into_iter().map(|(_, token)| token).collect()
    }

    /// How the next load into a slot ends: the slot, and the error.
    pub(crate) async fn slot_event(&mut self) -> (u32, Option<String>) {
        loop {
            if let Event::Slot { slot, error, .. } = self.event().await {
                return (slot, error);
            }
        }
    }
}
