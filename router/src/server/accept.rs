//! The extractor of the routes that generate: the caller of a request, and its body read and parsed.

use std::{sync::Arc, time::Instant};

use axum::{
    extract::{FromRequest, Request},
    response::Response,
};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use super::{App, connection::Connection};
use crate::{
    adapter::Credential,
    api::{
        error::{ApiError, Dialect},
        json,
    },
    permits::Admissible,
    principal::Principal,
};

/// Bodies above this size are parsed on a thread of their own.
const LARGE_JSON: usize = 64 << 10;

/// The caller of a request, and the properties of the request that do not depend on its body.
#[derive(Clone)]
pub(crate) struct Caller {
    pub(crate) principal: Principal,
    /// Time at which its head was read.
    pub(crate) received: Instant,
    /// Tokens for the source of the adapter.
    pub(crate) credential: Credential,
    /// Its place among the admitted requests.
    pub(super) request: Arc<Admissible>,
}

/// The body of a route, the dialect in which it is refused, and its schema for `/openapi.json`.
pub(crate) trait Body: DeserializeOwned + JsonSchema + Send + 'static {
    /// The dialect of errors.
    const DIALECT: Dialect;
}

/// A request whose caller is known and whose body has been read.
pub(crate) struct Accepted<T> {
    pub(crate) caller: Caller,
    pub(crate) body: T,
}

impl<T: Body> FromRequest<Arc<App>> for Accepted<T> {
    type Rejection = Response;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Accepted<T>, Response> {
        accept(request, app).await.map_err(|error| error.respond(T::DIALECT))
    }
}

async fn accept<T: Body>(mut request: Request, app: &App) -> Result<Accepted<T>, ApiError> {
    let caller = request.extensions_mut().remove::<Caller>().ok_or(ApiError::InvalidKey)?;
    let connection = request.extensions().get::<Connection>().cloned().unwrap_or_default();
    let text = app.bodies.read(request, (caller.principal.tenant.id, connection.address())).await?;
    connection.body_was_read();
    // The memory of the text is given back when it has been parsed.
    let body = if text.bytes.len() > LARGE_JSON {
        app.workers.run("parsing of a body", &caller.principal, move || json::parse(&text.bytes)).await?
    } else {
        json::parse(&text.bytes)
    };
    Ok(Accepted { caller, body: body? })
}
