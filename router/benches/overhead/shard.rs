//! A shard that computes nothing: every step is answered at once, with random tokens.

use std::{
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use proto::{
    ExecuteEvent, HealthRequest, HealthResponse, InfoRequest, InfoResponse, PrepareRequest, PrepareResponse,
    ResetRequest, ResetResponse, Sampled, Step, StepResult, Token,
    execute_event::Event,
    shard_server::{Shard, ShardServer},
};
use tokio::{net::UnixListener, sync::mpsc};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tonic::{Request, Response, Status, Streaming};

/// Steps that the router keeps in flight.
const IN_FLIGHT: usize = 2;

/// What the shard saw since it was last asked.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Steps and tokens.
    pub(crate) steps: usize,
    pub(crate) tokens: usize,
    /// From sending a step's result to receiving the step that it made room for.
    pub(crate) turnarounds: Vec<Duration>,
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Double {
    vocab: u32,
    seen: Arc<Mutex<Seen>>,
}

impl Double {
    pub(crate) fn new(vocab: u32) -> Double {
        Double { vocab, seen: Arc::default() }
    }

    /// What was seen since the last call.
    pub(crate) fn take(&self) -> Seen {
        std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Serves on a socket, for ever.
    pub(crate) async fn serve(self, socket: &Path) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let incoming = UnixListenerStream::new(UnixListener::bind(socket)?);
        let server = tonic::transport::Server::builder().add_service(ShardServer::new(self));
        Ok(server.serve_with_incoming(incoming).await?)
    }

    fn note(&self, tokens: usize, turnaround: Option<Duration>) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.steps += 1;
        seen.tokens += tokens;
        seen.turnarounds.extend(turnaround);
    }
}

/// The result of a step; `state` is that of Knuth's MMIX generator.
fn run(step: &Step, vocab: u32, state: &mut u64) -> StepResult {
    let mut sampled = |sequence| {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let token = Token { id: (*state >> 33) as u32 % vocab, logprob: -1.0 };
        Sampled { sequence, token: Some(token), top: Vec::new() }
    };
    let tokens = step.rows.iter().filter(|rows| rows.sample).map(|rows| sampled(rows.sequence)).collect();
    StepResult { id: step.id, tokens, prompt: Vec::new(), duration_us: 0 }
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

    async fn reset(&self, _: Request<ResetRequest>) -> Result<Response<ResetResponse>, Status> {
        Ok(Response::new(ResetResponse {}))
    }

    async fn prepare(&self, _: Request<PrepareRequest>) -> Result<Response<PrepareResponse>, Status> {
        Err(Status::not_found("there are no adapters"))
    }

    async fn execute(
        &self,
        request: Request<Streaming<Step>>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        let mut steps = request.into_inner();
        let (events, received) = mpsc::channel(16);
        let this = self.clone();
        tokio::spawn(async move {
            let (mut sent, mut state) = ([None; IN_FLIGHT], 1);
            while let Some(Ok(step)) = steps.next().await {
                let at = step.id as usize % IN_FLIGHT;
                let result = run(&step, this.vocab, &mut state);
                this.note(result.tokens.len(), sent[at].map(|sent: Instant| sent.elapsed()));
                sent[at] = Some(Instant::now());
                if events.send(Ok(ExecuteEvent { event: Some(Event::Step(result)) })).await.is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(received))))
    }

    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthResponse>, Status> {
        Ok(Response::new(HealthResponse {}))
    }
}
