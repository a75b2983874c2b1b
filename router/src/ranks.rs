//! The shard processes of one model, one for each rank: they get the same messages and act as one.

mod group;
mod loads;
mod merge;
mod stage;
mod steps;

use std::{
    error::Error,
    future::Future,
    io::{self, ErrorKind},
    iter::successors,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::try_join_all;
use hyper_util::rt::TokioIo;
use proto::{AttachRequest, HealthRequest, InfoRequest, shard_client::ShardClient};
use scheduler::AdapterKey;
use tokio::{net::UnixStream, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint, Uri},
};
use tower::service_fn;

use crate::wire::{self, Info, WireError};
pub(crate) use group::Group;
use group::RankStream;
pub(crate) use merge::InfoError;
use merge::Resident;
pub(crate) use stage::StageError;

/// Time between two pings over a connection.
const PING: Duration = Duration::from_millis(500);

/// The reason that a session with the ranks has ended, or could not begin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RankError {
    /// A rank cannot be reached, or answered with an error.
    #[error("rank {rank}: {message}")]
    Status {
        /// The rank.
        rank: usize,
        /// The cause.
        message: String,
    },
    /// Nobody listens on a rank's socket.
    #[error("rank {rank} does not serve yet")]
    Absent {
        /// The rank.
        rank: usize,
    },
    /// A rank has ended its stream of events.
    #[error("rank {rank} has ended the session")]
    Ended {
        /// The rank.
        rank: usize,
    },
    /// A call was not answered in time.
    #[error("rank {rank} did not answer {call} within {limit:?}")]
    Timeout {
        /// The rank.
        rank: usize,
        /// The call.
        call: &'static str,
        /// The deadline.
        limit: Duration,
    },
    /// The ranks do not belong together.
    #[error(transparent)]
    Info(#[from] InfoError),
    /// A message contradicts the protocol.
    #[error("rank {rank} sent {source}")]
    Wire {
        /// The rank.
        rank: usize,
        /// The contradiction.
        source: WireError,
    },
    /// Another rank than 0 has answered a step.
    #[error("rank {rank} answered a step, which only rank 0 does")]
    UnexpectedResult {
        /// The rank.
        rank: usize,
    },
    /// Rank 0 has answered a step that it should not have answered next.
    #[error("rank 0 answered step {actual} instead of step {expected}")]
    UnexpectedStep {
        /// The step that was answered.
        actual: u64,
        /// The oldest step in flight, or the next one to be sent.
        expected: u64,
    },
    /// A rank has reported a load that it was not told to do, or reported it twice.
    #[error("rank {rank} reported adapter {key:?} in slot {slot}, which it was not loading")]
    UnexpectedSlot {
        /// The rank.
        rank: usize,
        /// The slot.
        slot: u32,
        /// The adapter.
        key: AdapterKey,
    },
    /// A rank has not reported the end of a load.
    #[error("rank {rank} has not filled slot {slot} within {limit:?}")]
    LateSlot {
        /// The rank.
        rank: usize,
        /// The slot.
        slot: u32,
        /// The deadline.
        limit: Duration,
    },
    /// A rank does not take steps any more.
    #[error("rank {rank} is {steps} steps behind")]
    Behind {
        /// The rank.
        rank: usize,
        /// Steps that it has not taken.
        steps: usize,
    },
    /// A step has been in flight for too long.
    #[error("step {step} was not answered within {limit:?}")]
    LateStep {
        /// The step.
        step: u64,
        /// The deadline.
        limit: Duration,
    },
    /// The step loop of a rank has been at one piece of work for too long.
    #[error("rank {rank} has been at one piece of work for {age:?}, more than {limit:?}")]
    Stuck {
        /// The rank.
        rank: usize,
        /// The age of that work.
        age: Duration,
        /// The deadline.
        limit: Duration,
    },
}

/// Connections to all ranks. They are made, and made again, when they are needed, and one that does not answer a ping
/// is given up. They belong to the runtime on which this was made.
#[derive(Clone)]
pub(crate) struct Ranks {
    channels: Vec<Channel>,
}

impl Ranks {
    /// The shards at these sockets, in the order of their ranks, which must answer pings within `limit`. Must be called
    /// on a runtime.
    pub(crate) fn new(sockets: &[PathBuf], limit: Duration) -> Ranks {
        Ranks { channels: sockets.iter().map(|socket| channel(socket, limit)).collect() }
    }

    /// The number of ranks.
    pub(crate) fn world(&self) -> usize {
        self.channels.len()
    }

    /// A client for each rank.
    fn clients(&self) -> impl Iterator<Item = ShardClient<Channel>> {
        self.channels.iter().cloned().map(client)
    }

