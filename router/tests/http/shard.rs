//! A shard whose answers a test writes. It speaks the protocol over a Unix socket, computes nothing, remembers what
//! it was told, and waits where it is told to.

// By its path, because other tests and benches read this file by its path.
#[path = "shard/running.rs"]
mod running;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use proto::{
    AttachRequest, AttachResponse, ExecuteEvent, ExecuteRequest, FilledSlot, Gone, HealthRequest,
    HealthResponse, HeldAdapter, InfoRequest, InfoResponse, Mask, NeedsRoom, NewSequence, Refused, SlotEvent,
    SlotLoad, StageRequest, StageResponse, Staged, Step, StepResult, Token, UnstageRequest, UnstageResponse,
    execute_event::Event,
    execute_request,
    shard_server::{Shard, ShardServer},
    stage_response::Answer as StageAnswer,
};
use tokio::{
    net::UnixListener,
    sync::{Notify, mpsc, watch},
    time::{interval, timeout},
};
use tokio_stream::{Stream, wrappers::ReceiverStream, wrappers::UnixListenerStream};
use tonic::{Request, Response, Status, Streaming};

use running::Running;

/// Deadline of a wait. Everything here takes milliseconds, but the machine may be busy with something else.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The points at which a test can make the shard wait.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Gate {
    /// Before it says what it serves.
    Info,
    /// Before it begins a session.
    Attach,
    /// Before it says that it is well.
    Health,
    /// Before it answers a step.
    Steps,
    /// Before it answers the step with this id.
    Step(u64),
    /// While it copies this adapter into a slot.
    Load(String),
    /// While it copies the adapter of this name into host memory.
    Stage(String),
}

/// All that it was told.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) steps: Vec<Step>,
    /// The masks of each step, in the order in which they came.
    pub(crate) masks: Vec<(u64, Vec<Mask>)>,
    pub(crate) staged: Vec<StageRequest>,
    pub(crate) unstaged: Vec<UnstageRequest>,
    /// Most adapters that it had in host memory at the same time.
    pub(crate) most_held: usize,
    /// Numbers of the sessions.
    pub(crate) sessions: Vec<u64>,
    pub(crate) health: usize,
}

impl Seen {
    /// Sequences that were added, in order.
    pub(crate) fn added(&self) -> impl Iterator<Item = &NewSequence> {
        self.steps.iter().flat_map(|step| &step.added)
    }

    /// The first step that drops a sequence.
    pub(crate) fn drop_of(&self, sequence: u64) -> Option<&Step> {
        self.steps.iter().find(|step| step.dropped.contains(&sequence))
    }
}

type Answer = Box<dyn Fn(&[u32]) -> Vec<u32> + Send + Sync>;

/// The scripted shard's description of itself, and its answers.
pub(crate) struct Script {
    pub(crate) info: InfoResponse,
    /// The tokens that follow a prompt. After the last one comes the end of the sequence, over and over.
    pub(crate) answer: Answer,
    /// The tokens of a sequence that draws, by its seed, in place of these.
    pub(crate) drawing: Option<fn(u64) -> Vec<u32>>,
    /// Adapters that cannot be copied into a slot.
    pub(crate) lost: HashSet<&'static str>,
    /// The identity of an adapter by its name.
    pub(crate) content: fn(&str) -> Vec<u8>,
    /// Names of adapters that cannot be staged, and why. All others can.
    pub(crate) unstageable: HashMap<&'static str, Status>,
    /// Names of adapters whose files have changed since they were hashed.
    pub(crate) gone: HashSet<&'static str>,
    /// Bytes of every adapter in a slot.
    pub(crate) adapter_bytes: u64,
    /// Bytes of every adapter in host memory.
    pub(crate) host_bytes: u64,
    /// The largest LoRA rank of every adapter.
    pub(crate) max_lora_rank: u32,
    /// The tokens at which adapters begin to act.
    pub(crate) invocation: Vec<u32>,
    /// Adapters that are in host memory when it starts.
    pub(crate) host: Vec<&'static str>,
    /// Adapters that are in slots when it starts.
    pub(crate) filled: BTreeMap<u32, &'static str>,
    /// Prompts that it refuses to run, by their first token.
    pub(crate) untaken: HashSet<u32>,
    /// The first tokens of sequences whose vectors and scores are not numbers.
    pub(crate) not_numbers: HashSet<u32>,
    /// Ids of the alternatives that are reported for a token, given how many.
    pub(crate) alternatives: fn(u32, u32) -> Vec<u32>,
    /// The time that it takes for a step, from when nothing holds it; none if it answers at once.
    pub(crate) pace: Option<Duration>,
    /// Reported duration of every step, in microseconds.
    pub(crate) step_us: u64,
    /// Whether every event comes after one of the session before, which contradicts it.
    pub(crate) echoes: bool,
    /// The points at which it waits from the start.
    pub(crate) held: BTreeSet<Gate>,
}

