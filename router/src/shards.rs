//! The connection to the shards.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use proto::{AttachRequest, HealthRequest, InfoRequest, PrepareRequest, shard_client::ShardClient};
use scheduler::Adapter;
use tokio::{net::UnixStream, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};
use tower::service_fn;

use crate::wire::{self, Event, Info};

/// Steps on their way to the shards: two may be in flight.
const STEPS: usize = 4;

/// Why the shards did not do what they were asked.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum ShardError {
    /// No such adapter.
    #[error("{0}")]
    NotFound(String),
    /// The caller may not read it.
    #[error("{0}")]
    Forbidden(String),
    /// It cannot be served; the message names the cause.
    #[error("{0}")]
    Invalid(String),
    /// There is no connection, or it broke.
    #[error("the model is not available: {0}")]
    Unavailable(String),
}

impl From<Status> for ShardError {
    fn from(status: Status) -> ShardError {
        let message = status.message().to_owned();
        match status.code() {
            Code::NotFound => ShardError::NotFound(message),
            Code::PermissionDenied => ShardError::Forbidden(message),
            Code::InvalidArgument | Code::Unimplemented | Code::ResourceExhausted => {
                ShardError::Invalid(message)
            }
            _ => ShardError::Unavailable(message),
        }
    }
}

/// A reference to an adapter, as a request names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AdapterRef {
    pub(crate) source: String,
    pub(crate) id: String,
    pub(crate) api_token: Option<String>,
}

/// The shard processes of one model.
#[derive(Clone)]
pub(crate) struct Shards {
    client: ShardClient<Channel>,
}

/// A stream of steps to the shards and of events back.
pub(crate) struct Session {
    pub(crate) info: Info,
    steps: mpsc::Sender<proto::Step>,
    events: Streaming<proto::ExecuteEvent>,
}

impl Shards {
    /// Shards that are reached by Unix sockets; the connection is made, and made again, when it is needed.
    pub(crate) fn new(socket: &Path) -> Shards {
        let socket: PathBuf = socket.into();
        let connect = service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        // The address is not looked at.
        let channel = Endpoint::from_static("http://shard").connect_with_connector_lazy(connect);
        let limit = 64 << 20;
        let client =
            ShardClient::new(channel).max_decoding_message_size(limit).max_encoding_message_size(limit);
        Shards { client }
    }

    /// Starts anew with empty shards.
    pub(crate) async fn session(&self) -> Result<Session, ShardError> {
        let mut client = self.client.clone();
        let info = client.info(InfoRequest {}).await?.into_inner().into();
        client.attach(AttachRequest::default()).await?;
        let (steps, outgoing) = mpsc::channel(STEPS);
        let events = client.execute(ReceiverStream::new(outgoing)).await?.into_inner();
        Ok(Session { info, steps, events })
    }

    /// Has an adapter read and checked, and the caller's access to it.
    pub(crate) async fn prepare(&self, adapter: &AdapterRef) -> Result<Adapter, ShardError> {
        let request = PrepareRequest {
            source: adapter.source.clone(),
            id: adapter.id.clone(),
            revision: String::new(),
            api_token: adapter.api_token.clone().unwrap_or_default(),
        };
        let prepared = self.client.clone().prepare(request).await?.into_inner();
        wire::adapter(prepared)
            .ok_or_else(|| ShardError::Unavailable("the shard gave no content hash".into()))
    }

    /// Whether the shards can run steps.
    pub(crate) async fn healthy(&self) -> bool {
        self.client.clone().health(HealthRequest {}).await.is_ok()
    }
}

impl Session {
    /// Sends a step.
    pub(crate) async fn send(&self, step: proto::Step) -> Result<(), ShardError> {
        let sent = self.steps.send(step).await;
        sent.map_err(|_| ShardError::Unavailable("the stream of steps has ended".into()))
    }

    /// The next event.
    pub(crate) async fn next(&mut self) -> Result<Event, ShardError> {
        loop {
            let Some(message) = self.events.message().await? else {
                return Err(ShardError::Unavailable("the stream of events has ended".into()));
            };
            if let Some(event) = wire::event(message) {
                return Ok(event);
            }
        }
    }
}
