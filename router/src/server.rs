//! Routes, limits, start and stop.

use std::{future::Future, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{Request, State},
    http::{HeaderValue, Method, StatusCode, Uri},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use config::Config;
use futures::StreamExt;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::Semaphore,
    time::{sleep, timeout},
};
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

use crate::{
    api::{
        ask::Rules,
        error::{ApiError, Dialect},
        generate, openai,
    },
    chat::ChatTemplate,
    engine::{Engine, Permit},
    ranks::Ranks,
    tokenizer::{ModelTokenizer, TokenizerError},
    wire::Info,
};

/// A body that is too large is still read, and dropped, up to so many times the limit: a client that is cut off while it
/// sends never sees the answer.
const DRAINED: usize = 8;

/// What a client gets to send the head of its next request: connections without one are closed.
const HEAD: Duration = Duration::from_secs(75);

/// What a client gets to send its body.
const BODY: Duration = Duration::from_secs(30);

/// What the shard gets to say that it is well.
const HEALTH: Duration = Duration::from_secs(3);

/// Why the router could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The tokenizer.
    #[error("the tokenizer of {}: {source}", path.display())]
    Tokenizer {
        /// The model.
        path: PathBuf,
        /// The cause.
        source: TokenizerError,
    },
    /// The chat template.
    #[error("the chat template: {0}")]
    Template(#[from] minijinja::Error),
    /// The address.
    #[error("{address}: {source}")]
    Listen {
        /// Where to listen.
        address: String,
        /// The cause.
        source: std::io::Error,
    },
    /// An origin that is none.
    #[error("cors-allow-origin: {0:?} is not an origin")]
    Origin(String),
    /// More shards than this version drives.
    #[error("{0} shards: this version drives one")]
    World(usize),
}

impl StartError {
    /// Whether the configuration is at fault.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            StartError::Origin(_)
                | StartError::World(_)
                | StartError::Tokenizer { source: TokenizerError::Given(_), .. }
        )
    }
}

/// Everything that handlers need.
pub struct App {
    pub(crate) config: Config,
    pub(crate) tokenizer: Arc<ModelTokenizer>,
    pub(crate) chat: Option<ChatTemplate>,
    pub(crate) ranks: Ranks,
    pub(crate) engine: Engine,
    pub(crate) permits: Arc<Semaphore>,
    pub(crate) tokenizing: Semaphore,
    cors: Option<CorsLayer>,
}

impl App {
    /// Reads the tokenizer and starts to look for the shards.
    pub fn start(config: Config) -> Result<Arc<App>, StartError> {
        let [socket] = &config.shards.uds[..] else { return Err(StartError::World(config.shards.uds.len())) };
        let router = &config.router;
        let path = &config.model.path;
        let tokenizer = ModelTokenizer::load(path, router.tokenizer_config_path.as_deref())
            .map_err(|source| StartError::Tokenizer { path: path.clone(), source })?;
        let ranks = Ranks::new(socket);
        Ok(Arc::new(App {
            chat: ChatTemplate::new(&tokenizer)?,
            tokenizer: Arc::new(tokenizer),
            engine: Engine::start(ranks.clone(), router.clone()),
            ranks,
            permits: Arc::new(Semaphore::new(router.max_concurrent_requests)),
            tokenizing: Semaphore::new(router.validation_workers.max(1)),
            cors: cors(&router.cors_allow_origin)?,
            config,
        }))
    }

    /// Waits until the shards can be reached.
    pub async fn ready(&self) {
        self.engine.ready().await;
    }

    pub(crate) fn rules(&self, info: &Info) -> Rules {
        let router = &self.config.router;
        let most = info.max_total_tokens();
        let total = router.max_total_tokens.map_or(most, |asked| asked.min(most));
        Rules {
            max_stop_sequences: router.max_stop_sequences,
            max_input_length: router.max_input_length.unwrap_or(total - 1).min(total - 1),
            max_total_tokens: total,
            vocab_size: info.vocab_size,
        }
    }