impl Script {
    /// Answers every prompt with the same tokens.
    pub(crate) fn saying(tokens: Vec<u32>) -> Script {
        Script::answering(move |_| tokens.clone())
    }

    pub(crate) fn answering(answer: impl Fn(&[u32]) -> Vec<u32> + Send + Sync + 'static) -> Script {
        let info = InfoResponse {
            dtype: "float32".into(),
            device: "cpu".into(),
            rank: 0,
            world: 1,
            vocab_size: 320,
            max_positions: 4096,
            eos_token_ids: vec![EOS, 3],
            num_blocks: 4096,
            block_size: 16,
            num_slots: 4,
            adapter_bytes: 0,
            max_rows: 256,
            max_sequences: 16,
            max_logit_rows: 256,
            ..InfoResponse::default()
        };
        Script {
            info,
            answer: Box::new(answer),
            drawing: None,
            lost: HashSet::new(),
            content,
            unstageable: HashMap::new(),
            gone: HashSet::new(),
            adapter_bytes: 1000,
            host_bytes: 1000,
            max_lora_rank: 8,
            invocation: Vec::new(),
            host: Vec::new(),
            filled: BTreeMap::new(),
            untaken: HashSet::new(),
            not_numbers: HashSet::new(),
            alternatives: following,
            pace: None,
            step_us: 0,
            echoes: false,
            held: BTreeSet::new(),
        }
    }
}

/// The token that ends a sequence.
pub(crate) const EOS: u32 = 1;

/// A token whose logits were not numbers.
pub(crate) const IMPROBABLE: u32 = 4001;

/// The log-probability that every token has here; the same in f32 and in decimal.
pub(crate) fn logprob(token: u32) -> f32 {
    if token == IMPROBABLE {
        return f32::NAN;
    }
    -(token as f32) / 64.0
}

/// Identity of an adapter that has no files: its name, padded.
pub(crate) fn content(id: &str) -> Vec<u8> {
    let mut content = id.as_bytes().to_vec();
    content.resize(32, 0);
    content
}

/// Names of the contents that shards were told of.
static NAMES: Mutex<BTreeMap<Vec<u8>, String>> = Mutex::new(BTreeMap::new());

/// Name of an adapter by its identity.
pub(crate) fn name_of(content: &[u8]) -> String {
    let name = NAMES.lock().unwrap().get(content).cloned();
    name.unwrap_or_else(|| String::from_utf8_lossy(content).trim_end_matches('\0').to_owned())
}

impl Script {
    /// The identity of an adapter, whose name is known from here on.
    fn identity(&self, id: &str) -> Vec<u8> {
        let content = (self.content)(id);
        NAMES.lock().unwrap().insert(content.clone(), id.into());
        content
    }
}

