//! The connection to the shards.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use proto::{AttachRequest, HealthRequest, InfoRequest, PrepareRequest, shard_client::ShardClient};
use scheduler::Adapter;
use secrecy::{ExposeSecret, SecretString};
use tokio::{net::UnixStream, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};
use tower::service_fn;

use crate::{
    adapter::AdapterRef,
    wire::{self, Event, Info},
};

/// Steps on their way to the shards: two may be in flight.
const STEPS: usize = 4;

/// Why the session with the ranks is over, or could not begin.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the model is not available: {0}")]
pub(crate) struct RankError(String);

impl From<Status> for RankError {
    fn from(status: Status) -> RankError {
        RankError(status.message().to_owned())
    }
}

/// Why an adapter could not be prepared.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum PrepareError {
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

impl From<Status> for PrepareError {
    fn from(status: Status) -> PrepareError {
        let message = status.message().to_owned();
        match status.code() {
            Code::NotFound => PrepareError::NotFound(message),
            Code::PermissionDenied => PrepareError::Forbidden(message),
            Code::InvalidArgument | Code::Unimplemented | Code::ResourceExhausted => {
                PrepareError::Invalid(message)
            }
            _ => PrepareError::Unavailable(message),
        }
    }
}

/// The shard processes of one model.
#[derive(Clone)]
pub(crate) struct Ranks {
    client: ShardClient<Channel>,
}

/// A stream of steps to the shards and of events back.
pub(crate) struct Session {
    pub(crate) info: Info,
    steps: mpsc::Sender<proto::Step>,
    events: Streaming<proto::ExecuteEvent>,
}

impl Ranks {
    /// Ranks that are reached by Unix sockets; the connection is made, and made again, when it is needed.
    pub(crate) fn new(socket: &Path) -> Ranks {
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
        Ranks { client }
    }

    /// Starts anew with empty shards.
    pub(crate) async fn session(&self) -> Result<Session, RankError> {
        let mut client = self.client.clone();
        let info = client.info(InfoRequest {}).await?.into_inner().into();
        client.attach(AttachRequest::default()).await?;
        let (steps, outgoing) = mpsc::channel(STEPS);
        let events = client.execute(ReceiverStream::new(outgoing)).await?.into_inner();
        Ok(Session { info, steps, events })
    }

    /// Has an adapter read and checked, and the caller's access to it.
    pub(crate) async fn prepare(
        &self,
        adapter: &AdapterRef,
        token: Option<&SecretString>,
    ) -> Result<Adapter, PrepareError> {
        let request = PrepareRequest {
            source: adapter.source.clone(),
            id: adapter.id.clone(),
            revision: String::new(),
            api_token: token.map_or_else(String::new, |token| token.expose_secret().into()),
        };
        let prepared = self.client.clone().prepare(request).await?.into_inner();
        wire::adapter(prepared)
            .ok_or_else(|| PrepareError::Unavailable("the shard gave no content hash".into()))
    }

    /// Whether the shards can run steps.
    pub(crate) async fn healthy(&self) -> bool {
        self.client.clone().health(HealthRequest {}).await.is_ok()
    }
}

impl Session {
    /// Sends a step.
    pub(crate) async fn send(&self, step: proto::Step) -> Result<(), RankError> {
        let sent = self.steps.send(step).await;
        sent.map_err(|_| RankError("the stream of steps has ended".into()))
    }

    /// The next event.
    pub(crate) async fn next(&mut self) -> Result<Event, RankError> {
        loop {
            let Some(message) = self.events.message().await? else {
                return Err(RankError("the stream of events has ended".into()));
            };
            if let Some(event) = wire::event(message) {
                return Ok(event);
            }
        }
    }
}
