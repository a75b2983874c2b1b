//! A process that loses a part of itself ends, and says which part. This program runs itself as that process.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{self, Read},
    process::{Command, ExitCode, Output, Stdio},
    time::{Duration, Instant},
};

use lifecycle::{
    EX_SOFTWARE, EX_UNAVAILABLE, EX_USAGE, Failure, HEARTBEAT, Parent, SERVING, STARTING, Supervisor,
};
use tokio::signal::unix::{SignalKind, signal};

/// How the process that is tested is told what to do.
const ROLE: &str = "LIFECYCLE_TEST_ROLE";
/// What a process may take to end after one of its parts failed.
const PROMPT: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    match std::env::var(ROLE) {
        Ok(role) => play(&role),
        Err(_) => {
            failures_end_the_process();
            the_end_of_stdin_ends_the_process();
            a_process_can_end_without_giving_anything_back();
            errors_are_printed_with_their_causes();
            a_heartbeat_goes_on_while_the_process_does();
            ExitCode::SUCCESS
        }
    }
}

/// A log whose reader has stalled.
fn hang() {
    loop {
        std::thread::park();
    }
}

/// Memory that is never given back.
struct Locked;

impl Drop for Locked {
    fn drop(&mut self) {
        hang();
    }
}

/// The process that is tested.
fn play(role: &str) -> ExitCode {
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    lifecycle::before_exit(if role == "cannot write its log" { hang } else { || eprintln!("last lines") });
    if role == "fails" {
        lifecycle::fail(EX_USAGE, &io::Error::other("no such flag"));
    }
    let supervisor = Supervisor::ending_the_process().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let parent = Parent::link().unwrap();
    if role == "waits" {
        hang();
    }
    // As a server has it: on the stack, and in what others share.
    let locked = (role.starts_with("holds")).then(|| (Locked, std::sync::Arc::new(Locked)));
    runtime.block_on(async move {
        let stopped = parent.told_to_stop().unwrap();
        let pulse = supervisor.watch("the hanging one", Duration::from_millis(300));
        match role {
            "task panics" | "cannot write its log" => {
                drop(supervisor.task("the engine", PROMPT, async { panic!("a bug") }))
            }
            "thread panics" => drop(supervisor.thread("the engine", || panic!("a bug")).unwrap()),
            "task returns" => drop(supervisor.task("the engine", PROMPT, async {})),
            "thread returns" => drop(supervisor.thread("the engine", || {}).unwrap()),
            "hangs" => pulse.busy(),
            "loses" => {
                let cause = "the other one has ended".to_owned();
                supervisor.report(Failure::Lost { name: "the engine".into(), cause });
            }
            "task hangs" => drop(supervisor.task("the engine", PROMPT / 10, async { hang() })),
            "engine hangs" => drop(supervisor.runtime("the engine", PROMPT / 10, async { hang() }).unwrap()),
            "serves" => {
                // The parent has seen it start.
                signal(SignalKind::user_defined1()).unwrap().recv().await;
                parent.serving();
            }
            _ => {}
        }
        if role == "holds it in a task" {
            let held = locked.as_ref().map(|(_, shared)| shared.clone());
            drop(supervisor.task("the engine", PROMPT, async move {
                std::future::pending::<()>().await;
                drop(held);
            }));
        }
        stopped.await;
        if role.starts_with("holds") {
            supervisor.stopping();
            lifecycle::end_now(0);
        }
    });
    ExitCode::SUCCESS
}

fn command(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(ROLE, role).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs to the end with stdin open.
fn run(role: &str) -> (Output, Duration) {
    let started = Instant::now();
    let mut child = command(role).spawn().unwrap();
    let held = child.stdin.take();
    let out = child.wait_with_output().unwrap();
    drop(held);
    (out, started.elapsed())
}

fn failures_end_the_process() {
    for (role, line) in [
        ("task panics", "the engine panicked: a bug: ending the process"),
        ("thread panics", "the engine panicked: a bug: ending the process"),
        ("task returns", "the engine has ended, which it must not while the process runs"),
        ("thread returns", "the engine has ended, which it must not while the process runs"),
        ("hangs", "the hanging one has made no progress for"),
        ("task hangs", "the engine has made no progress for"),
        ("engine hangs", "the engine has made no progress for"),
    ] {
        let (out, took) = run(role);
        let log = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(EX_SOFTWARE), "{role}: {log}");
        assert!(log.contains(line) && log.ends_with("last lines\n"), "{role}: {log}");
        assert!(took < PROMPT, "{role}: {took:?}");
    }
    let (out, _) = run("loses");
    let log = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(EX_UNAVAILABLE), "{log}");
    assert!(log.contains("the engine cannot go on: the other one has ended: ending the process"), "{log}");
    let (out, took) = run("cannot write its log");
    assert_eq!(out.status.code(), Some(EX_SOFTWARE));
    assert!(took < PROMPT, "{took:?}");
}

fn the_end_of_stdin_ends_the_process() {
    for role in ["waits", "runs"] {
        let mut child = command(role).spawn().unwrap();
        drop(child.stdin.take());
        assert_eq!(child.wait().unwrap().code(), Some(0), "{role}");
    }
}

fn a_process_can_end_without_giving_anything_back() {
    for role in ["holds", "holds it in a task"] {
        let mut child = command(role).spawn().unwrap();
        let started = Instant::now();
        drop(child.stdin.take());
        let out = child.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{role}");
        assert_eq!(String::from_utf8(out.stderr).unwrap(), "last lines\n", "{role}");
        assert!(started.elapsed() < PROMPT, "{role}");
    }
}

fn errors_are_printed_with_their_causes() {
    let (out, _) = run("fails");
    assert_eq!(out.status.code(), Some(EX_USAGE));
    assert_eq!(String::from_utf8(out.stderr).unwrap(), "last lines\nerror: no such flag\n");
}

fn a_heartbeat_goes_on_while_the_process_does() {
    let mut child = command("serves").spawn().unwrap();
    let (mut beats, started) = ([0; 3], Instant::now());
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut beats).unwrap();
    assert_eq!(beats, [STARTING; 3]);
    assert!(started.elapsed() >= 2 * HEARTBEAT, "the first at once, the others after a time each");
    let told = Command::new("kill").args(["-USR1", &child.id().to_string()]).status();
    assert!(told.unwrap().success());
    while beats[0] == STARTING {
        stdout.read_exact(&mut beats[..1]).unwrap();
    }
    stdout.read_exact(&mut beats).unwrap();
    assert_eq!(beats, [SERVING; 3]);
    // The process outlives whoever counts.
    drop(stdout);
    drop(child.stdin.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
