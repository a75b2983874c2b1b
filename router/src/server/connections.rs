//! Connections: accepting them, serving them, and letting them finish.

use std::{
    future::{Future, pending},
    io,
    net::IpAddr,
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::Poll,
    time::Duration,
};

use axum::extract::Request;
use futures::{FutureExt, poll};
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
};
use lifecycle::Supervisor;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tower::ServiceExt;

use super::{
    App, longest_poll,
    slots::{NoSlot, Slots},
    socket::{Peer, Socket, client},
};
use crate::metrics::Metrics;

/// Name of the accept loop in the log.
const NAME: &str = "accept loop";
/// Pause after a connection could not be accepted, as when there are too many open files.
const RETRY: Duration = Duration::from_secs(1);

/// Time in which a client must send the head of its next request; after that the connection is closed.
const HEAD: Duration = Duration::from_secs(75);

/// The same for a connection of the reserve.
const RESERVED_HEAD: Duration = Duration::from_secs(5);

/// Requests of one HTTP/2 connection at the same time.
const STREAMS: u32 = 256;
/// Pause between two pings of an HTTP/2 connection, and the time in which they must be answered.
const PING: Duration = Duration::from_secs(30);

/// Memory for what was read of a connection and is not used yet. A larger head is refused.
const READ_BUFFER: usize = 64 << 10;

/// Accepted connections whose tasks have not had their first turn. When thousands connect at once, the others wait in the
/// kernel, and tasks that have tokens to send are not behind all of them.
const NEW: usize = 64;

/// Files that the process needs beside connections.
const OTHER_FILES: u64 = 128;

/// The response to a connection for which there is no slot.
const FULL: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
/// The response to a connection whose address has too many.
const TOO_MANY: &[u8] =
    b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

/// Serves until `stop` and `--shutdown-delay` after it, then lets streams finish for as long as the configuration
/// allows. The supervisor must have been told that the process stops before `stop` resolves.
pub async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    supervisor: &Supervisor,
    stop: impl Future<Output = ()> + Send + 'static,
) {
    let config = &app.config.router;
    let slots = Slots::new(bound(config.max_connections), config.connections_per_address());
    let limit = longest_poll(config);
    let server = Server {
        regular: regular(),
        reserved: reserved(),
        routes: app.routes(),
        metrics: app.metrics.clone(),
        slots,
        new: Arc::new(Semaphore::new(NEW)),
        connections: GracefulShutdown::new(),
        supervisor: supervisor.clone(),
        limit,
    };
    supervisor.task("start-up", limit, started(app.clone()));
    let stopping = app.clone();
    let stop = async move {
        stop.await;
        stopping.stopping.store(true, Relaxed);
        sleep(stopping.config.router.shutdown_delay).await;
    };
    let deadline = config.shutdown_deadline;
    let serving = supervisor.task(NAME, limit, async move {
        server.accept(listener, stop).await;
        if timeout(deadline, server.connections.shutdown()).await.is_err() {
            tracing::warn!("streams did not finish within {} s", deadline.as_secs_f64());
        }
    });
    // If it panicked, the supervisor has been told.
    let _ = serving.await;
}

/// Notes that the model could answer once.
async fn started(app: Arc<App>) {
    app.engine.ready().await;
    app.started.store(true, Relaxed);
    drop(app);
    // A supervised task does not return.
    pending().await
}

struct Server {
    regular: auto::Builder<TokioExecutor>,
    reserved: auto::Builder<TokioExecutor>,
    routes: axum::Router,
    metrics: Arc<Metrics>,
    slots: Arc<Slots>,
    new: Arc<Semaphore>,
    connections: GracefulShutdown,
    supervisor: Supervisor,
    /// Time in which a poll of a connection must return.
    limit: Duration,
}

impl Server {
    /// Accepts connections until `stop`.
    async fn accept(&self, listener: TcpListener, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        loop {
            let accepted = tokio::select! {
                accepted = self.accept_one(&listener) => accepted,
                () = &mut stop => break,
            };
            match accepted {
                Ok((socket, address, new)) => self.admit(socket, client(address), new),
                // The client has gone already.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::error!("no connection can be accepted: {error}");
                    sleep(RETRY).await;
                }
            }
        }
    }

    async fn accept_one(
        &self,
        listener: &TcpListener,
    ) -> io::Result<(TcpStream, IpAddr, OwnedSemaphorePermit)> {
        let new = self.new.clone().acquire_owned().await.map_err(io::Error::other)?;
        let (socket, address) = listener.accept().await?;
        Ok((socket, address.ip(), new))
    }

    /// Serves a connection if there is a place for it. It is `new` until its task has had a turn.
    fn admit(&self, socket: TcpStream, address: IpAddr, new: OwnedSemaphorePermit) {
        // A token is a small write that follows a small write: Nagle's algorithm would hold it back until the client's
        // delayed acknowledgement, 40 ms.
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!("TCP_NODELAY: {error}");
        }
        let slot = match self.slots.take(address) {
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
        let silent = peer.clone();
        let (routes, metrics) = (self.routes.clone(), self.metrics.clone());
        let service = service_fn(move |request: Request<_>| {
            let mut request = request.map(axum::body::Body::new);
            request.extensions_mut().insert(peer.clone());
            // Here, because the future is dropped before its first turn if the client has closed the connection.
            metrics.received(&mut request);
            routes.clone().oneshot(request)
        });
        let served = server.serve_connection(io, service).into_owned();
        let served = self.connections.watch(served);
        let served = async move {
            let mut served = pin!(served);
            let first = poll!(served.as_mut());
            drop(new);
            match first {
                Poll::Ready(ended) => ended,
                Poll::Pending => tokio::select! {
                    ended = served => ended,
                    () = silent.is_silent_for(HEAD) => Ok(()),
                },
            }
        };
        // A handler that blocks its thread holds up other connections.
        let pulse = self.supervisor.watch(format!("connection from {address}"), self.limit);
        tokio::spawn(async move {
            // A panic in a handler ends its own connection.
            match AssertUnwindSafe(pulse.polls(served)).catch_unwind().await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!("a connection: {error}"),
                Err(_) => tracing::error!("the task of a connection from {address} panicked"),
            }
        });
    }
}

