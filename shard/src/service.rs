//! The gRPC service.

use std::{pin::Pin, sync::Arc};

use kernels::Backend;
use proto::{
    AttachRequest, AttachResponse, ExecuteEvent, HealthRequest, HealthResponse, InfoRequest, InfoResponse,
    PrepareRequest, PrepareResponse, Step,
    shard_server::{Shard, ShardServer},
};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{adapters::Adapters, engine::Command, step::Info, wire};

/// Events on their way to the router: more than two steps can cause.
const EVENTS: usize = 256;

/// Answers the router on behalf of the engine.
pub struct Service<B: Backend> {
    info: InfoResponse,
    adapters: Arc<Adapters<B>>,
    engine: mpsc::Sender<Command>,
}

/// What answers the router.
pub type Server<B> = ShardServer<Service<B>>;

/// The service of one rank.
pub fn new<B: Backend>(info: Info, adapters: Arc<Adapters<B>>, engine: mpsc::Sender<Command>) -> Server<B> {
    // A step that adds sequences carries their prompts: a step's worth of sequences at full length.
    let limit = 64 << 20;
    ShardServer::new(Service { info: wire::info(info), adapters, engine })
        .max_decoding_message_size(limit)
        .max_encoding_message_size(limit)
}

impl<B: Backend> Service<B> {
    async fn send(&self, command: Command) -> Result<(), Status> {
        self.engine.send(command).await.map_err(|_| Status::unavailable("the engine has stopped"))
    }
}

#[tonic::async_trait]
impl<B: Backend> Shard for Service<B> {
    type ExecuteStream = Pin<Box<dyn Stream<Item = Result<ExecuteEvent, Status>> + Send>>;

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(self.info.clone()))
    }

    async fn attach(&self, _: Request<AttachRequest>) -> Result<Response<AttachResponse>, Status> {
        let (done, waiting) = oneshot::channel();
        self.send(Command::Reset(done)).await?;
        waiting.await.map_err(|_| Status::unavailable("the engine has stopped"))?;
        Ok(Response::new(AttachResponse::default()))
    }

    async fn prepare(&self, request: Request<PrepareRequest>) -> Result<Response<PrepareResponse>, Status> {
        let request = request.into_inner();
        let prepared = self.adapters.prepare(&request.source, &request.id).await;
        prepared
            .map(|prepared| Response::new(wire::prepared(prepared)))
            .map_err(|error| wire::prepare_status(&error))
    }

    async fn execute(
        &self,
        request: Request<Streaming<Step>>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        let mut steps = request.into_inner();
        let (events, received) = mpsc::channel(EVENTS);
        self.send(Command::Attach(events)).await?;
        let engine = self.engine.clone();
        tokio::spawn(async move {
            // The stream's end is the router's to decide; a broken one ends here, and the router resets.
            while let Some(Ok(step)) = steps.next().await {
                let step = wire::step(step).map(Box::new);
                if engine.send(Command::Step(step)).await.is_err() {
                    break;
                }
            }
        });
        let events = ReceiverStream::new(received)
            .map(|event| event.map(wire::event).map_err(|error| wire::step_status(&error)));
        Ok(Response::new(Box::pin(events)))
    }

    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthResponse>, Status> {
        if self.engine.is_closed() {
            return Err(Status::unavailable("the engine has stopped"));
        }
        Ok(Response::new(HealthResponse::default()))
    }
}
