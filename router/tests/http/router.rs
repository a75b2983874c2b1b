//! The router under test, on a free port, in front of a scripted shard.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use config::{Config, LogConfig, ModelConfig, RouterConfig, ShardConfig, ShardsConfig};
use lifecycle::{Failure, Supervisor};
use lorax_router::{App, server, tokenizer::ModelTokenizer};
use reqwest::{Client, Method, Response, StatusCode};
use serde_json::{Value, json};
use sources::{HubSettings, SourceSettings};
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};

pub(crate) use crate::shard::PATIENCE;
use crate::shard::{Script, ScriptedShard};

/// Pause between two questions for something that no event tells of.
const PAUSE: Duration = Duration::from_millis(10);

/// Asks again and again, with a pause, until there is an answer.
pub(crate) async fn poll<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let mut turns = interval(PAUSE);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        if let Some(answer) = ask().await {
            return answer;
        }
    }
}

/// Name of the base model.
pub(crate) const MODEL: &str = "the/base-model";

/// The folder of the model whose tokenizer is used.
pub(crate) fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/tiny/model")
}

fn tokenizer() -> &'static ModelTokenizer {
    static TOKENIZER: OnceLock<ModelTokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| ModelTokenizer::load(&model(), None).unwrap())
}

/// Tokens of a text.
pub(crate) fn tokens(text: &str) -> Vec<u32> {
    tokenizer().encode(text, false).unwrap()
}

/// The text of these tokens.
pub(crate) fn text(tokens: &[u32]) -> String {
    tokenizer().decode(tokens, false)
}

/// A folder with the same tokenizer, which puts `<s>` in front of every text, as Llama's does.
pub(crate) fn with_bos() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let definition = std::fs::read(model().join("tokenizer.json")).unwrap();
    let mut definition: Value = serde_json::from_slice(&definition).unwrap();
    definition["post_processor"] = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}});
    std::fs::write(folder.path().join("tokenizer.json"), definition.to_string()).unwrap();
    folder
}

/// The files of an adapter.
pub(crate) const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// The adapters that are there. Beside them, "secret" is outside of the folders that may be read.
const ADAPTERS: [&str; 41] = [
    "a",
    "adapter-0",
    "adapter-1",
    "adapter-2",
    "adapter-3",
    "adapter-4",
    "adapter-5",
    "b",
    "bad",
    "broken",
    "c",
    "cold",
    "d",
    "e",
    "f",
    "gone",
    "good",
    "hot",
    "huge",
    "interrupted",
    "large",
    "law",
    "lost",
    "mild",
    "one",
    "one more",
    "other",
    "pirate",
    "some",
    "sound",
    "sql",
    "tax",
    "three",
    "three more",
    "torn",
    "two",
    "two more",
    "warm",
    "x",
    "y",
    "z",
];

/// Writes an adapter of so many bytes, which differ from those of other names.
pub(crate) fn write_adapter(folder: &Path, name: &str, bytes: usize) {
    let folder = folder.join(name);
    fs::create_dir_all(&folder).unwrap();
    let [config, weights] = FILES;
    let weight = name.bytes().cycle().take(bytes.max(name.len())).collect::<Vec<_>>();
    fs::write(folder.join(config), json!({"name": name}).to_string()).unwrap();
    fs::write(folder.join(weights), weight).unwrap();
}

/// The folder of the adapters, which all tests read.
pub(crate) fn adapters() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let all = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let folder = all.join("adapters-of-router-tests");
        fs::create_dir_all(&folder).unwrap();
        let _ = symlink("/", folder.join("secret"));
        let numbers = (0..240).map(|number| number.to_string());
        let names = ADAPTERS.iter().map(|name| (*name).to_owned()).chain(numbers);
        for name in names.filter(|name| !folder.join(name).exists()) {
            // Another test program may be doing the same.
            let new = tempfile::tempdir_in(all).unwrap();
            write_adapter(new.path(), &name, 1000);
            let _ = fs::rename(new.path().join(&name), folder.join(&name));
        }
        folder
    })
}

/// Identity of one of them.
pub(crate) fn content(name: &str) -> Vec<u8> {
    let [config, weights] = FILES.map(|file| (file, File::open(adapters().join(name).join(file)).unwrap()));
    store::content_of(&[(config.0, &config.1), (weights.0, &weights.1)]).unwrap().to_vec()
}