/// HTTP/1, and HTTP/2 for clients that begin with it.
fn regular() -> auto::Builder<TokioExecutor> {
    let mut server = builder(HEAD, true);
    server
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(READ_BUFFER as u32)
        .max_send_buf_size(READ_BUFFER)
        .keep_alive_interval(Some(PING))
        .keep_alive_timeout(PING);
    server
}

/// A connection of the reserve serves one request, so that others get their turn.
fn reserved() -> auto::Builder<TokioExecutor> {
    builder(RESERVED_HEAD, false).http1_only()
}

fn builder(head: Duration, keep_alive: bool) -> auto::Builder<TokioExecutor> {
    let mut server = auto::Builder::new(TokioExecutor::new());
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, sync_channel};

    use axum::{Router, routing::get};
    use lifecycle::Failure;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        sync::oneshot,
    };

    use super::*;

    fn reporting() -> (Supervisor, Receiver<Failure>) {
        let (report, failures) = sync_channel(4);
        (Supervisor::reporting_to(move |failure| report.try_send(failure).unwrap()).unwrap(), failures)
    }

    async fn ask(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // A connection that breaks has no answer.
        let read = timeout(Duration::from_secs(30), stream.read_to_string(&mut answer)).await.unwrap();
        read.map_or_else(|_| String::new(), |_| answer)
    }

    /// A server of these routes, and what ends it.
    async fn start(
        routes: Router,
        supervisor: &Supervisor,
        limit: Duration,
    ) -> (std::net::SocketAddr, oneshot::Sender<()>) {
        let server = Server {
            regular: regular(),
            reserved: reserved(),
            metrics: Arc::new(Metrics::new().unwrap()),
            routes: routes.route("/answers", get(async || "well")),
            slots: Slots::new(4, 4),
            new: Arc::new(Semaphore::new(NEW)),
            connections: GracefulShutdown::new(),
            supervisor: supervisor.clone(),
            limit,
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        supervisor.task(NAME, Duration::from_secs(30), async move {
            server.accept(listener, async { _ = stopped.await }).await;
        });
        (address, stop)
    }

    #[tokio::test]
    async fn a_panic_in_a_connection_ends_that_connection_alone_and_frees_its_slot() {
        let (supervisor, failures) = reporting();
        let panics = get(async || -> &'static str { panic!("a bug in a handler") });
        let (address, _stop) =
            start(Router::new().route("/panics", panics), &supervisor, Duration::from_secs(30)).await;
        // More of them than there are slots.
        for _ in 0..6 {
            assert_eq!(ask(address, "/panics").await, "");
            let answer = ask(address, "/answers").await;
            assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("well"), "{answer}");
        }
        assert!(failures.try_recv().is_err());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_handler_that_blocks_its_thread_is_reported_and_one_that_waits_is_not() {
        let (supervisor, failures) = reporting();
        let (go_on, gone_on) = sync_channel::<()>(0);
        let gone_on = Arc::new(std::sync::Mutex::new(gone_on));
        let blocks = get(async move || {
            _ = gone_on.lock().unwrap().recv();
            "at last"
        });
        let routes = Router::new().route("/blocks", blocks).route("/waits", get(pending::<&'static str>));
        let (address, _stop) = start(routes, &supervisor, Duration::from_millis(300)).await;
        let _waiting = tokio::spawn(ask(address, "/waits"));
        let blocked = tokio::spawn(ask(address, "/blocks"));
        let (failure, failures) =
            tokio::task::spawn_blocking(move || (failures.recv_timeout(Duration::from_secs(30)), failures))
                .await
                .unwrap();
        let failure = failure.unwrap();
        let name = "connection from 127.0.0.1";
        assert!(matches!(&failure, Failure::Overdue { name: it, .. } if &**it == name), "{failure}");
        drop(go_on);
        assert!(blocked.await.unwrap().ends_with("at last"));
        assert!(failures.try_recv().is_err());
    }
}
