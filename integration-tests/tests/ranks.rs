//! Whole servers of several ranks on the CPU: they answer what one rank answers, and a rank that ends at any time takes
//! nothing with it but the requests in flight.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use futures::future::join_all;
use integration_tests::{
    adapters::{ALL_SITES, TINY},
    server::{Server, fixtures},
};
use reqwest::{Response, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::spawn_blocking;

const NAMES: [Option<&str>; 6] = [None, Some("r1"), Some("r3"), Some("r8"), Some("r16"), Some("r64")];

fn start(ranks: usize, flags: &[&str]) -> Server {
    let tiny = fixtures().join("tiny");
    start_with(&tiny.join("model"), &tiny.join("adapters"), ranks, flags)
}

fn start_with(model: &Path, adapters: &Path, ranks: usize, flags: &[&str]) -> Server {
    let ranks = ranks.to_string();
    let own = ["--num-shard", &ranks, "--kv-memory", "16MiB", "--max-batch-size", "32"];
    Server::start_with(model, adapters, &[&own[..], flags].concat()).unwrap()
}

/// What a server says to a request with this prompt: its tokens, and the log-probabilities of prompt and tokens.
async fn scores(server: &Server, adapter: Option<&str>, prompt: &str) -> (Vec<u64>, Vec<f64>) {
    let parameters = json!({"adapter_id": adapter, "max_new_tokens": 12, "details": true,
        "decoder_input_details": true, "ignore_eos_token": true});
    let answer =
        server.post("/generate", &json!({"inputs": prompt, "parameters": parameters})).await.unwrap();
    let body: Value = answer.error_for_status().unwrap().json().await.unwrap();
    let all = |name: &str| body["details"][name].as_array().unwrap().clone();
    let tokens = all("tokens");
    let ids = tokens.iter().map(|token| token["id"].as_u64().unwrap()).collect();
    // Nothing predicts the first token of the prompt.
    let scored = all("prefill").into_iter().skip(1).chain(tokens);
    (ids, scored.map(|token| token["logprob"].as_f64().unwrap()).collect())
}

/// The whole text of a streamed answer.
async fn streamed(server: &Server, adapter: Option<&str>, prompt: &str) -> String {
    let parameters = json!({"adapter_id": adapter, "max_new_tokens": 12, "ignore_eos_token": true});
    let answer = server.post("/generate_stream", &json!({"inputs": prompt, "parameters": parameters})).await;
    let body = answer.unwrap().error_for_status().unwrap().text().await.unwrap();
    let last = body.lines().filter_map(|line| line.strip_prefix("data:")).next_back().unwrap();
    let event: Value = serde_json::from_str(last).unwrap();
    event["generated_text"].as_str().unwrap_or_else(|| panic!("{body}")).to_owned()
}

fn prompts() -> Vec<(Option<&'static str>, String)> {
    let prompt = |i: usize| format!("{i} {}", "The Licensor and its affiliates ".repeat(1 + i % 4));
    (0..16).map(|i| (NAMES[i % NAMES.len()], prompt(i))).collect()
}

/// f32: the ranks add in another order than one rank does, which is all that differs.
#[tokio::test]
async fn several_ranks_answer_what_one_answers() {
    let one = start(1, &["--dtype", "float32"]);
    let mut expected = Vec::new();
    for (adapter, prompt) in prompts() {
        let text = streamed(&one, adapter, &prompt).await;
        expected.push((scores(&one, adapter, &prompt).await, text));
    }
    drop(one);
    for ranks in [2, 4] {
        let mut server = start(ranks, &["--dtype", "float32"]);
        assert_eq!(server.ranks().unwrap().len(), ranks);
        assert_eq!(server.metric("lorax_connected_ranks").await.unwrap(), ranks as f64);
        let asked = prompts();
        let together = join_all(asked.iter().map(|(adapter, prompt)| scores(&server, *adapter, prompt)));
        let texts = join_all(asked.iter().map(|(adapter, prompt)| streamed(&server, *adapter, prompt)));
        let (together, texts) = tokio::join!(together, texts);
        for (i, ((tokens, scores), text)) in together.iter().zip(texts).enumerate() {
            let ((expected_tokens, expected_scores), expected_text) = &expected[i];
            assert_eq!(tokens, expected_tokens, "{ranks} ranks, request {i}");
            assert_eq!(&text, expected_text, "{ranks} ranks, request {i}, streamed");
            assert_near(scores, expected_scores, 1e-3);
        }
        assert_eq!(server.terminate().unwrap().code(), Some(0));
    }
}

fn assert_near(scores: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(scores.len(), expected.len());
    for (at, (score, expected)) in scores.iter().zip(expected).enumerate() {
        assert!((score - expected).abs() < tolerance, "token {at}: {score} instead of {expected}");
    }
}

/// bf16 rounds so much that close tokens may change places: only prompts are compared, which are the same.
#[tokio::test]
async fn prompts_have_the_same_log_probabilities_in_bf16() {
    let one = start(1, &[]);
    let two = start(2, &[]);
    for (adapter, prompt) in prompts().into_iter().take(NAMES.len()) {
        let ((_, expected), (_, scores)) =
            tokio::join!(self::scores(&one, adapter, &prompt), self::scores(&two, adapter, &prompt));
        let prompt = expected.len() - 12;
        assert_near(&scores[..prompt], &expected[..prompt], 0.1);
    }
}

#[test]
fn a_model_that_does_not_divide_is_refused_with_the_numbers() {
    let tiny = fixtures().join("tiny");
    let own = ["--num-shard", "3", "--kv-memory", "16MiB"];
    let refused = Server::start_with(&tiny.join("model"), &tiny.join("adapters"), &own).err().unwrap();
    let said = refused.to_string();
    assert!(
        said.contains("4 query heads") && said.contains('3') && said.contains("could not start"),
        "{said}"
    );
}

/// A server whose ranks are ended.
struct Victim {
    server: Server,
    model: TempDir,
    _adapters: TempDir,
}

/// What a victim is doing when one of its ranks ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    /// The ranks read the model.
    Load,
    /// All ranks but the last have read it, and wait for that one.
    Loaded,
    /// The ranks have just read it, and warm up.
    WarmUp,
    /// Adapters are read and loaded into slots.
    Adapters,
    /// Long prompts are computed in small pieces.
    Prefill,
    /// All streams have begun.
    Decode,
}

