//! The task that owns the scheduler: takes jobs, plans steps, keeps two in flight, and hands out what comes back.
//!
//! It waits for nobody but the shards. A client that does not keep up fills its own channel and is cancelled.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use config::RouterConfig;
use scheduler::{FailReason, Request, RequestId, Scheduler};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, watch},
    time::sleep,
};

use crate::{
    generation::{Failure, Job, Scored, Update},
    ranks::{RankError, Ranks, Session},
    wire::{self, Event, Info, StepResult},
};

/// Updates that a client may be behind, and one place for why there are no more.
const UPDATES: usize = 1024 + 1;
/// Commands on their way to the task.
const COMMANDS: usize = 1024;
/// Between two attempts to reach the shards.
const RECONNECT: Duration = Duration::from_millis(100);

enum Command {
    Submit { id: RequestId, job: Box<Job>, updates: mpsc::Sender<Update>, place: Place },
    Cancel(RequestId),
}

/// What counts a sequence among the concurrent ones.
pub(crate) type Permit = OwnedSemaphorePermit;

/// A hold of a sequence's permit. There are two, and the first that is dropped lets go: the task's when the
/// sequence ends or is cancelled, which a client that does not read never learns, and the client's when it has all it
/// wants, which the task learns later.
struct Place(Arc<Mutex<Option<Permit>>>);

impl Place {
    fn pair(permit: Permit) -> (Place, Place) {
        let shared = Arc::new(Mutex::new(Some(permit)));
        (Place(shared.clone()), Place(shared))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Nobody panics with the lock.
        if let Ok(mut permit) = self.0.lock() {
            *permit = None;
        }
    }
}

/// Gives jobs to the task.
#[derive(Clone)]
pub(crate) struct Engine {
    commands: mpsc::Sender<Command>,
    ids: Arc<std::sync::atomic::AtomicU64>,
    info: watch::Receiver<Option<Info>>,
}

/// A job that runs. Dropping it cancels it.
pub(crate) struct Running {
    id: RequestId,
    updates: mpsc::Receiver<Update>,
    commands: mpsc::Sender<Command>,
    _place: Place,
}

impl Running {
    /// The next update; `None` when nothing follows.
    pub(crate) async fn next(&mut self) -> Option<Update> {
        self.updates.recv().await
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A full channel means that the task is far behind; it finds out from the closed channel of updates.
        let _ = self.commands.try_send(Command::Cancel(self.id));
    }
}

impl Engine {
    /// Starts the task.
    pub(crate) fn start(ranks: Ranks, config: RouterConfig) -> Engine {
        let (commands, received) = mpsc::channel(COMMANDS);
        let (info, watched) = watch::channel(None);
        tokio::spawn(serve(ranks, config, received, info));
        Engine { commands, ids: Arc::default(), info: watched }
    }

    /// What the shards serve; `None` while they cannot be reached.
    pub(crate) fn info(&self) -> Option<Info> {
        self.info.borrow().clone()
    }

    /// Waits until the shards can be reached.
    pub(crate) async fn ready(&self) {
        // Fails only when the task has ended, and then nothing will be served.
        let _ = self.info.clone().wait_for(Option::is_some).await;
    }