/// A test's handle of a running shard, which ends with the runtime.
#[derive(Clone)]
pub(crate) struct ScriptedShard {
    script: Arc<Script>,
    seen: watch::Sender<Seen>,
    held: watch::Sender<BTreeSet<Gate>>,
    breaks: Arc<Notify>,
    /// Outlives sessions, as the memory of a device does.
    slots: Arc<Mutex<BTreeMap<u32, Vec<u8>>>>,
    /// Contents in host memory, staged last told last. They outlive sessions, too.
    host: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Sender of events of the present session.
    events: Arc<Mutex<Option<Events>>>,
    /// Reported age of the oldest work of its step loop.
    oldest_ms: watch::Sender<Option<u64>>,
}

type Events = mpsc::Sender<Result<ExecuteEvent, Status>>;

impl ScriptedShard {
    /// Serves at a socket.
    pub(crate) fn start(script: Script, socket: &Path) -> ScriptedShard {
        let slots = script.filled.iter().map(|(slot, id)| (*slot, script.identity(id))).collect();
        let shard = ScriptedShard {
            slots: Arc::new(Mutex::new(slots)),
            host: Arc::new(Mutex::new(script.host.iter().map(|id| script.identity(id)).collect())),
            events: Arc::default(),
            oldest_ms: watch::channel(None).0,
            held: watch::channel(script.held.clone()).0,
            script: Arc::new(script),
            seen: watch::channel(Seen::default()).0,
            breaks: Arc::default(),
        };
        let connections = UnixListenerStream::new(UnixListener::bind(socket).unwrap());
        let service = ShardServer::new(shard.clone());
        tokio::spawn(
            tonic::transport::Server::builder().add_service(service).serve_with_incoming(connections),
        );
        shard
    }

    pub(crate) fn hold(&self, gate: Gate) {
        self.held.send_modify(|held| _ = held.insert(gate));
    }

    pub(crate) fn release(&self, gate: &Gate) {
        self.held.send_modify(|held| _ = held.remove(gate));
    }

    /// Ends the stream of events with an error.
    pub(crate) fn break_stream(&self) {
        self.breaks.notify_one();
    }

    /// Forgets all adapters, as a process does that ends and is started again.
    pub(crate) fn lose_memory(&self) {
        self.slots.lock().unwrap().clear();
        self.host.lock().unwrap().clear();
    }

    /// Sends an event of the present session that nobody has asked for.
    pub(crate) async fn inject(&self, event: Option<Event>) {
        let session = self.saw(|seen| seen.sessions.last().copied()).await;
        let events = self.events.lock().unwrap().clone().unwrap();
        events.send(Ok(ExecuteEvent { event, session })).await.unwrap();
    }

    /// Has the step loop be at one piece of work for so long.
    pub(crate) fn set_oldest_work(&self, age: Option<u64>) {
        self.oldest_ms.send_replace(age);
    }

    /// The adapters in its slots.
    pub(crate) fn slots(&self) -> BTreeMap<u32, String> {
        self.slots.lock().unwrap().iter().map(|(slot, content)| (*slot, name_of(content))).collect()
    }

    /// The adapters in its host memory, staged last told last.
    pub(crate) fn host(&self) -> Vec<String> {
        self.host.lock().unwrap().iter().map(|content| name_of(content)).collect()
    }

    fn staged(&self) -> Staged {
        let Script { host_bytes, adapter_bytes: slot_bytes, max_lora_rank, .. } = *self.script;
        let (sites, invocation) = (vec!["q_proj".into()], self.script.invocation.clone());
        Staged { host_bytes, slot_bytes, max_lora_rank, sites, invocation }
    }

    /// The adapter of the sequence that was added last.
    pub(crate) async fn last_adapter(&self) -> Option<String> {
        let slot = self
            .saw(|seen| seen.added().last().map(|new| new.members.first().map(|member| member.slot)))
            .await;
        slot.map(|slot| self.slots()[&slot].clone())
    }

    /// Waits until what it was told satisfies `wanted`, and returns what that gives.
    pub(crate) async fn saw<T>(&self, wanted: impl Fn(&Seen) -> Option<T>) -> T {
        self.saw_within(PATIENCE, wanted).await
    }