/// The value of `--step-timeout`, and the time beyond it in which those in flight must have an answer.
const LIMIT: Duration = Duration::from_secs(3);
const BEYOND: Duration = Duration::from_secs(3);
/// Time for a server of this model to be ready again. It includes the launcher's wait, which doubles with each life.
const READY: Duration = Duration::from_secs(20);

impl Victim {
    /// With a model of its own, whose files can be changed, and adapters of which none has been loaded.
    fn start(ranks: usize) -> Victim {
        let (model, adapters) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for file in fs::read_dir(fixtures().join("tiny/model")).unwrap().map(Result::unwrap) {
            fs::copy(file.path(), model.path().join(file.file_name())).unwrap();
        }
        for i in 0..8 {
            TINY.write_adapter(&adapters.path().join(format!("a{i}")), 256, &ALL_SITES, i).unwrap();
        }
        // Prompts of 400 tokens take hundreds of steps. With a type, ranks read the model's configuration only after they
        // have met.
        let flags = [
            ["--step-timeout", "3"],
            ["--max-batch-prefill-tokens", "4"],
            ["--prefix-caching", "false"],
            ["--dtype", "bfloat16"],
        ]
        .concat();
        let server = start_with(model.path(), adapters.path(), ranks, &flags);
        Victim { server, model, _adapters: adapters }
    }

    /// Ends a rank in a phase, and checks what becomes of the requests in flight and of the processes.
    async fn lose(&mut self, rank: usize, signal: &str, phase: Phase) {
        let begun = Instant::now();
        match phase {
            Phase::WarmUp => self.lose_while_warming_up(rank, signal),
            Phase::Load | Phase::Loaded => self.lose_while_loading(rank, signal, phase).await,
            _ => self.lose_under_load(rank, signal, phase).await,
        }
        self.server.until("connected to the model").unwrap();
        let answer = self.server.tokens(Some("a0"), "Licensor", 4).await.unwrap();
        assert_eq!(answer.len(), 4);
        assert!(begun.elapsed() < LIMIT + BEYOND + READY, "{phase:?}, {signal}: {:?}", begun.elapsed());
        eprintln!("{phase:?}, {signal} of rank {rank}: ready again after {:?}", begun.elapsed());
    }

