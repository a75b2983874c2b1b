//! The gRPC service.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use kernels::Backend;
use proto::{
    AttachRequest, AttachResponse, ExecuteEvent, ExecuteRequest, HealthRequest, HealthResponse, InfoRequest,
    InfoResponse, StageRequest, StageResponse, UnstageRequest, UnstageResponse,
    shard_server::{Shard, ShardServer},
};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    adapters::Adapters,
    engine::{Command, EventStream, Heartbeat, StepError},
    pump::Incoming,
    step::{Event, Info, SessionEvent},
    wire,
};

/// Capacity of the channel of events to the router, beside one event for each slot: more than the two steps in flight
/// can cause. A slot has at most one event under way, because the router loads it again only after it has read the last
/// one.
const EVENTS: usize = 256;

/// The gRPC service of one rank.
pub(crate) struct Service<B: Backend> {
    info: InfoResponse,
    adapters: Arc<Adapters<B>>,
    engine: EngineHandle,
    /// The number of Execute calls so far, from which each gets its id.
    streams: AtomicU64,
}

/// Channels to the engine, and its heartbeat.
#[derive(Clone)]
pub(crate) struct EngineHandle {
    /// Commands to the engine.
    pub(crate) commands: mpsc::Sender<Command>,
    /// Newly opened streams, for the task that forwards their steps.
    pub(crate) streams: mpsc::Sender<Incoming>,
    /// The engine's heartbeat.
    pub(crate) heartbeat: Arc<Heartbeat>,
}

/// The service as tonic serves it.
pub(crate) type Server<B> = ShardServer<Service<B>>;

/// Makes the service of one rank.
pub(crate) fn new<B: Backend>(info: Info, adapters: Arc<Adapters<B>>, engine: EngineHandle) -> Server<B> {
    ShardServer::new(Service { info: wire::info(info), adapters, engine, streams: AtomicU64::new(0) })
        .max_decoding_message_size(proto::MAX_MESSAGE)
        .max_encoding_message_size(proto::MAX_MESSAGE)
}

impl<B: Backend> Service<B> {
    async fn send(&self, command: Command) -> Result<(), Status> {
        self.engine.commands.send(command).await.map_err(|_| stopped())
    }
}

#[tonic::async_trait]
impl<B: Backend> Shard for Service<B> {
    type ExecuteStream = Pin<Box<dyn Stream<Item = Result<ExecuteEvent, Status>> + Send>>;

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(self.info.clone()))
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Result<Response<AttachResponse>, Status> {
        let (held, waiting) = oneshot::channel();
        self.send(Command::Attach { session: request.into_inner().session, held }).await?;
        let held = waiting.await.map_err(|_| stopped())?;
        Ok(Response::new(wire::held(held)))
    }

    async fn stage(&self, request: Request<StageRequest>) -> Result<Response<StageResponse>, Status> {
        let order = wire::stage_order(request.into_inner()).map_err(|error| wire::stage_status(&error))?;
        let answer = self.adapters.stage(order).await;
        answer
            .map(|answer| Response::new(wire::stage_response(answer)))
            .map_err(|error| wire::stage_status(&error))
    }

    async fn unstage(&self, request: Request<UnstageRequest>) -> Result<Response<UnstageResponse>, Status> {
        let request = request.into_inner();
        let unstaged = async {
            let content = wire::unstage_content(&request)?;
            self.adapters.unstage(request.session, content).await
        };
        unstaged.await.map_err(|error| wire::stage_status(&error))?;
        Ok(Response::new(UnstageResponse {}))
    }

    async fn execute(
        &self,
        request: Request<Streaming<ExecuteRequest>>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        let steps = request.into_inner();
        let (events, received) = mpsc::channel(EVENTS + self.info.num_slots as usize);
        let id = self.streams.fetch_add(1, Ordering::Relaxed);
        let (stream, ended) = EventStream::new(id, events);
        self.send(Command::Execute(stream)).await?;
        let vocab = self.info.vocab_size;
        let steps = steps.map(move |step| match step {
            Ok(request) => wire::request(request, vocab),
            // If the connection is broken, nobody reads this error, and the router begins a new session.
            Err(status) => Err(StepError::Unreadable(status.message().into())),
        });
        let incoming = Incoming { stream: id, steps: Box::pin(steps), ended };
        self.engine.streams.send(incoming).await.map_err(|_| stopped())?;
        let answers = self.info.rank == 0;
        let events = ReceiverStream::new(received)
            .filter(move |event| answers || !is_result(event))
            .map(|event| event.map(wire::event).map_err(|error| wire::step_status(&error)));
        Ok(Response::new(Box::pin(events)))
    }

    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthResponse>, Status> {
        if self.engine.commands.is_closed() {
            return Err(stopped());
        }
        Ok(Response::new(wire::health(&self.engine.heartbeat)))
    }
}

/// Whether an event is the result of a step. Only rank 0 sends these, since all ranks compute the same.
fn is_result(event: &Result<SessionEvent, StepError>) -> bool {
    event.as_ref().is_ok_and(|event| matches!(event.event, Event::Step(_)))
}

/// The answer to every call after the engine's thread has ended.
fn stopped() -> Status {
    Status::unavailable("the engine has stopped")
}