    /// The same, for what takes its time.
    pub(crate) async fn saw_within<T>(&self, limit: Duration, wanted: impl Fn(&Seen) -> Option<T>) -> T {
        let mut seen = self.seen.subscribe();
        let seen = timeout(limit, seen.wait_for(|seen| wanted(seen).is_some())).await;
        wanted(&seen.expect("it is never told").unwrap()).unwrap()
    }

    /// The one sequence whose prompt is this, once it runs.
    pub(crate) async fn sequence_of(&self, prompt: &[u32]) -> u64 {
        self.saw(|seen| seen.added().find(|new| new.tokens == prompt).map(|new| new.sequence)).await
    }

    /// A shard that is in no session yet takes calls of any.
    fn check_session(&self, session: u64) -> Result<(), Status> {
        match self.seen.borrow().sessions.last() {
            Some(present) if *present != session => {
                Err(Status::failed_precondition(format!("session {session}, not {present}")))
            }
            _ => Ok(()),
        }
    }

    async fn pass(&self, gate: &Gate) {
        self.held.subscribe().wait_for(|held| !held.contains(gate)).await.unwrap();
    }

    async fn run(&self, steps: Streaming<ExecuteRequest>, events: Events) {
        let mut incoming = Incoming { messages: steps, steps: VecDeque::new(), masks: HashMap::new() };
        let mut sequences = HashMap::new();
        let mut pace = self.script.pace.map(interval);
        let session = self.seen.borrow().sessions.last().copied().unwrap_or_default();
        for id in 1.. {
            let Some(step) = incoming.step(self).await else { return };
            let error = if (step.session, step.id) == (session, id) {
                None
            } else {
                Some(Status::failed_precondition(format!("step {id} of session {session}, not {step:?}")))
            };
            self.slots.lock().unwrap().retain(|slot, _| !step.unload.contains(slot));
            for load in &step.load {
                tokio::spawn(self.clone().load(step.session, load.clone(), events.clone()));
            }
            self.pass(&Gate::Steps).await;
            self.pass(&Gate::Step(step.id)).await;
            if let Some(pace) = &mut pace {
                pace.reset();
                pace.tick().await;
            }
            let Some(masks) = incoming.masks_of(&step, self).await else { return };
            let result = error.map_or_else(|| self.answer(step, &masks, &mut sequences), Err);
            let sent = match result {
                // Every rank runs a step, and the first one tells of it.
                Ok(_) if self.script.info.rank > 0 => true,
                Ok(result) => self.tell(session, Event::Step(result), &events).await,
                Err(status) => events.send(Err(status)).await.is_ok(),
            };
            if !sent {
                return;
            }
        }
    }

    /// False when the stream has ended.
    async fn tell(&self, session: u64, event: Event, events: &Events) -> bool {
        if self.script.echoes {
            let contradiction = match &event {
                Event::Step(result) => Event::Step(StepResult { id: result.id + 7, ..StepResult::default() }),
                Event::Slot(slot) => {
                    Event::Slot(SlotEvent { error: "of another session".into(), ..slot.clone() })
                }
            };
            let echo = ExecuteEvent { event: Some(contradiction), session: session - 1 };
            if events.send(Ok(echo)).await.is_err() {
                return false;
            }
        }
        events.send(Ok(ExecuteEvent { event: Some(event), session })).await.is_ok()
    }

    async fn load(self, session: u64, load: SlotLoad, events: Events) {
        let SlotLoad { slot, content } = load;
        let id = name_of(&content);
        let is_held = self.host.lock().unwrap().contains(&content);
        self.pass(&Gate::Load(id.clone())).await;
        let gone = !is_held || self.script.lost.contains(&*id);
        let error = if gone { "it is gone".into() } else { String::new() };
        if !gone {
            self.slots.lock().unwrap().insert(slot, content.clone());
        }
        // The stream may have ended meanwhile.
        self.tell(session, Event::Slot(SlotEvent { slot, content, error }), &events).await;
    }

