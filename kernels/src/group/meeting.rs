//! How ranks find each other: every rank listens in the folder, and connects to the ranks below it.

use std::{
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use crate::{Error, PeerFault, Result};

/// The pause between two attempts to connect or to accept.
const PAUSE: Duration = Duration::from_millis(2);

/// What a rank says first: its number, and the number of ranks.
type Hello = [u8; 16];

fn hello(rank: usize, ranks: usize) -> Hello {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&(rank as u64).to_le_bytes());
    bytes[8..].copy_from_slice(&(ranks as u64).to_le_bytes());
    bytes
}

/// A rank on its way into the group.
struct Joining {
    rank: usize,
    ranks: usize,
    since: Instant,
    patience: Duration,
}

/// Connects with all other ranks, and returns the streams by rank.
pub(super) fn meet(
    folder: &Path,
    rank: usize,
    ranks: usize,
    patience: Duration,
) -> Result<Vec<Option<UnixStream>>> {
    let joining = Joining { rank, ranks, since: Instant::now(), patience };
    let own = socket(folder, rank);
    // The socket of an earlier process would make `bind` fail.
    let _ = std::fs::remove_file(&own);
    let failed = |source| Error::Group { rank, what: "cannot listen for the other ranks", source };
    let listener = UnixListener::bind(&own).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let mut streams: Vec<Option<UnixStream>> = (0..ranks).map(|_| None).collect();
    for (peer, stream) in streams.iter_mut().enumerate().take(rank) {
        *stream = Some(joining.connect(&socket(folder, peer), peer)?);
    }
    while let Some(missing) = (rank + 1..ranks).find(|&peer| streams[peer].is_none()) {
        let (peer, stream) = joining.accept(&listener, missing)?;
        streams[peer] = Some(stream);
    }
    // Nobody else connects any more.
    let _ = std::fs::remove_file(&own);
    Ok(streams)
}

fn socket(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("rank-{rank}"))
}

impl Joining {
    /// What is left of the patience. Errors: nothing is left for `peer`.
    fn left(&self, peer: usize) -> Result<Duration> {
        let left = self.patience.checked_sub(self.since.elapsed()).filter(|left| !left.is_zero());
        left.ok_or(Error::Peer { op: "join", rank: peer, fault: PeerFault::Late(self.patience) })
    }

    /// Connects with a rank that may not listen yet.
    fn connect(&self, socket: &Path, peer: usize) -> Result<UnixStream> {
        loop {
            let left = self.left(peer)?;
            match UnixStream::connect(socket) {
                Ok(mut stream) => {
                    let said = greet(&mut stream, hello(self.rank, self.ranks), left, true);
                    // An earlier process may have ended while it was connected with.
                    let Ok(said) = said else { continue };
                    self.check(peer, said)?;
                    return Ok(stream);
                }
                Err(error) if is_not_there(&error) => thread::park_timeout(PAUSE),
                Err(source) => {
                    let what = "cannot connect with another rank";
                    return Err(Error::Group { rank: self.rank, what, source });
                }
            }
        }
    }

    /// Accepts the connection of a higher rank.
    fn accept(&self, listener: &UnixListener, missing: usize) -> Result<(usize, UnixStream)> {
        loop {
            let left = self.left(missing)?;
            match listener.accept() {
                Ok((mut stream, _)) => {
                    let greeted = stream
                        .set_nonblocking(false)
                        .and_then(|()| greet(&mut stream, hello(self.rank, self.ranks), left, false));
                    // A process that is none of ours, or that has ended, does not count.
                    let Ok(said) = greeted else { continue };
                    let peer = number(&said[..8]);
                    if peer <= self.rank || peer >= self.ranks {
                        return Err(self.differs(peer));
                    }
                    self.check(peer, said)?;
                    return Ok((peer, stream));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::park_timeout(PAUSE),
                Err(source) => {
                    let what = "cannot accept another rank's connection";
                    return Err(Error::Group { rank: self.rank, what, source });
                }
            }
        }
    }

    fn check(&self, peer: usize, said: Hello) -> Result<()> {
        if said == hello(peer, self.ranks) { Ok(()) } else { Err(self.differs(peer)) }
    }

    fn differs(&self, rank: usize) -> Error {
        Error::Peer { op: "join", rank, fault: PeerFault::Differs }
    }
}

/// Whether nobody listens at a socket yet.
fn is_not_there(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Says who this is, and returns what the other one says. The one that connects speaks first.
fn greet(stream: &mut UnixStream, own: Hello, patience: Duration, first: bool) -> io::Result<Hello> {
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let mut said = Hello::default();
    if first {
        stream.write_all(&own)?;
    }
    stream.read_exact(&mut said)?;
    if !first {
        stream.write_all(&own)?;
    }
    stream.set_read_timeout(None)?;
    Ok(said)
}

fn number(bytes: &[u8]) -> usize {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
}
