//! Bodies of requests, through all layers of a router that has a shard without a model behind it.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    body::{Body, to_bytes},
    http::{Method, Request},
};
use config::{Config, LogConfig, ModelConfig, RouterConfig, ShardConfig, ShardsConfig};
use lifecycle::Supervisor;
use lorax_router::App;
use sources::SourceSettings;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tower::ServiceExt;

use crate::{Outcome, must};

#[path = "../../../router/benches/support/shard.rs"]
#[allow(dead_code, reason = "the benchmarks also measure")]
mod shard;

/// The routes that read a body.
const ROUTES: [&str; 19] = [
    "/",
    "/invocations",
    "/generate",
    "/generate_stream",
    "/embed",
    "/classify",
    "/classify_batch",
    "/tokenize",
    "/detokenize",
    "/v1/adapters",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/lora_adapter/load",
    "/v1/lora_adapter/unload",
    "/v1/embeddings",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/models",
];
/// Tokens of the tiny model's tokenizer, all of which the shard samples.
const VOCAB: u32 = 320;
/// Most tokens of prompt and answer, so that no request takes long.
const MAX_TOKENS: usize = 64;
/// Most bytes of an answer.
const MAX_ANSWER: usize = 64 << 20;
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../integration-tests/fixtures/tiny/model");

/// A router that answers.
pub struct Server {
    app: Arc<App>,
    supervisor: Supervisor,
    failures: Arc<Mutex<Vec<String>>>,
    runtime: Runtime,
    _folder: TempDir,
}

impl Server {
    /// Starts it with the tiny model of the tests, and waits for its shard.
    pub fn start() -> Server {
        let runtime = must(Builder::new_multi_thread().worker_threads(2).enable_all().build());
        let folder = must(tempfile::tempdir());
        let socket = folder.path().join("shard.sock");
        let (failures, supervisor) = supervisor();
        let app = runtime.block_on(async {
            let (double, path) = (shard::Double::new(VOCAB, 0, 1), socket.clone());
            tokio::spawn(async move { double.serve(&path).await });
            let mut sources = SourceSettings::from_env(Some(folder.path().into()), Vec::new());
            sources.hub.offline = true;
            let app = must(App::start_with(configuration(folder.path(), &socket), sources, &supervisor));
            app.ready().await;
            app
        });
        Server { app, supervisor, failures, runtime, _folder: folder }
    }

    /// Answers a request, whose first line is the path of a route; an input without one is not sent. Panics: the
    /// server is at fault by its own account.
    pub fn run(&self, input: &[u8]) -> Outcome {
        let end = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
        let (path, body) = (&input[..end], input.get(end + 1..).unwrap_or_default());
        let Some(route) = ROUTES.into_iter().find(|route| route.as_bytes() == path) else {
            return Outcome::Refused("there is no such route".into());
        };
        let request = Request::builder().method(Method::POST).uri(route);
        let request = must(request.body(Body::from(body.to_vec())));
        let (status, answer) = self.runtime.block_on(async {
            let response = must(self.app.routes().oneshot(request).await);
            (response.status(), must(to_bytes(response.into_body(), MAX_ANSWER).await))
        });
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(!status.is_server_error(), "{status}: {answer}");
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(failures.is_empty(), "{failures:?}");
        if status.is_success() { Outcome::Read } else { Outcome::Refused(format!("{status}: {answer}")) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.supervisor.stopping();
    }
}

/// A supervisor, and the failures that it is told of.
fn supervisor() -> (Arc<Mutex<Vec<String>>>, Supervisor) {
    let failures = Arc::new(Mutex::new(Vec::new()));
    let told = failures.clone();
    let supervisor = Supervisor::reporting_to(move |failure| {
        told.lock().unwrap_or_else(PoisonError::into_inner).push(failure.to_string());
    });
    (failures, must(supervisor))
}

fn configuration(folder: &Path, socket: &Path) -> Config {
    Config {
        model: ModelConfig {
            id: "tiny".into(),
            path: MODEL.into(),
            merged_adapter: None,
            revision: None,
            sha: None,
        },
        shards: ShardsConfig { uds: vec![socket.into()], rendezvous: "/none".into() },
        router: RouterConfig {
            adapter_cache: Some(folder.join("cache")),
            max_total_tokens: Some(MAX_TOKENS),
            validation_workers: 1,
            ..RouterConfig::default()
        },
        shard: ShardConfig::default(),
        log: LogConfig::default(),
    }
}
