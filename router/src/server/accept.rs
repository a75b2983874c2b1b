//! What a handler gets of a request: its caller, and its body as one shape of JSON.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    extract::{FromRequest, Request, State},
    http::{HeaderMap, Method, header::AUTHORIZATION},
    middleware::Next,
    response::Response,
};
use futures::StreamExt;
use secrecy::SecretString;
use serde::de::DeserializeOwned;
use tokio::{sync::oneshot, time::timeout};

use super::{App, routes::dialect};
use crate::{
    adapter::{AdapterRef, Credential},
    admission::Asked,
    api::{
        error::{ApiError, Dialect},
        json,
    },
    permits::{Admissible, Permit, Permits},
    principal::Principal,
};

/// A body that is too large is still read, and dropped, up to this many times the limit: a client that is cut off while it
/// sends never sees the answer.
const DRAINED: usize = 8;

/// Bodies above this size are parsed on a thread of their own.
const LARGE_JSON: usize = 64 << 10;

/// The header of a credential for the source of the adapter.
const ADAPTER_TOKEN: &str = "x-adapter-token";

/// Paths that need no key: whoever watches over the process has none.
const OPEN: [&str; 4] = ["/health", "/livez", "/readyz", "/startupz"];

/// The caller of a request, and what belongs to the request whatever its body says.
#[derive(Clone)]
pub(crate) struct Caller {
    pub(crate) principal: Principal,
    /// When its head was read.
    pub(crate) received: Instant,
    /// For the source of the adapter.
    pub(crate) credential: Credential,
    /// Its place among the admitted requests.
    request: Arc<Admissible>,
}

/// The body of a route, and the dialect in which it is refused.
pub(crate) trait Body: DeserializeOwned + Send + 'static {
    /// Whose shapes errors have.
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
    let limit = app.config.router.body_timeout;
    let bytes = timeout(limit, read(request, app.config.router.max_body_size as usize)).await;
    let bytes = bytes.map_err(|_| ApiError::Slow)??;
    let body = if bytes.len() > LARGE_JSON {
        app.workers.run(&caller.principal, move || json::parse(&bytes)).await?
    } else {
        json::parse(&bytes)
    };
    Ok(Accepted { caller, body: body? })
}

async fn read(request: Request, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut chunks = request.into_body().into_data_stream();
    let (mut body, mut bytes) = (Vec::new(), 0);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| ApiError::Malformed(error.to_string()))?;
        bytes += chunk.len();
        if bytes <= limit {
            body.extend_from_slice(&chunk);
        } else if bytes > DRAINED * limit {
            break;
        }
    }
    if bytes > limit { Err(ApiError::TooLarge { limit }) } else { Ok(body) }
}

impl App {
    /// Takes a permit for each of the sequences of a request, or none. A request asks for permits once.
    pub(crate) fn admit(
        &self,
        caller: &Caller,
        adapter: Option<&AdapterRef>,
        sequences: usize,
    ) -> Result<Vec<Permit>, ApiError> {
        Ok(self.permits.take(&caller.request, caller.asked(adapter, sequences))?)
    }
}

impl Caller {
    fn asked<'a>(&'a self, adapter: Option<&'a AdapterRef>, sequences: usize) -> Asked<'a> {
        Asked { tenant: &self.principal.tenant, adapter: adapter.map(|adapter| &*adapter.id), sequences }
    }
}

/// Finds out who calls, before anything else is done for the request.
pub(super) async fn identify(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    if is_open(&request) {
        return next.run(request).await;
    }
    let headers = request.headers();
    let bearer = bearer(headers);
    let Some(principal) = app.keys.principal(bearer) else {
        return ApiError::InvalidKey.respond(dialect(request.uri()));
    };
    tracing::Span::current().record("tenant", &principal.tenant.name);
    let given = headers.get(ADAPTER_TOKEN).and_then(|token| token.to_str().ok());
    let fallback = bearer.filter(|_| !app.keys.are_required());
    let credential = Credential::new(given.map(SecretString::from), fallback.map(SecretString::from));
    let (admissible, shed) = Admissible::new();
    let caller = Caller { principal, received: Instant::now(), credential, request: Arc::new(admissible) };
    request.extensions_mut().insert(caller.clone());
    let dialect = dialect(request.uri());
    answer_or_shed(&app.permits, &caller, next.run(request), shed)
        .await
        .unwrap_or_else(|retry_after| ApiError::Overloaded { retry_after }.respond(dialect))
}

/// Waits for a response, or for the request to be shed while it has none: then it is dropped, and with it all its work.
async fn answer_or_shed(
    permits: &Permits,
    caller: &Caller,
    response: impl Future<Output = Response>,
    mut shed: oneshot::Receiver<Duration>,
) -> Result<Response, Duration> {
    let response = tokio::select! {
        biased;
        Ok(retry_after) = &mut shed => return Err(retry_after),
        response = response => response,
    };
    permits.begin(&caller.request);
    match shed.try_recv() {
        Ok(retry_after) => Err(retry_after),
        Err(_) => Ok(response),
    }
}

fn is_open(request: &Request) -> bool {
    let path = request.uri().path();
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    // LoRAX has its health at the root, too.
    reads && (path == "/" || OPEN.contains(&path))
}

/// The token of `Authorization: Bearer`; the scheme's name is in either case.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.trim().split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}
