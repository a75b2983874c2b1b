//! The ranks of one model: processes that compute together, each with its share of the weights.
//!
//! Between each two ranks there is a stream, over which they exchange small messages and file descriptors, and whose
//! end tells each of them at once that the other's process has ended. The matrices themselves travel over what the
//! devices share: memory on the CPU, NVLink between GPUs.

mod meeting;
mod peer;
mod posts;

use std::{
    collections::HashMap,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{Error, PeerFault, Result};
use peer::{Kind, Message, Peer};
use posts::Posts;
pub(crate) use posts::sum_of_posts;

/// How long ranks wait for each other in an operation, unless [`Group::set_patience`] says otherwise.
const PATIENCE: Duration = Duration::from_secs(60);

/// This process among the ranks of a model.
pub struct Group {
    rank: usize,
    /// By rank; `None` for this one.
    peers: Vec<Option<Peer>>,
    shared: Arc<Shared>,
    /// The number of the present attempt at each place.
    attempts: Mutex<HashMap<u64, u64>>,
    /// In microseconds.
    patience: AtomicU64,
}

/// What the threads that read from the peers share with the group.
#[derive(Default)]
struct Shared {
    lost: Lost,
    posts: Posts,
}

/// The first rank that was lost.
struct Lost(AtomicUsize);

impl Default for Lost {
    fn default() -> Lost {
        Lost(AtomicUsize::new(Lost::NONE))
    }
}

impl Lost {
    const NONE: usize = usize::MAX;

    fn set(&self, rank: usize) {
        // A rank that was lost before keeps its place: the others may have ended because of it.
        let _ = self.0.compare_exchange(Lost::NONE, rank, Ordering::Release, Ordering::Relaxed);
    }

    fn get(&self) -> Option<usize> {
        Some(self.0.load(Ordering::Acquire)).filter(|&rank| rank != Lost::NONE)
    }
}

fn in_micros(patience: Duration) -> AtomicU64 {
    AtomicU64::new(patience.as_micros() as u64)
}

impl Group {
    /// A group of one rank.
    pub fn alone() -> Group {
        let shared = Arc::new(Shared { posts: Posts::of(1), ..Shared::default() });
        Group {
            rank: 0,
            peers: vec![None],
            shared,
            attempts: Mutex::default(),
            patience: in_micros(PATIENCE),
        }
    }

    /// Meets the other ranks in a folder that only their user may enter. Every rank calls this with the same folder and
    /// number of ranks. Errors: one of them has not come within `patience`, or has come with other numbers.
    pub fn join(folder: &Path, rank: usize, ranks: usize, patience: Duration) -> Result<Group> {
        let limit = ranks;
        if rank >= ranks {
            return Err(Error::Index { op: "join", what: "rank", index: rank, limit });
        }
        let streams = meeting::meet(folder, rank, ranks, patience)?;
        let shared = Arc::new(Shared { posts: Posts::of(ranks), ..Shared::default() });
        let peers = streams.into_iter().enumerate().map(|(peer, stream)| {
            let peer = stream.map(|stream| Peer::new(peer, stream, shared.clone())).transpose();
            peer.map_err(|source| Error::Group { rank, what: "cannot talk to another rank", source })
        });
        let (peers, attempts) = (peers.collect::<Result<_>>()?, Mutex::default());
        Ok(Group { rank, peers, shared, attempts, patience: in_micros(PATIENCE) })
    }

    /// The group, whose ranks wait for each other for `patience` in every operation.
    pub fn with_patience(self, patience: Duration) -> Group {
        self.set_patience(patience);
        self
    }

    /// Sets how long this rank waits for the others in every operation.
    pub fn set_patience(&self, patience: Duration) {
        self.patience.store(patience.as_micros() as u64, Ordering::Relaxed);
    }

    /// The number of this rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn ranks(&self) -> usize {
        self.peers.len()
    }

    /// How long ranks wait for each other in an operation.
    pub fn patience(&self) -> Duration {
        Duration::from_micros(self.patience.load(Ordering::Relaxed))
    }

    /// The rank whose process was seen to end first, if any has. From then on no operation succeeds.
    pub fn lost(&self) -> Option<usize> {
        self.shared.lost.get()
    }

    /// Fails if a rank was lost, or if `rank`, which is waited for since `since`, has not come in time. Whatever waits
    /// for a peer calls this between short waits.
    pub fn check(&self, op: &'static str, rank: usize, since: Instant) -> Result<()> {
        self.check_within(op, rank, since, self.patience())
    }

    fn check_within(&self, op: &'static str, rank: usize, since: Instant, patience: Duration) -> Result<()> {
        if let Some(rank) = self.lost() {
            return Err(Error::Peer { op, rank, fault: PeerFault::Ended });
        }
        if since.elapsed() > patience {
            return Err(Error::Peer { op, rank, fault: PeerFault::Late(patience) });
        }
        Ok(())
    }

    /// Sends a small message to every other rank, and returns the messages of all ranks in their order. Every rank calls
    /// this as often as the others.
    pub fn exchange(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let got = self.exchange_messages("exchange", Message::new(bytes), self.patience())?;
        Ok(got.into_iter().map(|message| message.map_or_else(|| bytes.to_vec(), |it| it.bytes)).collect())
    }

    /// As [`Self::exchange`], with a file descriptor of every rank: memory that is shared. `None` in this rank's place.
    pub fn exchange_fd(&self, fd: BorrowedFd<'_>) -> Result<Vec<Option<OwnedFd>>> {
        let op = "exchange of file descriptors";
        let got = self.exchange_messages(op, Message { fd: Some(fd), bytes: &[] }, self.patience())?;
        let fds = got.into_iter().enumerate().map(|(rank, message)| {
            let Some(message) = message else { return Ok(None) };
            message.fd.map(Some).ok_or(Error::Peer { op, rank, fault: PeerFault::Differs })
        });
        fds.collect()
    }

    /// Waits until every rank has come here. `patience` is that of this call, because loading takes longer than steps.
    pub fn barrier(&self, patience: Duration) -> Result<()> {
        self.exchange_messages("barrier", Message::new(&[]), patience).map(drop)
    }

    fn exchange_messages(
        &self,
        op: &'static str,
        message: Message<'_>,
        patience: Duration,
    ) -> Result<Vec<Option<peer::Received>>> {
        let since = Instant::now();
        for (rank, peer) in self.others() {
            peer.send(Kind::Exchange, message).map_err(|error| self.fault_of(op, rank, &error))?;
        }
        let received = self.peers.iter().enumerate().map(|(rank, peer)| {
            let Some(peer) = peer else { return Ok(None) };
            loop {
                if let Some(message) = peer.receive() {
                    return Ok(Some(message));
                }
                self.check_within(op, rank, since, patience)?;
            }
        });
        received.collect()
    }

    /// Begins an attempt at a place, to which all ranks give the same number. Whatever was told there in other attempts,
    /// failures above all, is not taken for part of this one.
    pub fn begin(&self, place: u64, attempt: u64) {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner).insert(place, attempt);
    }

    /// A number for what is told in the present attempt.
    fn key(&self, place: u64, about: u64) -> [u64; 2] {
        let attempts = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
        let attempt = attempts.get(&place).copied().unwrap_or(0);
        // The golden ratio of 2⁶⁴ spreads the numbers of attempts over all bits.
        [place, about ^ attempt.wrapping_mul(0x9e37_79b9_7f4a_7c15)]
    }

    /// Tells every rank something about `about` at a place, in place of what this rank has told there before. It does not
    /// wait for the others.
    pub fn post(&self, place: u64, about: u64, bytes: &[u8]) -> Result<()> {
        let key = self.key(place, about);
        self.shared.posts.put(key, self.rank, bytes);
        for (rank, peer) in self.others() {
            peer.send(Kind::Post(key), Message::new(bytes))
                .map_err(|error| self.fault_of("post", rank, &error))?;
        }
        Ok(())
    }

    /// What all ranks have told at a place in this attempt, by rank, once the latest of each is about the same. It stays
    /// until something else is told there, because a rank may need it again. But no bytes stand for a failure, which is returned once.
    pub fn posted(&self, place: u64, about: u64) -> Option<Vec<Arc<[u8]>>> {
        self.shared.posts.get(self.key(place, about))
    }

    /// What each rank has told at a place in this attempt so far, by rank, if the latest is about that.
    pub fn posted_so_far(&self, place: u64, about: u64) -> Vec<Option<Arc<[u8]>>> {
        self.shared.posts.so_far(self.key(place, about))
    }

    /// Drops the failures that nobody has asked for.
    pub fn forget_failures(&self) {
        self.shared.posts.forget_empty();
    }

    fn others(&self) -> impl Iterator<Item = (usize, &Peer)> {
        self.peers.iter().enumerate().filter_map(|(rank, peer)| Some((rank, peer.as_ref()?)))
    }

    /// What a failed write to a peer means: it has ended, or it has not read for so long that no room is left.
    fn fault_of(&self, op: &'static str, rank: usize, error: &std::io::Error) -> Error {
        let fault = match error.kind() {
            std::io::ErrorKind::WouldBlock => PeerFault::Late(peer::SEND_TIMEOUT),
            _ => PeerFault::Ended,
        };
        if fault == PeerFault::Ended {
            self.shared.lost.set(rank);
        }
        Error::Peer { op, rank: self.lost().unwrap_or(rank), fault }
    }
}
