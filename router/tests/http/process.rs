//! The program itself: what it says, and how it ends.

use std::{process::Stdio, time::Duration};

use config::RouterConfig;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStderr, ChildStdin, Command},
    time::timeout,
};

use crate::{
    router::{configuration, content, tokens},
    shard::{Gate, Script, ScriptedShard},
};

/// Deadline for a program to end; it takes milliseconds.
const END: Duration = Duration::from_secs(30);

/// A router in a process of its own, in front of a scripted shard. Killed when it is dropped.
pub(crate) struct Program {
    process: Child,
    /// Held apart, because waiting for a process closes its own.
    stdin: ChildStdin,
    log: Lines<BufReader<ChildStderr>>,
    /// Lines of the log that nobody has asked for yet: threads of the program write in any order.
    passed: Vec<String>,
    pub(crate) shard: ScriptedShard,
    _folder: tempfile::TempDir,
}

impl Program {
    pub(crate) fn start(script: Script, change: impl FnOnce(&mut RouterConfig)) -> Program {
        Program::start_logging(script, change, "info")
    }

    /// Starts with another level of the log.
    pub(crate) fn start_logging(
        script: Script,
        change: impl FnOnce(&mut RouterConfig),
        level: &str,
    ) -> Program {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("shard.sock");
        let shard = ScriptedShard::start(Script { content, ..script }, &socket);
        let mut configuration = configuration(&socket);
        configuration.router.adapter_cache = Some(folder.path().join("adapter-cache"));
        change(&mut configuration.router);
        let file = folder.path().join("config.json");
        configuration.write(&file).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_lorax-router"))
            .arg("--config")
            .arg(file)
            .env("LOG_LEVEL", level)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let stdin = process.stdin.take().unwrap();
        let log = BufReader::new(process.stderr.take().unwrap()).lines();
        Program { process, stdin, log, passed: Vec::new(), shard, _folder: folder }
    }

    /// Waits for a line of the log, and returns what follows `text` in it. Lines that were passed over count, too.
    pub(crate) async fn says(&mut self, text: &str) -> String {
        let after = |line: &str| line.split_once(text).map(|(_, rest)| rest.trim().to_owned());
        if let Some(at) = self.passed.iter().position(|line| line.contains(text)) {
            return after(&self.passed.remove(at)).unwrap();
        }
        loop {
            let line =
                timeout(END, self.log.next_line()).await.unwrap_or_else(|_| panic!("no {text:?} in time"));
            let line = line.unwrap().unwrap_or_else(|| panic!("it never says {text:?}"));
            if let Some(rest) = after(&line) {
                return rest;
            }
            self.passed.push(line);
        }
    }

    /// The process's number.
    pub(crate) fn id(&self) -> u32 {
        self.process.id().unwrap()
    }

    pub(crate) async fn signal(&self, signal: &str) {
        let id = self.process.id().unwrap().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().await.unwrap().success());
    }

    /// Waits for its end, and returns its exit code.
    pub(crate) async fn ended(&mut self) -> Option<i32> {
        timeout(END, self.process.wait()).await.unwrap().unwrap().code()
    }
}

#[tokio::test]
async fn it_serves_at_once_and_says_when_the_model_is_ready() {
    let mut script = Script::saying(tokens("a"));
    script.held.insert(Gate::Info);
    let mut program = Program::start(script, |_| {});
    let line = program.says("waiting for the model; ").await;
    let address = line.split(' ').next().unwrap();
    let health = async || reqwest::get(format!("http://{address}/health")).await.unwrap().status();
    assert_eq!(health().await, 503);
    program.shard.release(&Gate::Info);
    assert_eq!(program.says("listening on ").await, address);
    assert_eq!(health().await, 200);
}

#[tokio::test]
async fn a_tokenizer_configuration_that_is_not_there_is_bad_usage() {
    let absent = |router: &mut RouterConfig| router.tokenizer_config_path = Some("/no/such.json".into());
    let mut program = Program::start(Script::saying(tokens("a")), absent);
    let cause = program.says("tokenizer-config-path: ").await;
    assert!(cause.starts_with("/no/such.json: No such file"), "{cause}");
    assert_eq!(program.ended().await, Some(64));
}

#[tokio::test]
async fn a_limit_that_does_not_fit_is_told_of() {
    let more = |router: &mut RouterConfig| router.max_total_tokens = Some(5000);
    let mut program = Program::start(Script::saying(tokens("a")), more);
    assert_eq!(program.says("max-total-tokens: ").await, "5000 do not fit, a request may have 4096");
    program.says("listening on ").await;
}

#[tokio::test]
async fn a_signal_ends_it_while_the_model_loads() {
    let mut script = Script::saying(tokens("a"));
    script.held.insert(Gate::Info);
    let mut program = Program::start(script, |_| {});
    program.says("waiting for the model").await;
    program.signal("-TERM").await;
    assert_eq!(program.ended().await, Some(0));
}

#[tokio::test]
async fn a_signal_ends_it_though_its_stdin_stays_open() {
    for signal in ["-TERM", "-INT"] {
        let mut program = Program::start(Script::saying(tokens("a")), |_| {});
        program.says("listening on ").await;
        program.signal(signal).await;
        assert_eq!(program.ended().await, Some(0), "{signal}");
    }
}

#[tokio::test]
async fn the_end_of_its_stdin_ends_it() {
    let mut program = Program::start(Script::saying(tokens("a")), |_| {});
    program.says("listening on ").await;
    let Program { mut process, stdin, .. } = program;
    drop(stdin);
    assert_eq!(timeout(END, process.wait()).await.unwrap().unwrap().code(), Some(0));
}
