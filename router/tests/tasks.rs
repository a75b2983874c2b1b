//! A router that loses one of its tasks ends, and says which. This program runs itself as that router, which is the
//! product's own but for one task: on a signal it panics, hangs or returns where it runs.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "most of it is for tests in this process")]
#[path = "http/router.rs"]
mod router;
#[allow(dead_code, reason = "as above")]
#[path = "http/shard.rs"]
mod shard;

use std::{
    collections::BTreeSet,
    process::{ExitCode, Stdio},
    time::{Duration, Instant},
};

use config::Config;
use futures::{
    FutureExt,
    future::{BoxFuture, join_all},
};
use lifecycle::{EX_SOFTWARE, Supervisor};
use reqwest::Client;
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStderr, Command},
    signal::unix::{SignalKind, signal},
    time::timeout,
};

use router::{PATIENCE, configuration, tokens};
use shard::{Script, ScriptedShard};

/// How the router that is tested is told which of its tasks fails, and how.
const TASK: &str = "ROUTER_TEST_TASK";
const FAULT: &str = "ROUTER_TEST_FAULT";
const CONFIG: &str = "ROUTER_TEST_CONFIG";
/// What it prints when the task runs and waits for the signal.
const ARMED: &str = "the task is armed";
/// What it prints in front of the name of each task.
const STARTED: &str = "the test sees ";

/// All tasks of a router.
const TASKS: [&str; 8] = [
    "accept loop",
    "adapters",
    "engine",
    "key file watcher",
    "metrics upkeep",
    "start-up",
    "start-up message",
    "validation workers",
];
/// Every fault, and what the log says of it after the task's name.
const FAULTS: [(&str, &str); 3] = [
    ("panics", " panicked: the test's panic: ending the process"),
    ("hangs", " has made no progress for 1."),
    ("returns", " has ended, which it must not while the process runs"),
];

/// What a poll of a task may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(1);
/// What a process may take to end after one of its parts failed.
const PROMPT: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    if let (Ok(task), Ok(fault)) = (std::env::var(TASK), std::env::var(FAULT)) {
        return play(task, fault);
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        for task in TASKS {
            join_all(FAULTS.map(|(fault, line)| each_task_that_fails_ends_the_process(task, fault, line)))
                .await;
        }
    });
    ExitCode::SUCCESS
}

/// The router that is tested.
fn play(victim: String, fault: String) -> ExitCode {
    let config = Config::read(std::env::var_os(CONFIG).unwrap().as_ref()).unwrap();
    let _log = telemetry::start(false).unwrap();
    lifecycle::before_exit(telemetry::flush);
    let supervisor = Supervisor::ending_the_process().unwrap().layer(move |name, task| {
        tracing::info!("{STARTED}{name}");
        if name == victim { failing(task, fault.clone()) } else { task }
    });
    lorax_router::run(config, &supervisor).unwrap();
    ExitCode::SUCCESS
}

/// A task that fails on SIGUSR1.
fn failing(task: BoxFuture<'static, ()>, fault: String) -> BoxFuture<'static, ()> {
    async move {
        let mut told = signal(SignalKind::user_defined1()).unwrap();
        tracing::info!("{ARMED}");
        tokio::select! {
            () = task => return,
            told = told.recv() => told.unwrap(),
        }
        match &*fault {
            "panics" => panic!("the test's panic"),
            "returns" => {}
            "hangs" => loop {
                std::thread::park();
            },
            _ => unreachable!("{fault}"),
        }
    }
    .boxed()
}

/// The router that is tested, as its parent sees it.
struct Program {
    process: Child,
    log: Lines<BufReader<ChildStderr>>,
    lines: Vec<String>,
}

impl Program {
    fn start(config: &std::path::Path, task: &str, fault: &str) -> Program {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .envs([(TASK, task), (FAULT, fault), ("LOG_LEVEL", "info")])
            .env(CONFIG, config)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let log = BufReader::new(process.stderr.take().unwrap()).lines();
        Program { process, log, lines: Vec::new() }
    }

    /// Reads the log until each of these has been said.
    async fn says(&mut self, texts: &[&str]) {
        while !texts.iter().all(|text| self.lines.iter().any(|line| line.contains(text))) {
            let line = timeout(PATIENCE, self.log.next_line()).await.unwrap().unwrap();
            self.lines.push(line.unwrap_or_else(|| panic!("{texts:?}: {:#?}", self.lines)));
        }
    }

    /// What follows a text in the log.
    fn after(&self, text: &str) -> impl Iterator<Item = &str> {
        self.lines.iter().filter_map(move |line| Some(line.split_once(text)?.1.trim()))
    }
}

/// Kills a task while the router streams an answer.
async fn each_task_that_fails_ends_the_process(task: &str, fault: &str, line: &str) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("shard.sock");
    let mut script = Script::saying(tokens("a").repeat(10_000));
    script.pace = Some(Duration::from_millis(20));
    let _shard = ScriptedShard::start(script, &socket);
    let mut config = configuration(&socket);
    config.router.step_timeout = Some(STEP_TIMEOUT);
    let file = folder.path().join("config.json");
    config.write(&file).unwrap();
    let mut program = Program::start(&file, task, fault);
    program.says(&[ARMED, "listening on "]).await;
    let names: BTreeSet<_> = program.after(STARTED).collect();
    assert_eq!(names, TASKS.into(), "each task has its tests");
    let address = program.after("listening on ").next().unwrap().to_owned();
    let body = json!({"inputs": "x", "parameters": {"max_new_tokens": 3000}});
    let request = Client::new().post(format!("http://{address}/generate_stream")).json(&body);
    let mut answer = request.send().await.unwrap();
    assert!(answer.chunk().await.unwrap().is_some(), "it has begun");
    let id = program.process.id().unwrap().to_string();
    let begun = Instant::now();
    assert!(Command::new("kill").args(["-USR1", &id]).status().await.unwrap().success());
    program.says(&[&format!("{task}{line}")]).await;
    // Until then its stdin is open.
    let stdin = program.process.stdin.take();
    let status = timeout(PATIENCE, program.process.wait()).await.unwrap().unwrap();
    let took = begun.elapsed();
    drop(stdin);
    assert_eq!(status.code(), Some(EX_SOFTWARE), "{task} {fault}: {:#?}", program.lines);
    let limit = if fault == "hangs" { STEP_TIMEOUT + PROMPT } else { PROMPT };
    assert!(took < limit, "{task} {fault}: {took:?}");
    // Its answer is cut off.
    while let Ok(Some(_)) = timeout(PATIENCE, answer.chunk()).await.unwrap() {}
}