    /// The model that the ranks serve together. Has no deadline: a shard answers when its model is loaded and warmed
    /// up.
    pub(crate) async fn info(&self) -> Result<Info, RankError> {
        let infos = self.clients().enumerate().map(async |(rank, mut client)| {
            let info = client.info(InfoRequest {}).await.map_err(|status| failed(rank, &status))?;
            Ok::<_, RankError>(Info::from(info.into_inner()))
        });
        Ok(merge::merge(try_join_all(infos).await?)?)
    }

    /// Begins a session, whose number must be greater than any before it, with ranks that serve `info`.
    pub(crate) async fn attach(&self, session: u64, info: Info, limit: Duration) -> Result<Group, RankError> {
        let attached = self.clients().enumerate().map(async |(rank, mut client)| {
            let request = client.attach(AttachRequest { session });
            let held = wire::held(in_time(rank, "Attach", limit, request).await?);
            held.map_err(|source| RankError::Wire { rank, source })
        });
        // All ranks have forgotten the session before, and only then the first step of this one is sent.
        let resident = merge::resident(&try_join_all(attached).await?, info.num_slots);
        self.unstage_strays(session, &resident, limit).await?;
        let streams = self.channels.iter().cloned().enumerate().map(async |(rank, channel)| {
            let (steps, outgoing) = group::channel();
            let request = steps::execute(channel, ReceiverStream::new(outgoing));
            let events = in_time(rank, "Execute", limit, request).await?;
            Ok::<_, RankError>(RankStream { steps, events })
        });
        Ok(Group::new(session, info, resident, try_join_all(streams).await?))
    }

    /// Takes out of host memory what not all ranks have there.
    async fn unstage_strays(
        &self,
        session: u64,
        resident: &Resident,
        limit: Duration,
    ) -> Result<(), RankError> {
        let unstaged = self.clients().zip(&resident.strays).enumerate();
        let unstaged = unstaged.map(async |(rank, (mut client, strays))| {
            for content in strays {
                let request = wire::stage::unstage(session, *content);
                in_time(rank, "Unstage", limit, client.unstage(request)).await?;
            }
            Ok::<_, RankError>(())
        });
        try_join_all(unstaged).await.map(|_| ())
    }

    /// The age of the oldest work of a rank's step loop; `None` if the loop waits for work.
    pub(crate) async fn oldest_work(
        &self,
        rank: usize,
        limit: Duration,
    ) -> Result<Option<Duration>, RankError> {
        let mut client = client(self.channels[rank].clone());
        let health = in_time(rank, "Health", limit, client.health(HealthRequest {})).await?;
        Ok(wire::oldest_work(&health))
    }
}

fn channel(socket: &Path, limit: Duration) -> Channel {
    let socket: PathBuf = socket.into();
    let connect = service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The connector knows the socket, so the address is not looked at.
    let endpoint = Endpoint::from_static("http://shard").http2_keep_alive_interval(PING);
    let endpoint = endpoint.keep_alive_timeout(limit).keep_alive_while_idle(true);
    endpoint.connect_with_connector_lazy(connect)
}

fn client(channel: Channel) -> ShardClient<Channel> {
    ShardClient::new(channel)
        .max_decoding_message_size(proto::MAX_MESSAGE)
        .max_encoding_message_size(proto::MAX_MESSAGE)
}

fn failed(rank: usize, status: &Status) -> RankError {
    let causes = successors(Some(status as &(dyn Error + 'static)), |&error| error.source());
    let mut kinds = causes.filter_map(|error| Some(error.downcast_ref::<io::Error>()?.kind()));
    match kinds.any(|kind| matches!(kind, ErrorKind::NotFound | ErrorKind::ConnectionRefused)) {
        true => RankError::Absent { rank },
        false => RankError::Status { rank, message: status.message().to_owned() },
    }
}

/// The answer to a call, if it comes before the deadline.
async fn in_time<T>(
    rank: usize,
    call: &'static str,
    limit: Duration,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, RankError> {
    match timeout(limit, answer).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(failed(rank, &status)),
        Err(_) => Err(RankError::Timeout { rank, call, limit }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_rank_that_does_not_listen_is_told_from_one_that_fails() {
        let folder = tempfile::tempdir().unwrap();
        let [absent, left, hung_up] = ["absent", "left", "hung up"].map(|name| folder.path().join(name));
        // A socket file stays when its process has gone.
        drop(UnixListener::bind(&left).unwrap());
        let listener = UnixListener::bind(&hung_up).unwrap();
        std::thread::spawn(move || while listener.accept().is_ok() {});
        for (socket, does_listen) in [(absent, false), (left, false), (hung_up, true)] {
            let limit = Duration::from_secs(5);
            let error = client(channel(&socket, limit)).info(InfoRequest {}).await.unwrap_err();
            let error = failed(3, &error);
            assert_eq!(error != RankError::Absent { rank: 3 }, does_listen, "{socket:?}: {error}");
        }
    }
}
