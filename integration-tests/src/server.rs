//! A whole server for a test: launcher, router and shard as a user starts them, on a free port.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use reqwest::{Client, Response};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::sleep;

/// Lines of the log that are kept for a test that does not read them; later ones are dropped.
const LINES: usize = 1 << 16;
/// Time for a server to load the demo model, and for anything else that a test waits for.
const DEADLINE: Duration = Duration::from_secs(120);
/// Pause between two looks at the metrics: gauges are published four times a second.
const PAUSE: Duration = Duration::from_millis(50);

/// A running server; killed when it is dropped.
pub struct Server {
    launcher: Child,
    log: mpsc::Receiver<String>,
    /// The address that it listens at.
    pub url: String,
    /// A client for requests to it.
    pub client: Client,
    /// The folder of what it keeps.
    _cache: TempDir,
}

/// The folder of the fixtures.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// The demo model, where `fetch_model.sh` puts it.
pub fn demo_model() -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = cache.or_else(home).context("neither XDG_CACHE_HOME nor HOME is set")?;
    let path = cache.join("lorax/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    if path.exists() { Ok(path) } else { bail!("{} is missing: make model", path.display()) }
}

/// A program of the workspace, built beside the tests.
fn program(name: &str) -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let folder = test.parent().and_then(Path::parent).context("the folder of the tests")?;
    let program = folder.join(name);
    if program.exists() { Ok(program) } else { bail!("{} is missing: cargo build --bins", program.display()) }
}

impl Server {
    /// Starts a server of the demo model and its adapters with further flags, and waits until it listens.
    pub fn start(flags: &[&str]) -> Result<Server> {
        Self::start_with(&demo_model()?, &fixtures().join("adapters"), flags)
    }

    /// Starts a server of any model and folder of adapters.
    pub fn start_with(model: &Path, adapters: &Path, flags: &[&str]) -> Result<Server> {
        Self::start_in(model, adapters, flags, &[])
    }

