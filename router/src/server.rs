//! The server: what handlers share, how it starts, and where it listens.

pub(crate) mod accept;
mod admin;
mod admit;
mod bodies;
mod connection;
mod connections;
mod cors;
mod health;
mod identify;
mod routes;
mod slots;
mod socket;

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use config::{Config, RouterConfig};
use lifecycle::Supervisor;
use sources::{SettingsError, SourceSettings, Sources};
use store::StoreError;
use tokio::{
    net::{TcpListener, TcpSocket, lookup_host},
    sync::watch,
};
use tower_http::cors::CorsLayer;

use crate::{
    adapters::Adapters,
    api::request::RequestLimits,
    base_model::BaseModel,
    embedding::{Embedding, EmbeddingError},
    engine::Engine,
    grammar::{Grammars, Words},
    keys::{KeyError, Keys},
    metrics::Metrics,
    permits::Permits,
    principal::Principal,
    registry::{Registry, RegistryStartError},
    text_side::{TextSide, TextSides},
    tokenizer::{ModelTokenizer, TokenizerError},
    wire::Info,
    workers::{self, Workers},
};
use admin::Admin;
use bodies::Bodies;
pub use connections::serve;

/// Requests whose adapters may be prepared at the same time, if `--max-concurrent-requests` is not more: a slow
/// adapter keeps nobody out who names another.
const MIN_PREPARING: usize = 256;

/// Connections that may wait to be accepted, if the system allows as many. Where they are too few, the system may reset
/// connections that come all at once.
const BACKLOG: u32 = 8192;

/// The same, unless `--step-timeout` is set.
const LONGEST_POLL: Duration = Duration::from_secs(10);

