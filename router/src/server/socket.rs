//! A client's socket: seeing that the client has left, and closing without losing the last answer.

use std::{
    future::pending,
    io,
    net::{IpAddr, Ipv6Addr, Shutdown},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep},
};

use super::slots::Slot;

/// Time without a byte after which a connection that is being closed is given up.
const LINGER: Duration = Duration::from_secs(2);

/// Longest time for which a connection that is being closed may go on sending.
const LINGER_TOTAL: Duration = Duration::from_secs(30);

/// The bytes with which a client that knows the server begins HTTP/2 (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The client at the other end of a connection.
pub(super) struct Peer {
    stream: TcpStream,
    /// Its place among the connections.
    pub(super) slot: Slot,
    /// Whether a part of its last request will not be read.
    cut_short: AtomicBool,
    /// Whether it has sent enough to tell HTTP/2 from HTTP/1.
    has_begun: AtomicBool,
}

/// The connection as the HTTP implementation sees it.
pub(super) struct Socket {
    peer: Arc<Peer>,
    closing: Option<Lingering>,
    /// Bytes that were read, as far as all of them are those that HTTP/2 begins with.
    preface: usize,
}

/// A connection of which only the other direction is still open. To close it while the client sends makes the
/// client's system throw away the answer, so what it sends is read and dropped for a while.
struct Lingering {
    idle: Pin<Box<Sleep>>,
    until: Instant,
}

impl Peer {
    pub(super) fn new(stream: TcpStream, slot: Slot) -> Arc<Peer> {
        Arc::new(Peer { stream, slot, cut_short: AtomicBool::new(false), has_begun: AtomicBool::new(false) })
    }

    /// Waits until the client has closed the connection, or its own direction of it. The HTTP implementation sees
    /// that only while it has read nothing behind the request.
    pub(super) async fn has_left(&self) {
        // With this interest only the end of the client's direction is waited for, not what it sends.
        let _ = self.stream.ready(Interest::PRIORITY).await;
    }

    /// Waits for so long, and for ever if the client has begun to speak by then. Until it has, nothing else limits the
    /// time that it takes.
    pub(super) async fn is_silent_for(&self, time: Duration) {
        sleep(time).await;
        if self.has_begun.load(Relaxed) {
            pending().await
        }
    }

    /// The rest of the request will not be read: the connection ends with the answer.
    pub(super) fn cut_short(&self) {
        self.cut_short.store(true, Relaxed);
    }
}

impl Socket {
    pub(super) fn new(peer: Arc<Peer>) -> Socket {
        Socket { peer, closing: None, preface: 0 }
    }
}

/// The address by which the connections of one client are counted: an IPv6 host has a whole /64 network.
pub(super) fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address => address,
    }
}

impl Socket {
    /// Notes whether what was read tells HTTP/2 from HTTP/1.
    fn note(&mut self, read: &[u8]) {
        let rest = &PREFACE[self.preface..];
        let same = rest.iter().zip(read).take_while(|(a, b)| a == b).count();
        self.preface += same;
        if same < read.len() || self.preface == PREFACE.len() {
            self.peer.has_begun.store(true, Relaxed);
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let peer = self.peer.clone();
        let stream = &peer.stream;
        loop {
            ready!(stream.poll_read_ready(cx))?;
            let before = buf.filled().len();
            match stream.try_read(buf.initialize_unfilled()) {
                Ok(read) => {
                    buf.advance(read);
                    if !peer.has_begun.load(Relaxed) {
                        self.note(&buf.filled()[before..]);
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let stream = &self.peer.stream;
        loop {
            ready!(stream.poll_write_ready(cx))?;
            match stream.try_write_vectored(bufs) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Socket { peer, closing, .. } = &mut *self;
        if closing.is_none() {
            SockRef::from(&peer.stream).shutdown(Shutdown::Write)?;
            let more = matches!(peer.stream.try_read(&mut [0; 1]), Ok(1));
            if !more && !peer.cut_short.load(Relaxed) {
                return Poll::Ready(Ok(()));
            }
        }
        let now = Instant::now();
        let lingering = closing
            .get_or_insert_with(|| Lingering { idle: Box::pin(sleep(LINGER)), until: now + LINGER_TOTAL });
        while lingering.idle.as_mut().poll(cx).is_pending() {
            ready!(peer.stream.poll_read_ready(cx))?;
            match peer.stream.try_read(&mut [0; 8 << 10]) {
                Ok(0) => break,
                Ok(_) => lingering.idle.as_mut().reset(lingering.until.min(Instant::now() + LINGER)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}