    fn answer(
        &self,
        step: Step,
        masks: &[Mask],
        sequences: &mut HashMap<u64, Running>,
    ) -> Result<StepResult, Status> {
        let duration_us = self.script.step_us;
        let mut result = StepResult { id: step.id, duration_us, ..StepResult::default() };
        for id in &step.dropped {
            sequences.remove(id).ok_or_else(|| Status::invalid_argument(format!("{id} does not run")))?;
        }
        for new in step.added {
            let prompt = &new.tokens[..new.prompt_len as usize];
            if self.script.untaken.contains(&prompt[0]) {
                let reason = format!("the shard has no use for token {}", prompt[0]);
                result.refused.push(Refused { sequence: new.sequence, reason });
            }
            let sampling = new.sampling.as_ref().filter(|sampling| sampling.temperature > 0.0);
            let answer = match (self.script.drawing, sampling) {
                (Some(drawing), Some(sampling)) => drawing(sampling.seed),
                _ => (self.script.answer)(prompt),
            };
            let running = Running { answer, new, alternatives: self.script.alternatives };
            sequences.insert(running.new.sequence, running);
        }
        for rows in &step.rows {
            let running = sequences.get_mut(&rows.sequence);
            let running = running.ok_or_else(|| Status::invalid_argument(format!("{rows:?}")))?;
            if self.script.untaken.contains(&running.new.tokens[0]) {
                continue;
            }
            if running.pool(rows, &self.script, &mut result) {
                continue;
            }
            result.prompt.extend(running.prompt(rows));
            if rows.sample == 0 {
                continue;
            }
            let sampled = running.sample();
            let mask = masks.iter().find(|mask| mask.sequence == rows.sequence);
            if !mask.is_none_or(|mask| allows(mask, sampled.token.unwrap_or_default().id)) {
                return Err(Status::internal(format!("{:?} is not allowed: {mask:?}", sampled.token)));
            }
            result.tokens.push(sampled);
        }
        Ok(result)
    }
}

/// Messages of a session, some of which came before their turn.
struct Incoming {
    messages: Streaming<ExecuteRequest>,
    steps: VecDeque<Step>,
    masks: HashMap<u64, Vec<Mask>>,
}

impl Incoming {
    /// The next step; `None` when the stream has ended.
    async fn step(&mut self, shard: &ScriptedShard) -> Option<Step> {
        while self.steps.is_empty() {
            self.read(shard).await?;
        }
        self.steps.pop_front()
    }

    /// The masks of a step, once all of its masked rows have one.
    async fn masks_of(&mut self, step: &Step, shard: &ScriptedShard) -> Option<Vec<Mask>> {
        let wanted = step.rows.iter().filter(|rows| rows.masked).count();
        while self.masks.get(&step.id).map_or(0, Vec::len) < wanted {
            self.read(shard).await?;
        }
        Some(self.masks.remove(&step.id).unwrap_or_default())
    }

    async fn read(&mut self, shard: &ScriptedShard) -> Option<()> {
        match self.messages.message().await.ok()??.request? {
            execute_request::Request::Step(step) => {
                shard.seen.send_modify(|seen| seen.steps.push(step.clone()));
                self.steps.push_back(step);
            }
            execute_request::Request::Masks(masks) => {
                shard.seen.send_modify(|seen| seen.masks.push((masks.step, masks.masks.clone())));
                self.masks.entry(masks.step).or_default().extend(masks.masks);
            }
        }
        Some(())
    }
}

/// Whether a mask allows a token. An empty one allows all.
pub(crate) fn allows(mask: &Mask, token: u32) -> bool {
    let byte = mask.allowed.get(token as usize / 8).copied();
    mask.allowed.is_empty() || byte.is_some_and(|byte| byte >> (token % 8) & 1 == 1)
}