    /// Reads a body as JSON of one shape, and takes one of the places for concurrent requests: not before the body is
    /// there, so that nobody holds a place by sending slowly.
    pub(crate) async fn accept<T: DeserializeOwned>(
        &self,
        request: Request,
    ) -> Result<(T, Permit), ApiError> {
        let body = timeout(BODY, self.read(request)).await.map_err(|_| ApiError::Slow)??;
        let permit = self.admit()?;
        let body = serde_json::from_slice(&body).map_err(|error| match error.classify() {
            serde_json::error::Category::Data => ApiError::Validation(error.to_string()),
            _ => ApiError::Malformed(error.to_string()),
        })?;
        Ok((body, permit))
    }

    /// Takes one of the places for concurrent requests.
    pub(crate) fn admit(&self) -> Result<Permit, ApiError> {
        self.permits.clone().try_acquire_owned().map_err(|_| ApiError::Overloaded)
    }

    async fn read(&self, request: Request) -> Result<Vec<u8>, ApiError> {
        let limit = self.config.router.max_body_size as usize;
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

    /// All routes.
    pub fn routes(self: &Arc<App>) -> Router {
        let routes = Router::new()
            .route("/", get(health).post(generate::either))
            .route("/generate", post(generate::whole))
            .route("/generate_stream", post(generate::stream))
            .route("/health", get(health))
            .route("/info", get(info))
            .route("/v1/models", get(models))
            .route("/v1/completions", post(openai::completions))
            .route("/v1/chat/completions", post(openai::chat_completions))
            .fallback(no_route)
            .method_not_allowed_fallback(wrong_method)
            .with_state(self.clone());
        match &self.cors {
            Some(cors) => routes.layer(cors.clone()),
            None => routes,
        }
    }
}

/// What browsers are told; nothing without origins.
fn cors(origins: &[String]) -> Result<Option<CorsLayer>, StartError> {
    if origins.is_empty() {
        return Ok(None);
    }
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::from(Any)
    } else {
        let parse =
            |origin: &String| HeaderValue::from_str(origin).map_err(|_| StartError::Origin(origin.clone()));
        AllowOrigin::list(origins.iter().map(parse).collect::<Result<Vec<_>, _>>()?)
    };
    Ok(Some(CorsLayer::new().allow_origin(allowed).allow_methods(Any).allow_headers(Any)))
}

/// Where the configuration says to listen.
pub async fn listen(config: &Config) -> Result<(TcpListener, SocketAddr), StartError> {
    let (host, port) = (config.router.hostname.trim_matches(['[', ']']), config.router.port);
    let failed = |source| StartError::Listen { address: format!("{host}:{port}"), source };
    let listener = TcpListener::bind((host, port)).await.map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    Ok((listener, local))
}

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

async fn health(State(app): State<Arc<App>>) -> Response {
    if app.engine.info().is_some() && timeout(HEALTH, app.ranks.healthy()).await.unwrap_or(false) {
        return StatusCode::OK.into_response();
    }
    let body = json!({"error": "unhealthy", "error_type": "healthcheck"});
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

async fn info(State(app): State<Arc<App>>) -> Response {
    let Some(info) = app.engine.info() else {
        return ApiError::Unavailable("the model is not available, try again".into())
            .respond(Dialect::Native);
    };
    let (rules, router, model) = (app.rules(&info), &app.config.router, &app.config.model);
    let body: Value = json!({
        "model_id": model.id,
        "model_sha": model.sha,
        "model_dtype": info.dtype,
        "model_device_type": info.device,
        "max_concurrent_requests": router.max_concurrent_requests,
        "max_best_of": 1,
        "max_stop_sequences": router.max_stop_sequences,
        "max_input_length": rules.max_input_length,
        "max_total_tokens": rules.max_total_tokens,
        "max_batch_total_tokens": u64::from(info.num_blocks) * u64::from(info.block_size),
        "max_active_adapters": info.num_slots,
        "validation_workers": router.validation_workers,
        "version": env!("CARGO_PKG_VERSION"),
    });
    Json(body).into_response()
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let model = json!({"id": app.config.model.id, "object": "model", "created": 0, "owned_by": "lorax"});
    Json(json!({"object": "list", "data": [model]}))
}

async fn no_route(uri: Uri) -> Response {
    ApiError::NoRoute.respond(dialect(&uri))
}

async fn wrong_method(method: Method, uri: Uri) -> Response {
    ApiError::Method(method).respond(dialect(&uri))
}

fn dialect(uri: &Uri) -> Dialect {
    if uri.path().starts_with("/v1/") { Dialect::OpenAi } else { Dialect::Native }
}
