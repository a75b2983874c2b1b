//! The stream to one other rank, and the thread that reads from it.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::Shared;

/// How long a message may wait until the other rank has room for it. A thread of it reads all the time, so that only a
/// process that stands still makes others wait.
pub(super) const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// How long [`Peer::receive`] waits.
const RECEIVE_TIMEOUT: Duration = Duration::from_millis(20);
/// The most bytes of a message.
const MAX_BYTES: usize = 1 << 30;
/// The number of exchanges that a peer can be ahead: one, because the next one needs this rank.
const AHEAD: usize = 2;

/// A message to be sent.
#[derive(Clone, Copy)]
pub(super) struct Message<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) fd: Option<BorrowedFd<'a>>,
}

impl Message<'_> {
    pub(super) fn new(bytes: &[u8]) -> Message<'_> {
        Message { bytes, fd: None }
    }
}

/// A message that was received.
pub(super) struct Received {
    pub(super) bytes: Vec<u8>,
    pub(super) fd: Option<OwnedFd>,
}

/// What a message belongs to.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    /// An exchange, in the order of all exchanges.
    Exchange,
    /// Something that is told: its place, and what it is about.
    Post([u64; 2]),
}

/// Kind, place, subject and number of bytes, in front of each message.
const HEADER: usize = 32;

impl Kind {
    fn header(self, bytes: usize) -> [u8; HEADER] {
        let (kind, [place, about]) = match self {
            Kind::Exchange => (0_u64, [0; 2]),
            Kind::Post(key) => (1, key),
        };
        let mut header = [0; HEADER];
        for (to, number) in header.chunks_exact_mut(8).zip([kind, place, about, bytes as u64]) {
            to.copy_from_slice(&number.to_le_bytes());
        }
        header
    }

    fn of(header: &[u8; HEADER]) -> io::Result<(Kind, usize)> {
        let number = |at: usize| header[at..at + 8].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
        let bytes = number(24) as usize;
        match number(0) {
            0 if bytes <= MAX_BYTES => Ok((Kind::Exchange, bytes)),
            1 if bytes <= MAX_BYTES => Ok((Kind::Post([number(8), number(16)]), bytes)),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Another rank.
pub(super) struct Peer {
    writer: Mutex<UnixStream>,
    exchanges: Mutex<Receiver<Received>>,
    reader: Option<JoinHandle<()>>,
}

impl Peer {
    pub(super) fn new(rank: usize, stream: UnixStream, shared: Arc<Shared>) -> io::Result<Peer> {
        stream.set_write_timeout(Some(SEND_TIMEOUT))?;
        let reader = stream.try_clone()?;
        let (sender, exchanges) = sync_channel(AHEAD);
        let read = move || {
            // Whatever ends the stream, nothing can be computed with this rank any more.
            let _ = read_all(rank, reader, &sender, &shared);
            shared.lost.set(rank);
        };
        let reader = thread::Builder::new().name(format!("rank-{rank}")).spawn(read)?;
        Ok(Peer { writer: Mutex::new(stream), exchanges: Mutex::new(exchanges), reader: Some(reader) })
    }

    pub(super) fn send(&self, kind: Kind, message: Message<'_>) -> io::Result<()> {
        let mut stream = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let header = kind.header(message.bytes.len());
        let mut sent = 0;
        if let Some(fd) = message.fd {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = [fd];
            control.push(SendAncillaryMessage::ScmRights(&fds));
            sent = sendmsg(stream.as_fd(), &[IoSlice::new(&header)], &mut control, SendFlags::NOSIGNAL)?;
        }
        stream.write_all(&header[sent..])?;
        stream.write_all(message.bytes)
    }

    /// The next message of an exchange, if one comes soon.
    pub(super) fn receive(&self) -> Option<Received> {
        let exchanges = self.exchanges.lock().unwrap_or_else(PoisonError::into_inner);
        exchanges.recv_timeout(RECEIVE_TIMEOUT).ok()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let stream = self.writer.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Fails if the other rank has ended already.
        let _ = stream.shutdown(Shutdown::Both);
        // The reader may wait for room in the channel.
        let exchanges = self.exchanges.get_mut().unwrap_or_else(PoisonError::into_inner);
        *exchanges = sync_channel(0).1;
        if let Some(reader) = self.reader.take() {
            // It does not panic.
            let _ = reader.join();
        }
    }
}

/// Reads messages until the stream ends.
fn read_all(
    rank: usize,
    mut stream: UnixStream,
    exchanges: &SyncSender<Received>,
    shared: &Shared,
) -> io::Result<()> {
    loop {
        let (header, fd) = read_header(&stream)?;
        let (kind, len) = Kind::of(&header)?;
        let mut bytes = vec![0; len];
        stream.read_exact(&mut bytes)?;
        match kind {
            Kind::Post(key) => shared.posts.put(key, rank, &bytes),
            Kind::Exchange => {
                exchanges.send(Received { bytes, fd }).map_err(|_| io::ErrorKind::BrokenPipe)?;
            }
        }
    }
}

/// Reads the header of a message, and the file descriptor that came with it.
fn read_header(stream: &UnixStream) -> io::Result<([u8; HEADER], Option<OwnedFd>)> {
    let (mut header, mut read, mut fd) = ([0; HEADER], 0, None);
    while read < HEADER {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [IoSliceMut::new(&mut header[read..])];
        let got = match recvmsg(stream.as_fd(), into, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(got) => got.bytes,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        read += got;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                fd = fds.last().or(fd);
            }
        }
    }
    Ok((header, fd))
}