    async fn lose_under_load(&mut self, rank: usize, signal: &str, phase: Phase) {
        let pids = self.server.ranks().unwrap();
        let asked = join_all((0..16).map(|i| {
            let adapter = (phase == Phase::Adapters).then(|| format!("a{}", i % 8));
            let (prompt, count) =
                if phase == Phase::Prefill { ("x ".repeat(200), 100) } else { ("x".into(), 450) };
            let parameters =
                json!({"adapter_id": adapter, "max_new_tokens": count, "ignore_eos_token": true});
            let body = json!({"inputs": prompt, "parameters": parameters});
            let server = &self.server;
            async move { server.post("/generate_stream", &body).await.unwrap() }
        }));
        let (ended, streams) = match phase {
            // Nobody has a first token, and nobody an answer's head, before its first event.
            Phase::Prefill | Phase::Adapters => {
                let ends = async {
                    match phase {
                        Phase::Prefill => drop(
                            self.server
                                .until_metric("lorax_kv_blocks{state=\"used\"}", |used| used > 16.0)
                                .await
                                .unwrap(),
                        ),
                        _ => drop(self.server.until("adapter ready in host memory").unwrap()),
                    }
                    Server::signal(pids[rank], signal).unwrap();
                    Instant::now()
                };
                tokio::join!(ends, asked)
            }
            _ => {
                let mut streams = asked.await;
                for stream in &mut streams {
                    assert!(stream.chunk().await.unwrap().unwrap().starts_with(b"data:"));
                }
                Server::signal(pids[rank], signal).unwrap();
                (Instant::now(), streams)
            }
        };
        let read = async |stream: Response| {
            let status = stream.status();
            let text = stream.text().await.unwrap();
            (status, text, ended.elapsed())
        };
        let mut told = Vec::new();
        for (status, text, after) in join_all(streams.into_iter().map(read)).await {
            let unavailable = text.contains("\"error_type\":\"unavailable\"");
            let answered = status == StatusCode::OK && text.contains("\"generated_text\":\"");
            let refused = unavailable && [StatusCode::OK, StatusCode::SERVICE_UNAVAILABLE].contains(&status);
            assert!(answered || refused, "{status}: {text}");
            told.extend(unavailable.then_some(after));
        }
        // Requests that wait for their adapter go on with the next group.
        let last = told.iter().max();
        assert!(last.is_some(), "{phase:?}: every request has ended before");
        assert!(last < Some(&(LIMIT + BEYOND)), "{phase:?}: told after {last:?}");
        // The port is open all the time.
        let meanwhile = self.server.post("/generate", &json!({"inputs": "x"})).await.unwrap().status();
        assert!([StatusCode::OK, StatusCode::SERVICE_UNAVAILABLE].contains(&meanwhile), "{meanwhile}");
        self.all_are_gone(&pids, rank, signal);
    }

    /// Kills the router while steps are in flight, of which it may have sent one to some of the ranks only.
    async fn lose_router(&mut self) {
        let server = &self.server;
        let body = json!({"inputs": "x ".repeat(200), "parameters": {"max_new_tokens": 100}});
        let asked = join_all((0..8).map(|_| server.post("/generate", &body)));
        let kills = async {
            server.until_metric("lorax_kv_blocks{state=\"used\"}", |used| used > 8.0).await.unwrap();
            Server::signal(server.children("lorax-router").unwrap()[0], "-KILL").unwrap();
        };
        tokio::join!(asked, kills);
        // The next router has a port of its own, as the system chooses it.
        let line = server.until("listening on ").unwrap();
        let address = line.split_once("listening on ").unwrap().1.trim().to_owned();
        self.server.url = format!("http://{address}");
        assert_eq!(self.server.tokens(Some("a0"), "Licensor", 4).await.unwrap().len(), 4);
    }

    async fn lose_while_loading(&mut self, rank: usize, signal: &str, phase: Phase) {
        // The next life of the ranks waits for the model's configuration.
        let (path, aside) = (self.model.path().join("config.json"), self.model.path().join("aside.json"));
        fs::rename(&path, &aside).unwrap();
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        let before = self.server.ranks().unwrap();
        Server::signal(before[0], "-KILL").unwrap();
        self.all_are_gone(&before, 0, "-KILL");
        let mut pipe = reader_of(path.clone()).await;
        let pids = self.server.ranks().unwrap();
        let last = pids.len() - 1;
        if phase == Phase::Loaded {
            Server::signal(pids[last], "-STOP").unwrap();
        }
        let text = fs::read(&aside).unwrap();
        fs::rename(&aside, &path).unwrap();
        if phase == Phase::Loaded {
            // Those that have opened the pipe read it, and the others find the file.
            pipe.write_all(&text).unwrap();
            drop(pipe);
            self.server.until("shard-0 | ").unwrap();
            self.server.until("loading weights: 100 %").unwrap();
        } else {
            assert_eq!(self.server.post("/generate", &json!({"inputs": "x"})).await.unwrap().status(), 503);
        }
        Server::signal(pids[rank], signal).unwrap();
        self.all_are_gone(
            &pids,
            if phase == Phase::Loaded && signal == "-STOP" { last } else { rank },
            signal,
        );
    }

