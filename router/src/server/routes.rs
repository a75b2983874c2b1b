//! All routes, and the layers that every request passes.

use std::sync::Arc;

use axum::{
    Router,
    extract::Request,
    http::{HeaderName, HeaderValue, Method, Uri},
    middleware,
    response::Response,
    routing::{get, post},
};
use tower::ServiceBuilder;
use tower_http::{
    request_id::{MakeRequestId, PropagateRequestIdLayer, RequestId, SetRequestIdLayer},
    trace::{DefaultOnRequest, TraceLayer},
};
use uuid::Uuid;

use super::{App, connection, health, identify};
use crate::{
    api::{
        adapters,
        error::{ApiError, Dialect},
        lorax, openai, openapi,
    },
    metrics,
};

/// The header of a request's name in logs.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest request id that is taken from a client.
const MAX_REQUEST_ID: usize = 128;

impl App {
    /// All routes. A request passes the layers from the first to the last, its response the other way.
    pub fn routes(self: &Arc<App>) -> Router {
        let layers = ServiceBuilder::new()
            .map_request(drop_odd_id)
            .layer(SetRequestIdLayer::new(REQUEST_ID, NewId))
            .layer(
                TraceLayer::new_for_http()
                    .make_span_with(span)
                    .on_request(DefaultOnRequest::new())
                    .on_failure(()),
            )
            .layer(PropagateRequestIdLayer::new(REQUEST_ID))
            .layer(middleware::from_fn_with_state(self.clone(), metrics::observe))
            .option_layer(self.cors.clone())
            .layer(middleware::from_fn(connection::close_if_unread))
            .layer(middleware::from_fn_with_state(self.clone(), identify::identify));
        Router::new()
            .route("/", get(health::health).post(lorax::either))
            .route("/invocations", post(lorax::either))
            .route("/generate", post(lorax::whole))
            .route("/generate_stream", post(lorax::stream))
            .route("/embed", post(lorax::embed))
            .route("/classify", post(lorax::classify))
            .route("/classify_batch", post(lorax::classify_batch))
            .route("/health", get(health::health))
            .route("/tokenize", post(lorax::tokenize::tokenize))
            .route("/detokenize", post(lorax::tokenize::detokenize))
            .route("/ping", get(health::health))
            .route("/startup", get(health::started))
            .route("/livez", get(health::live))
            .route("/readyz", get(health::health))
            .route("/startupz", get(health::started))
            .route("/info", get(health::info))
            .route("/openapi.json", get(openapi::document))
            .route("/api-doc/openapi.json", get(openapi::document))
            .route("/docs", get(openapi::page))
            .route("/metrics", get(metrics::page))
            .route("/v1/models", get(health::models))
            .route("/v1/models/{*id}", get(health::model))
            .route("/v1/adapters", get(adapters::list).post(adapters::register))
            .route("/v1/adapters/capacity", get(adapters::capacity))
            .route("/v1/adapters/{*id}", get(adapters::show).delete(adapters::remove))
            .route("/v1/load_lora_adapter", post(adapters::vllm_load))
            .route("/v1/unload_lora_adapter", post(adapters::vllm_unload))
            .route("/v1/lora_adapter/load", post(adapters::aibrix_load))
            .route("/v1/lora_adapter/unload", post(adapters::aibrix_unload))
            .route("/v1/embeddings", post(openai::embeddings))
            .route("/v1/completions", post(openai::completions))
            .route("/v1/chat/completions", post(openai::chat_completions))
            .route("/v1/responses", post(openai::responses))
            .fallback(no_route)
            .method_not_allowed_fallback(wrong_method)
            .layer(layers)
            .with_state(self.clone())
    }
}

/// Makes the ids of requests that bring none.
#[derive(Clone, Copy)]
struct NewId;

impl MakeRequestId for NewId {
    fn make_request_id<B>(&mut self, _: &axum::http::Request<B>) -> Option<RequestId> {
        HeaderValue::try_from(Uuid::new_v4().to_string()).ok().map(RequestId::new)
    }
}

/// Drops a client's request id that a log line cannot hold: it has to be short and of printable ASCII.
fn drop_odd_id(mut request: Request) -> Request {
    let sane = |id: &HeaderValue| {
        let id = id.as_bytes();
        (1..=MAX_REQUEST_ID).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic)
    };
    let headers = request.headers_mut();
    let mut ids = headers.get_all(REQUEST_ID).iter();
    if !(ids.next().is_some_and(sane) && ids.next().is_none()) {
        headers.remove(REQUEST_ID);
    }
    request
}

/// The span that all log lines of a request are in.
fn span<B>(request: &axum::http::Request<B>) -> tracing::Span {
    let id = request.extensions().get::<RequestId>().and_then(|id| id.header_value().to_str().ok());
    let (method, path) = (request.method(), request.uri().path());
    tracing::info_span!("request", id, %method, path, tenant = tracing::field::Empty)
}

async fn no_route(uri: Uri) -> Response {
    ApiError::NoRoute.respond(dialect(&uri))
}

async fn wrong_method(method: Method, uri: Uri) -> Response {
    ApiError::Method(method).respond(dialect(&uri))
}

/// The dialect in which a path is answered.
pub(super) fn dialect(uri: &Uri) -> Dialect {
    match uri.path() {
        "/v1/load_lora_adapter" | "/v1/unload_lora_adapter" => Dialect::Vllm,
        path if path.starts_with("/v1/lora_adapter/") => Dialect::Aibrix,
        path if path.starts_with("/v1/") => Dialect::OpenAi,
        _ => Dialect::Native,
    }
}
