//! A shard that computes nothing: every step is answered with random tokens, at once or after a set time.

use std::{
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use proto::{
    AttachRequest, AttachResponse, ExecuteEvent, ExecuteRequest, HealthRequest, HealthResponse, InfoRequest,
    InfoResponse, Mask, Masks, Sampled, StageRequest, StageResponse, Step, StepResult, Token, UnstageRequest,
    UnstageResponse,
    execute_event::Event,
    execute_request,
    shard_server::{Shard, ShardServer},
};
use tokio::{net::UnixListener, sync::mpsc, time::sleep};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tonic::{Request, Response, Status, Streaming};

/// Steps that the router keeps in flight.
const IN_FLIGHT: usize = 2;
/// Entries of Llama 3's vocabulary, whose masks have 16 KB.
const VOCAB: u32 = 128_256;
/// The token that ends a sequence; never sampled where there is another.
const EOS: u32 = VOCAB - 1;

/// Observations of the shard since it was last asked.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Steps that ran.
    pub(crate) steps: usize,
    /// Time from sending a step's result to receiving the step that it made room for.
    pub(crate) turnarounds: Vec<Duration>,
    /// Time from sending a step's result to receiving the masks of the step behind it, which runs by then.
    pub(crate) masks: Vec<Duration>,
    /// Without a step to run.
    pub(crate) idle: Duration,
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Double {
    vocab: u32,
    rank: u32,
    world: u32,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    seen: Seen,
    /// Duration of a step.
    pace: Duration,
    /// Times at which the last results were sent, by the step's id modulo the steps in flight.
    sent: [Option<Instant>; IN_FLIGHT],
}

impl Double {
    /// Samples the first `vocab` tokens where there is no mask.
    pub(crate) fn new(vocab: u32, rank: u32, world: u32) -> Double {
        Double { vocab, rank, world, state: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Steps take so long from now on.
    pub(crate) fn set_pace(&self, pace: Duration) {
        self.state().pace = pace;
    }

    /// Takes the observations since the last call.
    pub(crate) fn take(&self) -> Seen {
        std::mem::take(&mut self.state().seen)
    }

    /// Serves on a socket, for ever.
    pub(crate) async fn serve(self, socket: &Path) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let incoming = UnixListenerStream::new(UnixListener::bind(socket)?);
        let server = tonic::transport::Server::builder().add_service(ShardServer::new(self));
        Ok(server.serve_with_incoming(incoming).await?)
    }

    /// Notes that a step has come.
    fn received(&self, id: u64) {
        let state = &mut *self.state();
        let sent = state.sent[id as usize % IN_FLIGHT];
        state.seen.turnarounds.extend(sent.map(|sent| sent.elapsed()));
    }

    /// Notes that the masks of a step have come, which wait for the result of the step before it.
    fn received_masks(&self, id: u64) {
        let state = &mut *self.state();
        let sent = state.sent[(id as usize + IN_FLIGHT - 1) % IN_FLIGHT];
        state.seen.masks.extend(sent.map(|sent| sent.elapsed()));
    }

    /// Runs steps in order, each for as long as the pace says and until its masks are there.
    async fn run(
        self,
        mut steps: mpsc::Receiver<Step>,
        mut masks: mpsc::Receiver<Masks>,
        events: mpsc::Sender<Result<ExecuteEvent, Status>>,
    ) {
        let (mut random, mut free) = (1, Instant::now());
        while let Some(step) = steps.recv().await {
            let pace = {
                let mut state = self.state();
                state.seen.steps += 1;
                state.seen.idle += free.elapsed();
                state.pace
            };
            if !pace.is_zero() {
                sleep(pace).await;
            }
            let masked = step.rows.iter().any(|rows| rows.masked);
            let masks = if masked { masks.recv().await.unwrap_or_default() } else { Masks::default() };
            let result = result(&step, &masks.masks, self.vocab, &mut random);
            free = Instant::now();
            self.state().sent[step.id as usize % IN_FLIGHT] = Some(free);
            if self.rank > 0 {
                continue;
            }
            let event = ExecuteEvent { event: Some(Event::Step(result)), session: step.session };
            if events.send(Ok(event)).await.is_err() {
                return;
            }
        }
    }
}

/// The result of a step; `state` is that of Knuth's MMIX generator.
fn result(step: &Step, masks: &[Mask], vocab: u32, state: &mut u64) -> StepResult {
    let mut sampled = |sequence| {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mask = masks.iter().find(|mask| mask.sequence == sequence && !mask.allowed.is_empty());
        let drawn = (*state >> 33) as u32;
        let id = mask.map_or(drawn % vocab, |mask| allowed(&mask.allowed, vocab, drawn));
        Sampled { sequence, token: Some(Token { id, logprob: -1.0 }), top: Vec::new() }
    };
    let tokens = step.rows.iter().filter(|rows| rows.sample > 0).map(|rows| sampled(rows.sequence)).collect();
    StepResult { id: step.id, tokens, ..StepResult::default() }
}

/// The first allowed token at a random place or behind it.
fn allowed(mask: &[u8], vocab: u32, drawn: u32) -> u32 {
    let is_allowed = |token: &u32| mask[*token as usize / 8] >> (token % 8) & 1 == 1;
    let start = drawn % vocab;
    (start..vocab).chain(0..start).find(is_allowed).unwrap_or(EOS)
}

#[tonic::async_trait]
impl Shard for Double {
    type ExecuteStream = Pin<Box<dyn Stream<Item = Result<ExecuteEvent, Status>> + Send>>;

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(InfoResponse {
            dtype: "bfloat16".into(),
            device: "none".into(),
            rank: self.rank,
            world: self.world,
            vocab_size: VOCAB,
            eos_token_ids: vec![EOS],
            max_positions: 8192,
            num_blocks: 1 << 16,
            block_size: 16,
            num_slots: 32,
            max_rows: 2048,
            max_sequences: 256,
            max_logit_rows: 256,
            ..InfoResponse::default()
        }))
    }

    async fn attach(&self, _: Request<AttachRequest>) -> Result<Response<AttachResponse>, Status> {
        Ok(Response::new(AttachResponse::default()))
    }

    async fn stage(&self, _: Request<StageRequest>) -> Result<Response<StageResponse>, Status> {
        Err(Status::invalid_argument("there are no adapters"))
    }

    async fn unstage(&self, _: Request<UnstageRequest>) -> Result<Response<UnstageResponse>, Status> {
        Ok(Response::new(UnstageResponse {}))
    }

    async fn execute(
        &self,
        request: Request<Streaming<ExecuteRequest>>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        let mut steps = request.into_inner();
        let ((queue, queued), (mask_queue, masks)) = (mpsc::channel(16), mpsc::channel(16));
        let (events, received) = mpsc::channel(16);
        self.state().sent = Default::default();
        tokio::spawn(self.clone().run(queued, masks, events));
        let this = self.clone();
        tokio::spawn(async move {
            while let Some(Ok(ExecuteRequest { request: Some(request) })) = steps.next().await {
                let queued = match request {
                    execute_request::Request::Step(step) => {
                        this.received(step.id);
                        queue.send(step).await.is_ok()
                    }
                    execute_request::Request::Masks(masks) => {
                        this.received_masks(masks.step);
                        mask_queue.send(masks).await.is_ok()
                    }
                };
                if !queued {
                    break;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(received))))
    }

    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthResponse>, Status> {
        Ok(Response::new(HealthResponse::default()))
    }
}
