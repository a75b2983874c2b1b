//! Connections: accepting them, and letting them finish.

use std::{future::Future, io, sync::Arc, time::Duration};

use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    net::TcpListener,
    time::{sleep, timeout},
};

use super::App;

/// How long a client may take to send the head of its next request: connections without one are closed.
const HEAD: Duration = Duration::from_secs(75);

/// Serves until `stop`, then lets streams finish for as long as the configuration allows.
pub async fn serve(listener: TcpListener, app: Arc<App>, stop: impl Future<Output = ()>) {
    let deadline = app.config.router.shutdown_deadline;
    let routes = app.routes();
    // To tell HTTP/2 from HTTP/1 takes the first bytes, for which there is no limit.
    let mut server = auto::Builder::new(TokioExecutor::new()).http1_only();
    server.http1().timer(TokioTimer::new()).header_read_timeout(HEAD);
    let connections = GracefulShutdown::new();
    tokio::pin!(stop);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => break,
        };
        let socket = match accepted {
            Ok((socket, _)) => socket,
            // The client's doing.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => {
                tracing::error!("no connection can be accepted: {error}");
                sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        // A token is a small write that follows a small write: Nagle's algorithm would hold it back until the client's
        // delayed acknowledgement, 40 ms.
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!("TCP_NODELAY: {error}");
        }
        let service = TowerToHyperService::new(routes.clone());
        let served = server.serve_connection(TokioIo::new(socket), service).into_owned();
        let served = connections.watch(served);
        tokio::spawn(async move {
            if let Err(error) = served.await {
                tracing::debug!("a connection: {error}");
            }
        });
    }
    drop(listener);
    if timeout(deadline, connections.shutdown()).await.is_err() {
        tracing::warn!("streams did not finish within {} s", deadline.as_secs());
    }
}
