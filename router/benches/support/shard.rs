//! A shard that computes nothing: every step is answered with random tokens, at once or after a set time.

use std::{
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use proto::{
    AttachRequest, AttachResponse, ExecuteEvent, ExecuteRequest, HealthRequest, HealthResponse, InfoRequest,
    InfoResponse, Sampled, StageRequest, StageResponse, Step, StepResult, Token, UnstageRequest,
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

/// Observations of the shard since it was last asked.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Steps that ran.
    pub(crate) steps: usize,
    /// Time from sending a step's result to receiving the step that it made room for.
    pub(crate) turnarounds: Vec<Duration>,
    /// Without a step to run.
    pub(crate) idle: Duration,
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Double {
    vocab: u32,
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
    pub(crate) fn new(vocab: u32) -> Double {
        Double { vocab, state: Arc::default() }
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

    /// Runs steps in order, each for as long as the pace says.
    async fn run(self, mut steps: mpsc::Receiver<Step>, events: mpsc::Sender<Result<ExecuteEvent, Status>>) {
        let (mut random, mut free) = (1, Instant::now());
        while let Some(step) = steps.recv().await {
            let result = result(&step, self.vocab, &mut random);
            let pace = {
                let mut state = self.state();
                state.seen.steps += 1;
                state.seen.idle += free.elapsed();
                state.pace
            };
            if !pace.is_zero() {
                sleep(pace).await;
            }
            free = Instant::now();
            self.state().sent[step.id as usize % IN_FLIGHT] = Some(free);
            let event = ExecuteEvent { event: Some(Event::Step(result)), session: step.session };
            if events.send(Ok(event)).await.is_err() {
                return;
            }
        }
    }
}

/// The result of a step; `state` is that of Knuth's MMIX generator.
fn result(step: &Step, vocab: u32, state: &mut u64) -> StepResult {
    let mut sampled = |sequence| {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let token = Token { id: (*state >> 33) as u32 % vocab, logprob: -1.0 };
        Sampled { sequence, token: Some(token), top: Vec::new() }
    };
    let tokens = step.rows.iter().filter(|rows| rows.sample > 0).map(|rows| sampled(rows.sequence)).collect();
    StepResult { id: step.id, tokens, ..StepResult::default() }
}

#[tonic::async_trait]
impl Shard for Double {
    type ExecuteStream = Pin<Box<dyn Stream<Item = Result<ExecuteEvent, Status>> + Send>>;

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(InfoResponse {
            dtype: "bfloat16".into(),
            device: "none".into(),
            world: 1,
            vocab_size: self.vocab,
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
        let (queue, queued) = mpsc::channel(16);
        let (events, received) = mpsc::channel(16);
        self.state().sent = Default::default();
        tokio::spawn(self.clone().run(queued, events));
        let this = self.clone();
        tokio::spawn(async move {
            while let Some(Ok(ExecuteRequest { request: Some(execute_request::Request::Step(step)) })) =
                steps.next().await
            {
                this.received(step.id);
                if queue.send(step).await.is_err() {
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