    fn lose_while_warming_up(&mut self, rank: usize, signal: &str) {
        let before = self.server.ranks().unwrap();
        Server::signal(before[0], "-KILL").unwrap();
        self.all_are_gone(&before, 0, "-KILL");
        self.server.until("loading weights: 100 %").unwrap();
        let pids = self.server.ranks().unwrap();
        Server::signal(pids[rank], signal).unwrap();
        self.all_are_gone(&pids, rank, signal);
    }

    /// Waits until a group has ended because of a rank, and checks that nothing of it is left.
    fn all_are_gone(&self, pids: &[u32], rank: usize, signal: &str) {
        let cause = if signal == "-STOP" { "hangs (no sign of life" } else { "ended (signal: 9" };
        self.server.until(&format!("shard-{rank} {cause}")).unwrap();
        self.server.until("restarting in").unwrap();
        for pid in pids {
            // Its memory ends with it, also what it shares.
            assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{pid}");
        }
    }
}

/// Waits until somebody reads a pipe.
async fn reader_of(path: PathBuf) -> File {
    spawn_blocking(move || OpenOptions::new().write(true).open(path).unwrap()).await.unwrap()
}

const UNDER_LOAD: [Phase; 3] = [Phase::Decode, Phase::Prefill, Phase::Adapters];

#[tokio::test]
async fn a_rank_that_is_killed_under_load_is_replaced() {
    let mut victim = Victim::start(4);
    for (rank, phase) in [3, 0, 1].into_iter().zip(UNDER_LOAD) {
        victim.lose(rank, "-KILL", phase).await;
    }
    assert_eq!(victim.server.terminate().unwrap().code(), Some(0));
}

#[tokio::test]
async fn a_rank_that_ends_while_it_warms_up_is_replaced() {
    for (rank, signal) in [(2, "-KILL"), (0, "-STOP")] {
        let mut victim = Victim::start(4);
        victim.lose(rank, signal, Phase::WarmUp).await;
        assert_eq!(victim.server.terminate().unwrap().code(), Some(0), "{signal}");
    }
}

#[tokio::test]
async fn a_rank_that_is_suspended_under_load_is_replaced() {
    let mut victim = Victim::start(2);
    for (rank, phase) in [1, 0, 1].into_iter().zip(UNDER_LOAD) {
        victim.lose(rank, "-STOP", phase).await;
    }
    victim.lose_router().await;
    assert_eq!(victim.server.terminate().unwrap().code(), Some(0));
}

#[tokio::test]
async fn a_rank_that_ends_while_a_model_is_loaded_is_replaced() {
    for signal in ["-KILL", "-STOP"] {
        let mut victim = Victim::start(2);
        victim.lose(1, signal, Phase::Load).await;
        // The last rank is suspended in this phase.
        victim.lose(if signal == "-STOP" { 1 } else { 0 }, signal, Phase::Loaded).await;
        assert_eq!(victim.server.terminate().unwrap().code(), Some(0), "{signal}");
    }
}

/// Not even a rank that is suspended stays when the launcher is killed.
#[tokio::test]
async fn no_rank_outlives_the_launcher() {
    let mut server = start(4, &[]);
    let pids = server.ranks().unwrap();
    Server::signal(pids[2], "-STOP").unwrap();
    server.kill().unwrap();
    Server::until_gone(&pids).await.unwrap();
}

/// The CPUs on which the step thread of a shard may run, and those of this test.
fn cpus(pid: u32) -> (String, String) {
    let allowed = |task: &Path| {
        let status = fs::read_to_string(task.join("status")).unwrap();
        status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:\t")).unwrap().to_owned()
    };
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap().path());
    let is_engine = |task: &PathBuf| fs::read_to_string(task.join("comm")).unwrap().trim() == "engine";
    let engine = tasks.into_iter().find(is_engine).unwrap();
    (allowed(&engine), allowed(Path::new("/proc/self")))
}

#[test]
fn ranks_divide_the_cores_unless_they_are_told_not_to() {
    let cores = std::thread::available_parallelism().unwrap().get();
    for (flags, pinned) in [(&[][..], cores > 1), (&["--pin-cpus", "false"], false)] {
        let server = start(2, flags);
        let ranks = server.ranks().unwrap();
        let ((first, all), (second, _)) = (cpus(ranks[0]), cpus(ranks[1]));
        assert_eq!(
            (first != all, second != all, first != second),
            (pinned, pinned, pinned),
            "{first} {second} of {all}"
        );
    }
}
