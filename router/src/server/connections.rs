//! Connections: accepting them, serving them, and letting them finish.

use std::{
    future::Future,
    io,
    net::IpAddr,
    pin::pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use axum::extract::Request;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tower::ServiceExt;

use super::{
    App,
    slots::{NoSlot, Slots},
    socket::{Peer, Socket, client},
};

/// Time in which a client must send the head of its next request; after that the connection is closed.
const HEAD: Duration = Duration::from_secs(75);

/// The same for a connection of the reserve.
const RESERVED_HEAD: Duration = Duration::from_secs(5);

/// Memory for what was read of a connection and is not used yet. A larger head is refused.
const READ_BUFFER: usize = 64 << 10;

/// Files that the process needs beside connections.
const OTHER_FILES: u64 = 128;

/// The response to a connection for which there is no slot.
const FULL: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
/// The response to a connection whose address has too many.
const TOO_MANY: &[u8] =
    b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

/// Serves until `stop` and `--shutdown-delay` after it, then lets streams finish for as long as the configuration
/// allows.
pub async fn serve(listener: TcpListener, app: Arc<App>, stop: impl Future<Output = ()>) {
    let config = &app.config.router;
    let slots = Slots::new(bound(config.max_connections), config.connections_per_address());
    let server = Server {
        regular: builder(HEAD, true),
        reserved: builder(RESERVED_HEAD, false),
        routes: app.routes(),
        connections: GracefulShutdown::new(),
    };
    let starting = app.clone();
    tokio::spawn(async move {
        starting.engine.ready().await;
        starting.started.store(true, Relaxed);
    });
    let mut stop = pin!(async {
        stop.await;
        app.stopping.store(true, Relaxed);
        sleep(config.shutdown_delay).await;
    });
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => break,
        };
        match accepted {
            Ok((socket, address)) => server.admit(socket, client(address.ip()), &slots),
            // The client has gone already.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::error!("no connection can be accepted: {error}");
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
    drop(listener);
    if timeout(config.shutdown_deadline, server.connections.shutdown()).await.is_err() {
        tracing::warn!("streams did not finish within {} s", config.shutdown_deadline.as_secs_f64());
    }
}

struct Server {
    regular: auto::Builder<TokioExecutor>,
    reserved: auto::Builder<TokioExecutor>,
    routes: axum::Router,
    connections: GracefulShutdown,
}

impl Server {
    /// Serves a connection if there is a place for it.
    fn admit(&self, socket: TcpStream, address: IpAddr, slots: &Arc<Slots>) {
        // A token is a small write that follows a small write: Nagle's algorithm would hold it back until the client's
        // delayed acknowledgement, 40 ms.
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!("TCP_NODELAY: {error}");
        }
        let slot = match slots.take(address) {
            Ok(slot) => slot,
            Err(full) => {
                let answer = if full == NoSlot::Full { FULL } else { TOO_MANY };
                // Whoever does not hear it sees the connection closed.
                let _ = socket.try_write(answer);
                return;
            }
        };
        let server = if slot.reserved { &self.reserved } else { &self.regular };
        let peer = Peer::new(socket, slot);
        let io = TokioIo::new(Socket::new(peer.clone()));
        let routes = self.routes.clone().map_request(move |request: Request<_>| {
            let mut request = request.map(axum::body::Body::new);
            request.extensions_mut().insert(peer.clone());
            request
        });
        let served = server.serve_connection(io, TowerToHyperService::new(routes)).into_owned();
        let served = self.connections.watch(served);
        tokio::spawn(async move {
            if let Err(error) = served.await {
                tracing::debug!("a connection: {error}");
            }
        });
    }
}

fn builder(head: Duration, keep_alive: bool) -> auto::Builder<TokioExecutor> {
    // To tell HTTP/2 from HTTP/1 takes the first bytes, for which there is no limit.
    let mut server = auto::Builder::new(TokioExecutor::new()).http1_only();
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(head)
        .keep_alive(keep_alive)
        .max_buf_size(READ_BUFFER);
    server
}

/// The bound of connections: the configured one, or what the limit of open files allows if that is lower.
fn bound(asked: usize) -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut files = getrlimit(Resource::Nofile);
    // The soft limit is for programs that use `select`.
    files.current = files.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, files) {
        tracing::debug!("the limit of open files: {error}");
    }
    let Some(most) = getrlimit(Resource::Nofile).current else { return asked };
    let most = usize::try_from(most.saturating_sub(OTHER_FILES)).unwrap_or(usize::MAX).max(1);
    if asked > most {
        tracing::warn!("max-connections: the limit of open files leaves {most}, not {asked}");
    }
    asked.min(most)
}