    /// The same, with variables in its environment.
    pub fn start_in(
        model: &Path,
        adapters: &Path,
        flags: &[&str],
        variables: &[(&str, &str)],
    ) -> Result<Server> {
        let cache = tempfile::tempdir()?;
        let mut launcher = Command::new(program("lorax-launcher")?)
            .args(["--hostname", "127.0.0.1", "--port", "0", "--device", "cpu", "--model-id"])
            .arg(model)
            .arg("--adapter-dir")
            .arg(adapters)
            .args(flags)
            // Several servers run side by side in the tests.
            .args(if flags.contains(&"--kv-memory") { &[][..] } else { &["--kv-memory", "256MiB"] })
            .env("NO_COLOR", "1")
            .env("XDG_CACHE_HOME", cache.path())
            .envs(variables.iter().copied())
            .stderr(Stdio::piped())
            .spawn()?;
        let stderr = launcher.stderr.take().context("the launcher's log")?;
        let (lines, log) = mpsc::sync_channel(LINES);
        // Reads to the end, so that the launcher never waits for room in the pipe.
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                // The test may be over, or have no use for as many lines.
                let _ = lines.try_send(line);
            }
        });
        let (begun, mut said) = (Instant::now(), String::new());
        while begun.elapsed() < DEADLINE {
            let Ok(line) = log.recv_timeout(DEADLINE) else { break };
            if let Some((_, address)) = line.split_once("listening on ") {
                let url = format!("http://{}", address.trim());
                return Ok(Server { launcher, log, url, client: Client::new(), _cache: cache });
            }
            said = said + &line + "\n";
        }
        let _ = launcher.kill();
        bail!("the server did not start:\n{said}")
    }

    /// Sends a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Response> {
        Ok(self.client.post(format!("{}{path}", self.url)).json(body).send().await?)
    }

    /// Greedy token ids of a prompt.
    pub async fn tokens(&self, adapter: Option<&str>, prompt: &str, count: usize) -> Result<Vec<u64>> {
        let parameters = json!({"adapter_id": adapter, "max_new_tokens": count, "details": true, "ignore_eos_token": true});
        let response = self.post("/generate", &json!({"inputs": prompt, "parameters": parameters})).await?;
        let body: Value = response.error_for_status()?.json().await?;
        let tokens = body["details"]["tokens"].as_array().context("tokens")?;
        tokens.iter().map(|token| token["id"].as_u64().context("an id")).collect()
    }

    /// The value of a series in `GET /metrics`, such as `lorax_kv_blocks{state="free"}`; 0 if it is not there yet.
    pub async fn metric(&self, series: &str) -> Result<f64> {
        let page = self.client.get(format!("{}/metrics", self.url)).send().await?;
        let page = page.error_for_status()?.text().await?;
        let value = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(Ok(0.0), |value| value.parse().context("the value of a metric"))
    }

    /// Waits until a series of the metrics has a value that is wanted, and returns the value.
    pub async fn until_metric(&self, series: &str, is_wanted: impl Fn(f64) -> bool) -> Result<f64> {
        let begun = Instant::now();
        loop {
            let value = self.metric(series).await?;
            if is_wanted(value) {
                return Ok(value);
            }
            ensure!(begun.elapsed() < DEADLINE, "{series} has been {value} for {DEADLINE:?}");
            sleep(PAUSE).await;
        }
    }

    /// Returns how many lines of the log since the last call contain `text`.
    pub fn said(&self, text: &str) -> usize {
        self.log.try_iter().filter(|line| line.contains(text)).count()
    }

    /// Waits for a line of the log that contains `text`, beginning after the last line that was read.
    pub fn until(&self, text: &str) -> Result<String> {
        let begun = Instant::now();
        loop {
            let left = DEADLINE.saturating_sub(begun.elapsed());
            let line = self.log.recv_timeout(left).with_context(|| format!("no {text:?} in the log"))?;
            if line.contains(text) {
                return Ok(line);
            }
        }
    }

    /// Ids of the launcher's children whose name is `name`.
    pub fn children(&self, name: &str) -> Result<Vec<u32>> {
        let tasks = format!("/proc/{0}/task/{0}/children", self.launcher.id());
        let ids = std::fs::read_to_string(tasks)?;
        let ids = ids.split_whitespace().filter_map(|id| id.parse().ok());
        Ok(ids
            .filter(|id: &u32| {
                std::fs::read_to_string(format!("/proc/{id}/comm")).is_ok_and(|comm| comm.trim() == name)
            })
            .collect())
    }

    /// Process ids of the shards, by rank.
    pub fn ranks(&self) -> Result<Vec<u32>> {
        let mut ranks = Vec::new();
        for id in self.children("lorax-shard")? {
            let line = std::fs::read(format!("/proc/{id}/cmdline"))?;
            let words: Vec<_> = line.split(|byte| *byte == 0).collect();
            let rank = words.windows(2).find(|pair| pair[0] == b"--rank").context("no --rank")?[1];
            ranks.push((std::str::from_utf8(rank)?.parse::<usize>()?, id));
        }
        ranks.sort_unstable();
        Ok(ranks.into_iter().map(|(_, id)| id).collect())
    }

    /// Sends a signal to a process.
    pub fn signal(id: u32, signal: &str) -> Result<()> {
        let status = Command::new("kill").args([signal, &id.to_string()]).status()?;
        if status.success() { Ok(()) } else { bail!("kill {signal} {id}: {status}") }
    }

    /// Asks the server to stop, and waits until it has.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        Self::signal(self.launcher.id(), "-TERM")?;
        Ok(self.launcher.wait()?)
    }
}

impl Server {
    /// Kills the launcher alone, and waits until it is gone.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.launcher.kill()?;
        Ok(self.launcher.wait()?)
    }

    /// Waits until these processes have given back all that they held.
    pub async fn until_gone(ids: &[u32]) -> Result<()> {
        let begun = Instant::now();
        // A process that its parent has not waited for has no memory any more.
        while let Some(left) = ids.iter().find(|id| Path::new(&format!("/proc/{id}/exe")).exists()) {
            ensure!(begun.elapsed() < DEADLINE, "process {left} is still there");
            sleep(PAUSE).await;
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its children end when the pipe to them closes.
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
    }
}