    /// Hands over a job, which holds the permit until it ends.
    pub(crate) async fn submit(&self, job: Job, permit: Permit) -> Result<Running, Failure> {
        let id = RequestId(self.ids.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        let (updates, received) = mpsc::channel(UPDATES);
        let (place, other) = Place::pair(permit);
        let command = Command::Submit { id, job: Box::new(job), updates, place };
        self.commands.send(command).await.map_err(|_| Failure::Unavailable)?;
        Ok(Running { id, updates: received, commands: self.commands.clone(), _place: other })
    }
}

/// A request that has not ended.
struct Live {
    job: Box<Job>,
    updates: mpsc::Sender<Update>,
    /// Prompt positions whose log-probabilities have been told; they come again after a preemption.
    prompt_told: u32,
    _place: Place,
}

impl Live {
    /// Tells the client that nothing follows; there is a place for it, unless the client has gone.
    fn fail(self, failure: Failure) {
        let _ = self.updates.try_send(Update::Failed(failure));
    }
}

/// Connects, serves until the connection breaks, and begins again. Ends with the last handle.
async fn serve(
    ranks: Ranks,
    config: RouterConfig,
    mut commands: mpsc::Receiver<Command>,
    info: watch::Sender<Option<Info>>,
) {
    loop {
        let session = tokio::select! {
            session = connect(&ranks) => session,
            () = refuse_all(&mut commands) => return,
        };
        tracing::info!(device = session.info.device, dtype = session.info.dtype, "connected to the shard");
        let most = session.info.max_total_tokens();
        if let Some(asked) = config.max_total_tokens.filter(|asked| *asked > most) {
            tracing::warn!("max-total-tokens: {asked} do not fit, a request may have {most}");
        }
        info.send_replace(Some(session.info.clone()));
        let limits = session.info.limits(&config);
        let mut batcher = Batcher {
            scheduler: Scheduler::new(limits),
            live: HashMap::new(),
            session,
            begun: Instant::now(),
        };
        let ended = batcher.run(&mut commands).await;
        info.send_replace(None);
        batcher.live.drain().for_each(|(_, live)| live.fail(Failure::Unavailable));
        match ended {
            Ok(()) => return,
            Err(error) => tracing::warn!("lost the shard: {error}"),
        }
    }
}

async fn connect(ranks: &Ranks) -> Session {
    let mut told = false;
    loop {
        match ranks.session().await {
            Ok(session) => return session,
            Err(error) if !told => {
                tracing::info!("waiting for the shard ({error})");
                told = true;
            }
            Err(_) => {}
        }
        sleep(RECONNECT).await;
    }
}

/// Answers jobs that come while there is no shard. Returns when nobody can send any more.
async fn refuse_all(commands: &mut mpsc::Receiver<Command>) {
    while let Some(command) = commands.recv().await {
        if let Command::Submit { updates, .. } = command {
            let _ = updates.try_send(Update::Failed(Failure::Unavailable));
        }
    }
}

struct Batcher {
    scheduler: Scheduler,
    live: HashMap<RequestId, Live>,
    session: Session,
    begun: Instant,
}

impl Batcher {
    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Runs until all handles are gone, or the shards are.
    async fn run(&mut self, commands: &mut mpsc::Receiver<Command>) -> Result<(), RankError> {
        loop {
            while let Some(plan) = self.scheduler.next_step(self.now()) {
                let live = &self.live;
                let step = wire::step(plan, |added| {
                    let job = &live.get(&added.id)?.job;
                    Some((&job.sampling, job.prompt_logprobs))
                });
                self.session.send(step).await?;
            }
            tokio::select! {
                command = commands.recv() => {
                    let Some(command) = command else { return Ok(()) };
                    self.obey(command);
                    // All that have come by now go into the same step.
                    while let Ok(command) = commands.try_recv() {
                        self.obey(command);
                    }
                }
                event = self.session.next() => self.handle(event?),
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Cancel(id) => {
                if self.live.remove(&id).is_some() {
                    self.scheduler.cancel(id);
                }
            }
            Command::Submit { id, job, updates, place } => {
                let request = Request {
                    id,
                    prompt: job.prompt.clone(),
                    max_new_tokens: job.max_new_tokens,
                    stop_ids: job.stop_ids.clone(),
                    adapter: job.adapter,
                    prompt_logprobs: job.prompt_logprobs,
                };
                match self.scheduler.submit(request, self.now()) {
                    Ok(()) => {
                        self.live.insert(id, Live { job, updates, prompt_told: 1, _place: place });
                    }
                    Err(error) => {
                        let _ = updates.try_send(Update::Failed(Failure::Refused(error)));
                    }
                }
            }
        }
    }

    fn handle(&mut self, event: Event) {
        let events = match event {
            Event::Step(result) => return self.complete(result),
            Event::Slot { slot, key, error: None } => return self.scheduler.slot_ready(slot, key),
            Event::Slot { slot, key, error: Some(error) } => {
                tracing::warn!(slot, "an adapter could not be loaded: {error}");
                self.scheduler.slot_failed(slot, key)
            }
        };
        events.into_iter().for_each(|event| self.tell(event, &HashMap::new()));
    }

    fn complete(&mut self, result: StepResult) {
        for (sequence, position, tokens) in result.prompt {
            let id = RequestId(sequence);
            let Some(live) = self.live.get_mut(&id) else { continue };
            let known = live.prompt_told.saturating_sub(position) as usize;
            let new: Vec<Scored> = tokens.into_iter().skip(known).collect();
            live.prompt_told += new.len() as u32;
            if !new.is_empty() {
                self.send(id, Update::Prompt(new));
            }
        }
        let chosen: Vec<(RequestId, u32)> =
            result.tokens.iter().map(|(sequence, token, _)| (RequestId(*sequence), token.id)).collect();
        let scored: HashMap<RequestId, (Scored, Vec<Scored>)> = result
            .tokens
            .into_iter()
            .map(|(sequence, token, top)| (RequestId(sequence), (token, top)))
            .collect();
        let events = self.scheduler.complete(result.id, &chosen);
        events.into_iter().for_each(|event| self.tell(event, &scored));
    }

    fn tell(&mut self, event: scheduler::Event, scored: &HashMap<RequestId, (Scored, Vec<Scored>)>) {
        match event {
            scheduler::Event::Started { id, queued, .. } => self.send(id, Update::Started { queued }),
            scheduler::Event::Token { id, token, finish } => {
                // Tokens come from the step that is being completed.
                let unknown = (Scored { id: token, logprob: f32::NAN }, Vec::new());
                let (token, top) = scored.get(&id).cloned().unwrap_or(unknown);
                if token.logprob.is_nan() {
                    // An adapter's finite weights can still be too large to compute with.
                    return self.give_up(id, "the logits are not numbers");
                }
                self.send(id, Update::Token { token, top, finish });
                if finish.is_some() {
                    self.live.remove(&id);
                }
            }
            scheduler::Event::Failed { id, reason } => {
                let failure = match reason {
                    FailReason::AdapterLoad(_) => Failure::Adapter(reason.to_string()),
                    FailReason::NoToken { .. } => Failure::Generation(reason.to_string()),
                };
                if let Some(live) = self.live.remove(&id) {
                    live.fail(failure);
                }
            }
        }
    }

    /// Passes an update on. Whoever has gone or does not keep up is cancelled.
    fn send(&mut self, id: RequestId, update: Update) {
        let Some(live) = self.live.get(&id) else { return };
        if live.updates.capacity() > 1 && live.updates.try_send(update).is_ok() {
            return;
        }
        self.give_up(id, "the client did not keep up");
    }

    fn give_up(&mut self, id: RequestId, why: &str) {
        if let Some(live) = self.live.remove(&id) {
            live.fail(Failure::Generation(why.into()));
        }
        self.scheduler.cancel(id);
    }
}
