//! What a handler gets of a request: its caller, and its body as one shape of JSON.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    extract::{FromRequest, Request, State},
    http::{HeaderMap, Method, StatusCode, header::AUTHORIZATION},
    middleware::Next,
    response::{IntoResponse, Response},
};
use secrecy::SecretString;
use serde::de::DeserializeOwned;

use super::{App, connection::Connection, routes::dialect};
use crate::{
    adapter::{AdapterRef, Credential},
    admission::Asked,
    api::{
        error::{ApiError, Dialect},
        json,
    },
    permits::{Admissible, Permit},
    principal::{Principal, Tenant, TenantLimits},
};

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
    let connection = request.extensions().get::<Connection>().cloned().unwrap_or_default();
    let text = app.bodies.read(request, (caller.principal.tenant.id, connection.address())).await?;
    connection.body_was_read();
    // The memory of the text is given back when it has been parsed.
    let body = if text.bytes.len() > LARGE_JSON {
        app.workers.run(&caller.principal, move || json::parse(&text.bytes)).await?
    } else {
        json::parse(&text.bytes)
    };
    Ok(Accepted { caller, body: body? })
}

/// Permits of a request on its way to the engine.
pub(crate) enum Entry {
    /// Those of `--max-concurrent-requests`.
    Admitted(Vec<Permit>),
    /// Those of preparation, until the adapter is there.
    Preparing(Vec<Permit>),
}

impl App {
    /// Lets a request in, with a permit for each of its sequences. One that needs an adapter gets those of
    /// `--max-concurrent-requests` only when the adapter is there, for that may take long; it is refused at once if it would
    /// not get them now.
    pub(crate) fn admit(
        &self,
        caller: &Caller,
        adapter: Option<&AdapterRef>,
        sequences: usize,
    ) -> Result<Entry, ApiError> {
        let asked = caller.asked(adapter, sequences);
        if adapter.is_none() {
            return Ok(Entry::Admitted(self.permits.take(&caller.request, asked)?));
        }
        self.permits.check(asked)?;
        // The tenant's own limits are those of the other permits.
        let tenant = Tenant { limits: TenantLimits::default(), ..Tenant::clone(asked.tenant) };
        let asked = Asked { tenant: &tenant, ..asked };
        Ok(Entry::Preparing(self.preparing.take(&caller.request, asked)?))
    }

    /// The permits of a request whose adapter is there.
    pub(crate) fn admit_prepared(
        &self,
        caller: &Caller,
        adapter: Option<&AdapterRef>,
        entry: Entry,
    ) -> Result<Vec<Permit>, ApiError> {
        match entry {
            Entry::Admitted(permits) => Ok(permits),
            Entry::Preparing(permits) => {
                Ok(self.permits.take(&caller.request, caller.asked(adapter, permits.len()))?)
            }
        }
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
    let connection = request.extensions().get::<Connection>().cloned().unwrap_or_default();
    let dialect = dialect(request.uri());
    if !connection.is_for(&principal.tenant) {
        return ApiError::Overloaded { retry_after: Duration::from_secs(1) }.respond(dialect);
    }
    let given = headers.get(ADAPTER_TOKEN).and_then(|token| token.to_str().ok());
    let fallback = bearer.filter(|_| !app.keys.are_required());
    let credential = Credential::new(given.map(SecretString::from), fallback.map(SecretString::from));
    let caller =
        Caller { principal, received: Instant::now(), credential, request: Arc::new(Admissible::new()) };
    request.extensions_mut().insert(caller.clone());
    let response = answer_or_shed(&caller, next.run(request));
    tokio::select! {
        // Nobody hears this answer.
        () = connection.client_has_left() => StatusCode::REQUEST_TIMEOUT.into_response(),
        response = response => {
            response.unwrap_or_else(|retry_after| ApiError::Overloaded { retry_after }.respond(dialect))
        }
    }
}

/// Waits for a response, or for the request to be shed while it has none: then it is dropped, and with it all its work.
async fn answer_or_shed(
    caller: &Caller,
    response: impl Future<Output = Response>,
) -> Result<Response, Duration> {
    let response = tokio::select! {
        biased;
        retry_after = caller.request.shed() => return Err(retry_after),
        response = response => response,
    };
    caller.request.begin();
    caller.request.was_shed().map_or(Ok(response), Err)
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
