//! The layer that finds out who calls, and watches over the request from then on: it ends when its client leaves, or
//! when it is shed.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, header::AUTHORIZATION},
    middleware::Next,
    response::{IntoResponse, Response},
};
use secrecy::SecretString;

use super::{
    App,
    accept::Caller,
    admin::{is_list, is_managing},
    connection::Connection,
    routes::dialect,
};
use crate::{adapter::Credential, api::error::ApiError, permits::Admissible, principal::Principal};

/// The header of a credential for the source of the adapter.
const ADAPTER_TOKEN: &str = "x-adapter-token";

/// Paths that need no key: whoever watches over the process has none.
const OPEN: [&str; 6] = ["/health", "/ping", "/livez", "/readyz", "/startup", "/startupz"];

/// Finds out who calls, before anything else is done for the request.
pub(super) async fn identify(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    if is_open(&request) {
        return next.run(request).await;
    }
    let headers = request.headers();
    let bearer = bearer(headers);
    let (method, path) = (request.method(), request.uri().path());
    let (manages, is_admin) = (is_managing(path), app.admin.shows(bearer));
    if manages && !is_admin && !app.admin.is_anybody() {
        return ApiError::NotAdmin.respond(dialect(request.uri()));
    }
    let is_admin = is_admin && (manages || is_list(method, path));
    let principal = if is_admin { Some(Principal::anonymous()) } else { app.keys.principal(bearer) };
    let Some(principal) = principal else {
        return ApiError::InvalidKey.respond(dialect(request.uri()));
    };
    tracing::Span::current().record("tenant", &principal.tenant.name);
    let connection = request.extensions().get::<Connection>().cloned().unwrap_or_default();
    let dialect = dialect(request.uri());
    if !connection.is_for(&principal.tenant) {
        return ApiError::Overloaded { retry_after: Duration::from_secs(1) }.respond(dialect);
    }
    let given = headers.get(ADAPTER_TOKEN).and_then(|token| token.to_str().ok());
    let fallback = bearer.filter(|_| !app.keys.are_required() && !is_admin);
    let credential = Credential::new(given.map(SecretString::from), fallback.map(SecretString::from));
    let caller =
        Caller { principal, received: Instant::now(), credential, request: Arc::new(Admissible::new()) };
    request.extensions_mut().insert(caller.clone());
    let response = answer_or_shed(&caller, next.run(request));
    tokio::select! {
        // The client has gone, so this answer goes nowhere.
        () = connection.client_has_left() => StatusCode::REQUEST_TIMEOUT.into_response(),
        response = response => {
            response.unwrap_or_else(|retry_after| ApiError::Overloaded { retry_after }.respond(dialect))
        }
    }
}

impl App {
    /// Returns whether a caller may see the names of tenants, and of the adapters that they use.
    pub(crate) fn sees_names(&self, headers: &HeaderMap) -> bool {
        !self.keys.are_required() || self.admin.shows(bearer(headers))
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