fn token(id: u32) -> Token {
    Token { id, logprob: logprob(id) }
}

/// The alternatives to a token: itself and the ones that follow it.
fn following(id: u32, num_top: u32) -> Vec<u32> {
    (0..num_top).map(|i| (id + i) % 320).collect()
}

#[tonic::async_trait]
impl Shard for ScriptedShard {
    type ExecuteStream = Pin<Box<dyn Stream<Item = Result<ExecuteEvent, Status>> + Send>>;

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        self.pass(&Gate::Info).await;
        Ok(Response::new(self.script.info.clone()))
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Result<Response<AttachResponse>, Status> {
        let session = request.into_inner().session;
        let mut repeated = false;
        self.seen.send_modify(|seen| {
            repeated = seen.sessions.contains(&session);
            seen.sessions.push(session);
        });
        self.pass(&Gate::Attach).await;
        if repeated {
            return Err(Status::already_exists(format!("session {session}")));
        }
        let slots = self.slots.lock().unwrap();
        let slot = |(slot, content): (&u32, &Vec<u8>)| FilledSlot {
            slot: *slot,
            content: content.clone(),
            bytes: self.script.adapter_bytes,
        };
        let held = |content: &Vec<u8>| {
            let Staged { host_bytes: bytes, slot_bytes, max_lora_rank, sites, invocation } = self.staged();
            HeldAdapter { content: content.clone(), bytes, slot_bytes, max_lora_rank, sites, invocation }
        };
        let host = self.host.lock().unwrap().iter().map(held).collect();
        Ok(Response::new(AttachResponse { slots: slots.iter().map(slot).collect(), host }))
    }

    async fn stage(&self, request: Request<StageRequest>) -> Result<Response<StageResponse>, Status> {
        let request = request.into_inner();
        self.check_session(request.session)?;
        NAMES.lock().unwrap().insert(request.content.clone(), request.name.clone());
        self.seen.send_modify(|seen| seen.staged.push(request.clone()));
        self.pass(&Gate::Stage(request.name.clone())).await;
        let name = request.name.as_str();
        if let Some(status) = self.script.unstageable.get(name) {
            return Err(status.clone());
        }
        let answer = if self.script.gone.contains(name) {
            StageAnswer::Gone(Gone {})
        } else if self.script.host_bytes > request.max_bytes {
            StageAnswer::NeedsRoom(NeedsRoom { host_bytes: self.script.host_bytes })
        } else {
            let mut host = self.host.lock().unwrap();
            if !host.contains(&request.content) {
                host.push(request.content);
            }
            self.seen.send_modify(|seen| seen.most_held = seen.most_held.max(host.len()));
            StageAnswer::Staged(self.staged())
        };
        Ok(Response::new(StageResponse { answer: Some(answer) }))
    }

    async fn unstage(&self, request: Request<UnstageRequest>) -> Result<Response<UnstageResponse>, Status> {
        let request = request.into_inner();
        self.check_session(request.session)?;
        self.host.lock().unwrap().retain(|content| *content != request.content);
        self.seen.send_modify(|seen| seen.unstaged.push(request));
        Ok(Response::new(UnstageResponse {}))
    }

    async fn execute(
        &self,
        request: Request<Streaming<ExecuteRequest>>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        let (events, received) = mpsc::channel(16);
        *self.events.lock().unwrap() = Some(events.clone());
        let (shard, steps) = (self.clone(), request.into_inner());
        tokio::spawn(async move {
            tokio::select! {
                () = shard.run(steps, events.clone()) => {}
                () = shard.breaks.notified() => {
                    // The router may be gone.
                    let _ = events.send(Err(Status::internal("told to break"))).await;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(received))))
    }

    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthResponse>, Status> {
        self.seen.send_modify(|seen| seen.health += 1);
        self.pass(&Gate::Health).await;
        let oldest_ms = *self.oldest_ms.borrow();
        Ok(Response::new(HealthResponse { turns: 0, oldest_ms }))
    }
}
