//! The connection that a request came by, as its handlers see it.

use std::{
    future::{Future, pending},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use axum::{
    extract::Request,
    http::{HeaderValue, Version, header::CONNECTION},
    middleware::Next,
    response::Response,
};
use http_body::Body;
use tokio::sync::watch;

use super::socket::Peer;
use crate::principal::Tenant;

/// The connection of one request, and whether the request has come as a whole.
#[derive(Clone, Default)]
pub(super) struct Connection {
    /// `None` if the routes were called without a connection.
    peer: Option<Arc<Peer>>,
    body_read: watch::Sender<bool>,
}

impl Connection {
    /// The client's address.
    pub(super) fn address(&self) -> IpAddr {
        self.peer.as_ref().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.slot.address)
    }

    /// Returns whether a tenant may use the connection, which counts for this tenant from now on.
    pub(super) fn is_for(&self, tenant: &Tenant) -> bool {
        self.peer.as_ref().is_none_or(|peer| peer.slot.belongs_to(tenant))
    }

    /// All of the request has been read.
    pub(super) fn body_was_read(&self) {
        self.body_read.send_replace(true);
    }

    /// Waits until the client has sent its request and closed the connection.
    pub(super) fn client_has_left(&self) -> impl Future<Output = ()> + Send + use<> {
        let (peer, mut body_read) = (self.peer.clone(), self.body_read.subscribe());
        async move {
            let was_read = body_read.wait_for(|read| *read).await.is_ok();
            match peer {
                Some(peer) if was_read => peer.has_left().await,
                _ => pending().await,
            }
        }
    }
}

/// Ends connections on which a request was answered before it was read: what comes next could not be found.
pub(super) async fn close_if_unread(mut request: Request, next: Next) -> Response {
    let version = request.version();
    let peer = request.extensions_mut().remove::<Arc<Peer>>();
    let connection = Connection { peer, body_read: watch::Sender::new(request.body().is_end_stream()) };
    request.extensions_mut().insert(connection.clone());
    let mut response = next.run(request).await;
    // A stream of HTTP/2 ends by itself.
    if version != Version::HTTP_2 && !*connection.body_read.borrow() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        if let Some(peer) = &connection.peer {
            peer.cut_short();
        }
    }
    response
}