/// The reason that the router could not start.
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
    /// How texts are embedded.
    #[error("how the model embeds texts: {0}")]
    Embedding(#[from] EmbeddingError),
    /// The address.
    #[error("{address}: {source}")]
    Listen {
        /// The address to listen at.
        address: String,
        /// The cause.
        source: std::io::Error,
    },
    /// A text that is not an origin.
    #[error("cors-allow-origin: {0:?} is not an origin")]
    Origin(String),
    /// A text that is no method or no name of a header.
    #[error("{flag}: {text:?} is none")]
    Cors {
        /// The flag.
        flag: &'static str,
        /// The text.
        text: String,
    },
    /// Keys of callers.
    #[error("{0}")]
    Keys(#[from] KeyError),
    /// The metrics.
    #[error("the metrics: {0}")]
    Metrics(#[from] metrics_exporter_prometheus::BuildError),
    /// The places that adapters may be read from.
    #[error("the sources of adapters: {0}")]
    Sources(#[from] SettingsError),
    /// The cache of adapters.
    #[error("--adapter-cache {}: {source}", path.display())]
    AdapterCache {
        /// The folder.
        path: PathBuf,
        /// The cause.
        source: StoreError,
    },
    /// The adapters that flags and the manifest register.
    #[error(transparent)]
    Registry(#[from] RegistryStartError),
    /// The file of the trace.
    #[error("--adapter-trace {}: {source}", path.display())]
    Trace {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The engine's thread.
    #[error("the engine: {0}")]
    Engine(#[from] std::io::Error),
}

impl StartError {
    /// Returns whether the configuration is at fault.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            StartError::Origin(_)
                | StartError::Cors { .. }
                | StartError::Keys(_)
                | StartError::Sources(_)
                | StartError::AdapterCache { .. }
                | StartError::Registry(_)
                | StartError::Trace { .. }
                | StartError::Embedding(_)
                | StartError::Tokenizer { source: TokenizerError::Given(_), .. }
        )
    }
}

/// Everything that handlers need.
pub struct App {
    pub(crate) config: Config,
    pub(crate) base: BaseModel,
    pub(crate) text_sides: Arc<TextSides>,
    pub(crate) embedding: Embedding,
    pub(crate) adapters: Adapters,
    pub(crate) registry: Registry,
    pub(crate) engine: Engine,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) permits: Permits,
    /// Permits of requests whose adapters are being prepared.
    preparing: Permits,
    pub(crate) workers: Arc<Workers>,
    pub(crate) grammars: Grammars,
    bodies: Bodies,
    keys: Arc<Keys>,
    admin: Admin,
    /// The model could answer at least once.
    started: AtomicBool,
    /// The process was told to stop.
    stopping: AtomicBool,
    cors: Option<CorsLayer>,
}

impl App {
    /// Reads the tokenizer and starts to look for the shards. Adapters come from where flags and environment say.
    pub fn start(config: Config, supervisor: &Supervisor) -> Result<Arc<App>, StartError> {
        let shard = &config.shard;
        let sources = SourceSettings::from_env(shard.adapter_dir.clone(), shard.adapter_roots.clone())
            .with_buckets(&config.router.adapter_buckets)?;
        App::start_with(config, sources, supervisor)
    }

    /// The same, with adapters from elsewhere.
    pub fn start_with(
        config: Config,
        sources: SourceSettings,
        supervisor: &Supervisor,
    ) -> Result<Arc<App>, StartError> {
        let router = &config.router;
        let cors = cors::layer(router)?;
        let path = &config.model.path;
        let tokenizer = ModelTokenizer::load(path, router.tokenizer_config_path.as_deref())
            .map_err(|source| StartError::Tokenizer { path: path.clone(), source })?;
        let text_side = Arc::new(TextSide::new(Arc::new(tokenizer)));
        for (name, error) in text_side.chat.broken() {
            tracing::warn!("chats that need the template {name:?} will be refused: {error}");
        }
        let keys = Arc::new(Keys::load(router.api_keys.clone(), router.api_key_file.clone())?);
        let limit = longest_poll(router);
        supervisor.task("key file watcher", limit, keys.clone().watch());
        let metrics = Arc::new(Metrics::new()?);
        supervisor.task("metrics upkeep", limit, metrics.clone().upkeep());
        let workers = Arc::new(Workers::new(router.validation_workers, limit, metrics.workers()));
        supervisor.task(workers::NAME, limit, workers.clone().watch(supervisor.clone()));
        let adapters = Adapters::start(&config, Sources::new(sources)?, &metrics, supervisor)?;
        let (sockets, inbox) = (config.shards.uds.clone(), adapters.inbox());
        let registry = Registry::start(&config, adapters.clone())?;
        let app = Arc::new(App {
            base: BaseModel::new(&config),
            text_sides: Arc::new(TextSides::new(text_side, path)),
            embedding: Embedding::load(path)?,
            grammars: Grammars::new(workers.clone()),
            engine: Engine::start(sockets, router, metrics.clone(), inbox, supervisor)?,
            adapters,
            registry,
            metrics,
            permits: Permits::new(router.max_concurrent_requests),
            preparing: Permits::new(router.max_concurrent_requests.max(MIN_PREPARING)),
            workers,
            bodies: Bodies::new(
                router.max_body_memory as usize,
                router.max_body_size as usize,
                router.body_timeout,
            ),
            keys,
            admin: Admin::new(router.admin_token.as_ref()),
            started: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            cors,
            config,
        });
        let (ready, waiting) = (app.engine.ready(), Arc::downgrade(&app));
        tokio::spawn(async move {
            ready.await;
            if let Some(app) = waiting.upgrade() {
                app.read_vocabulary().await;
            }
        });
        Ok(app)
    }

    /// Prepares for grammars as soon as the model is known, so that the first request with one need not wait.
    async fn read_vocabulary(&self) {
        let Some(info) = self.engine.info() else { return };
        let base = self.text_sides.base();
        let words = Words::new(&base.words, info.vocab_size, self.end_ids(&info, base));
        if let Err(error) = self.grammars.vocabulary(&Principal::anonymous(), &words).await {
            tracing::warn!("grammars will be refused: {error}");
        }
    }

    /// The tokens that end a text: those of the model, and those of an adapter.
    pub(crate) fn end_ids(&self, info: &Info, side: &TextSide) -> Arc<[u32]> {
        info.eos_token_ids.iter().chain(side.tokenizer.end_ids()).copied().collect()
    }

    /// Waits until the shards can be reached.
    pub async fn ready(&self) {
        self.engine.ready().await;
    }

    /// The number of sequences that hold a permit, now and from now on.
    pub fn permits_held(&self) -> watch::Receiver<usize> {
        self.permits.held()
    }

    /// Returns whether tenants who must not know of each other may use the routes of administration.
    pub(crate) fn is_shared_by_tenants(&self) -> bool {
        self.keys.are_required() && self.admin.is_anybody()
    }

    pub(crate) fn request_limits(&self, info: &Info) -> RequestLimits {
        let router = &self.config.router;
        let most = info.max_total_tokens();
        let total = router.max_total_tokens.map_or(most, |asked| asked.min(most));
        RequestLimits {
            max_stop_sequences: router.max_stop_sequences,
            max_input_length: router.max_input_length.unwrap_or(total - 1).min(total - 1),
            max_total_tokens: total,
            vocab_size: info.vocab_size,
        }
    }
}

/// Time in which a poll of a task must return, and a ping be answered: `--step-timeout` if it is set.
pub(crate) fn longest_poll(config: &RouterConfig) -> Duration {
    config.step_timeout.unwrap_or(LONGEST_POLL)
}

/// Opens the port that the configuration names.
pub async fn listen(config: &Config) -> Result<(TcpListener, SocketAddr), StartError> {
    let (host, port) = (config.router.hostname.trim_matches(['[', ']']), config.router.port);
    let failed = |source| StartError::Listen { address: format!("{host}:{port}"), source };
    let listener = bind(host, port).await.map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    Ok((listener, local))
}

/// Bytes of a connection that the system keeps until the router reads them. Left to itself it would keep whole bodies:
/// thousands of clients whose bodies wait to be read would use up the memory that all connections of the machine share,
/// and every connection would stall while the system looks for some to free. The window suffices for 2 MB/s at 50 ms.
const RECEIVE_BUFFER: u32 = 64 << 10;

async fn bind(host: &str, port: u16) -> io::Result<TcpListener> {
    let mut last = io::Error::new(io::ErrorKind::InvalidInput, "the name has no address");
    for address in lookup_host((host, port)).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // Connections of a process before this one do not keep the port.
        socket.set_reuseaddr(true)?;
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
        match socket.bind(address) {
            Ok(()) => return socket.listen(BACKLOG),
            Err(error) => last = error,
        }
    }
    Err(last)
}