/// A configuration in which limits are small.
pub(crate) fn configuration(socket: &Path) -> Config {
    Config {
        model: ModelConfig {
            id: MODEL.into(),
            path: model(),
            merged_adapter: None,
            revision: None,
            sha: Some("abc".into()),
        },
        shards: ShardsConfig { uds: vec![socket.into()], rendezvous: "/none".into() },
        router: RouterConfig {
            hostname: "127.0.0.1".into(),
            port: 0,
            max_concurrent_requests: 64,
            prefix_caching: false,
            validation_workers: 1,
            max_body_size: 64 << 10,
            // Tests hold steps for as long as they like.
            step_timeout: Some(4 * PATIENCE),
            shutdown_deadline: Duration::from_secs(1),
            ..RouterConfig::default()
        },
        shard: ShardConfig { adapter_dir: Some(adapters().into()), ..ShardConfig::default() },
        log: LogConfig::default(),
    }
}

/// A running router.
pub(crate) struct Router {
    pub(crate) address: String,
    /// Rank 0.
    pub(crate) shard: ScriptedShard,
    /// All ranks.
    pub(crate) ranks: Vec<ScriptedShard>,
    pub(crate) app: Arc<App>,
    /// Tasks of the router that have failed.
    pub(crate) failures: Arc<Mutex<Vec<Failure>>>,
    client: Client,
    /// Tells the server to stop when it is dropped.
    _stop: oneshot::Sender<()>,
    folder: Arc<tempfile::TempDir>,
}

impl Router {
    pub(crate) async fn start(script: Script) -> Router {
        Router::start_with(script, |_| {}).await
    }

    /// Starts with a changed configuration, and waits until the shard is connected.
    pub(crate) async fn start_with(script: Script, change: impl FnOnce(&mut Config)) -> Router {
        let router = Router::launch(script, change).await;
        router.app.ready().await;
        router
    }

    /// Starts with a changed configuration.
    pub(crate) async fn launch(script: Script, change: impl FnOnce(&mut Config)) -> Router {
        Router::launch_ranks(vec![script], change).await
    }

    /// Starts in front of several shards.
    pub(crate) async fn launch_ranks(scripts: Vec<Script>, change: impl FnOnce(&mut Config)) -> Router {
        let folder = tempfile::tempdir().unwrap();
        let start = |(rank, script)| {
            let script = Script { content, ..script };
            let socket = folder.path().join(format!("shard-{rank}.sock"));
            (ScriptedShard::start(script, &socket), socket)
        };
        let (ranks, sockets) = scripts.into_iter().enumerate().map(start).unzip();
        Router::in_front_of(ranks, sockets, Arc::new(folder), None, change).await
    }

    /// Ends this router, and starts another in front of the same shards.
    pub(crate) async fn restart(self) -> Router {
        self.restart_when(async || {}).await
    }

    /// The same, once something else has happened after the end of this one.
    pub(crate) async fn restart_when(self, ended: impl AsyncFnOnce()) -> Router {
        let (ranks, folder) = (self.ranks.clone(), self.folder.clone());
        drop(self);
        ended().await;
        let sockets = (0..ranks.len()).map(|rank| folder.path().join(format!("shard-{rank}.sock")));
        let router = Router::in_front_of(ranks, sockets.collect(), folder, None, |_| {}).await;
        router.app.ready().await;
        router
    }

    /// Starts with adapters of a hub, and waits until the shard is connected.
    pub(crate) async fn start_at_hub(
        script: Script,
        hub: HubSettings,
        folder: Arc<tempfile::TempDir>,
        change: impl FnOnce(&mut Config),
    ) -> Router {
        let sources = SourceSettings { hub, ..SourceSettings::from_env(None, Vec::new()) };
        Router::start_at(script, sources, folder, change).await
    }

    /// The same, with adapters of other sources. The configuration says which folders may be read.
    pub(crate) async fn start_at(
        script: Script,
        sources: SourceSettings,
        folder: Arc<tempfile::TempDir>,
        change: impl FnOnce(&mut Config),
    ) -> Router {
        let socket = tempfile::tempdir_in(folder.path()).unwrap().keep().join("shard.sock");
        let shard = ScriptedShard::start(Script { content, ..script }, &socket);
        let router = Router::in_front_of(vec![shard], vec![socket], folder, Some(sources), change).await;
        router.app.ready().await;
        router
    }

    /// The folder of the sockets.
    pub(crate) fn run_folder(&self) -> PathBuf {
        self.folder.path().into()
    }

    async fn in_front_of(
        ranks: Vec<ScriptedShard>,
        sockets: Vec<PathBuf>,
        folder: Arc<tempfile::TempDir>,
        sources: Option<SourceSettings>,
        change: impl FnOnce(&mut Config),
    ) -> Router {
        let mut config = configuration(&sockets[0]);
        config.router.adapter_cache = Some(folder.path().join("adapter-cache"));
        config.shards.uds = sockets;
        change(&mut config);
        let (listener, address) = server::listen(&config).await.unwrap();
        let failures = Arc::new(Mutex::new(Vec::new()));
        let failed = failures.clone();
        let supervisor = Supervisor::reporting_to(move |failure| {
            eprintln!("{failure}");
            failed.lock().unwrap().push(failure);
        });
        let supervisor = supervisor.unwrap();
        let app = match sources {
            None => App::start(config, &supervisor).unwrap(),
            Some(sources) => {
                let adapter_dir = config.shard.adapter_dir.clone();
                App::start_with(config, SourceSettings { adapter_dir, ..sources }, &supervisor).unwrap()
            }
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let (supervising, serving) = (supervisor.clone(), app.clone());
        let stopping = async move {
            _ = stopped.await;
            supervising.stopping();
        };
        tokio::spawn(async move { server::serve(listener, serving, &supervisor, stopping).await });
        let shard = ranks[0].clone();
        Router {
            address: address.to_string(),
            shard,
            ranks,
            app,
            failures,
            client: Client::new(),
            folder,
            _stop: stop,
        }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Sends JSON; the answer may still be under way.
    pub(crate) async fn send(&self, path: &str, body: &Value) -> Response {
        self.client.post(self.url(path)).json(body).send().await.unwrap()
    }

    /// Sends JSON, and does not wait for the head of the answer: a stream has none before its first token.
    pub(crate) fn begin(&self, path: &str, body: &Value) -> JoinHandle<Response> {
        let request = self.client.post(self.url(path)).json(body);
        tokio::spawn(async move { request.send().await.unwrap() })
    }

    /// Status and JSON of a whole answer.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        let response = self.send(path, body).await;
        (response.status(), response.json().await.unwrap())
    }

    /// JSON of an answer that must be good.
    pub(crate) async fn ok(&self, path: &str, body: &Value) -> Value {
        let (status, body) = self.post(path, body).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body
    }

    /// Status and JSON of an answer to a body of any bytes.
    pub(crate) async fn post_bytes(&self, path: &str, body: Vec<u8>) -> (StatusCode, Value) {
        let response = self.client.post(self.url(path)).body(body).send().await.unwrap();
        (response.status(), response.json().await.unwrap())
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        self.client.get(self.url(path)).send().await.unwrap()
    }

    /// Asks as a browser does before a page of another origin posts.
    pub(crate) async fn preflight(&self, path: &str, origin: &str) -> Response {
        let request = self.client.request(Method::OPTIONS, self.url(path)).header("origin", origin);
        request.header("access-control-request-method", "POST").send().await.unwrap()
    }

    /// Sends a request with headers; the answer may still be under way.
    pub(crate) async fn send_with(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &Value,
    ) -> Response {
        let request = self.client.request(method, self.url(path)).json(body);
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        request.send().await.unwrap()
    }

    /// Waits until `/health` has this status, with these words in its body.
    pub(crate) async fn health(&self, status: u16, words: &str) {
        let mut last = String::new();
        let turns = poll(async || {
            let response = self.get("/health").await;
            let right = response.status().as_u16() == status;
            last = response.text().await.unwrap();
            (right && last.contains(words)).then_some(())
        });
        let turned = timeout(PATIENCE, turns).await;
        assert!(turned.is_ok(), "health never was {status} {words:?}; last {last:?}");
    }

    /// Waits until so many sequences hold a permit.
    pub(crate) async fn holds(&self, permits: usize) {
        let mut held = self.app.permits_held();
        let reached =
            timeout(PATIENCE, held.wait_for(|held| *held == permits)).await.map(|held| *held.unwrap());
        assert!(reached.is_ok(), "never {permits} permits, but {}", *held.borrow());
    }

    /// All events of a stream; OpenAI's mark of the end is a string.
    pub(crate) async fn events(&self, path: &str, body: &Value) -> Vec<Value> {
        let response = self.send(path, body).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        events(&response.text().await.unwrap())
    }
}

/// The data of server-sent events.
pub(crate) fn events(stream: &str) -> Vec<Value> {
    let data = stream.split("\n\n").filter_map(|event| event.trim().strip_prefix("data:"));
    data.map(|data| serde_json::from_str(data).unwrap_or_else(|_| data.trim().into())).collect()
}
