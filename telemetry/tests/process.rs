//! A process goes on, whatever becomes of its log. This program runs itself as that process.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    process::{Child, Command, ExitCode, Stdio},
    sync::mpsc::sync_channel,
    thread,
    time::Duration,
};

/// How the process that is tested is told what to do.
const ROLE: &str = "TELEMETRY_TEST_ROLE";
/// Lines of a process that logs a lot: more than a pipe and the queue hold.
const MANY: usize = 20_000;
/// Told by a process that has logged as many.
const WRITTEN: &[u8] = b"written\n";
/// What a process gets to end; it takes up to two seconds.
const END: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    match std::env::var(ROLE) {
        Ok(role) => play(&role),
        Err(_) => {
            all_is_written_before_the_end();
            panics_are_logged();
            a_reader_that_stalls_stops_nobody();
            a_reader_that_has_gone_ends_nobody();
            lines_of_others_are_passed_on();
            dropped_lines_are_counted();
            levels_are_those_that_were_asked_for();
            ExitCode::SUCCESS
        }
    }
}

/// The process that is tested.
fn play(role: &str) -> ExitCode {
    let log = match telemetry::start(role == "json") {
        Ok(log) => log,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(if error.is_usage() { 64 } else { 1 });
        }
    };
    match role {
        "panics" => {
            let panicked = thread::Builder::new().name("engine".into()).spawn(|| panic!("a bug")).unwrap();
            assert!(panicked.join().is_err());
        }
        "passes on" => {
            let lines = log.lines();
            lines.write("shard-0 | ", b"a line");
            lines.write("", b"not \xff text");
        }
        "drops" => {
            let lines = log.lines();
            for _ in 0..MANY {
                lines.write("", &[b'x'; 100]);
            }
            io::stdout().write_all(WRITTEN).unwrap();
            // The test has read enough of the log for further lines to have room.
            std::io::stdin().read_exact(&mut [0]).unwrap();
            lines.write("", b"the last one");
        }
        "levels" => {
            tracing::error!("an error");
            tracing::warn!("a warning");
            tracing::info!("an info");
            tracing::debug!("a debug");
        }
        _ => (0..MANY).for_each(|i| tracing::info!("line {i}")),
    }
    drop(log);
    io::stdout().write_all(b"done\n").unwrap();
    ExitCode::SUCCESS
}

fn start(role: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .env(ROLE, role)
        .env_remove("LOG_LEVEL")
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Fails the test unless the process ends in order, and in time.
fn ends(mut child: Child) {
    let (ended, end) = sync_channel(1);
    let id = child.id().to_string();
    let waiting = thread::spawn(move || {
        let mut said = String::new();
        child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        let status = child.wait().unwrap();
        let _ = ended.send(());
        (status, said)
    });
    if end.recv_timeout(END).is_err() {
        Command::new("kill").args(["-9", &id]).status().unwrap();
        panic!("the process hangs");
    }
    let (status, said) = waiting.join().unwrap();
    assert_eq!(status.code(), Some(0));
    assert!(said.ends_with("done\n"), "{said}");
}

fn all_is_written_before_the_end() {
    for role in ["text", "json"] {
        let mut child = start(role);
        let lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let mut last = 0;
        for (i, line) in lines.enumerate() {
            let line = line.strip_suffix('}').unwrap_or(&line);
            let (head, number) = line.split_once("line ").unwrap();
            assert!(head.contains("INFO"), "{line}");
            last = number.split('"').next().unwrap().parse().unwrap();
            assert!(last >= i, "in order: {line}");
        }
        // The queue drops what a slow reader leaves no room for, but not the last lines when there is room.
        assert!(last > 0);
        ends(child);
    }
}

fn panics_are_logged() {
    let mut child = start("panics");
    let mut log = String::new();
    child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    ends(child);
    assert!(log.contains("ERROR") && log.contains("thread \"engine\" panicked at"), "{log}");
    assert!(log.contains("process.rs") && log.contains("a bug"), "{log}");
    assert_eq!(log.lines().count(), 1, "{log}");
}

fn a_reader_that_stalls_stops_nobody() {
    let mut child = start("text");
    let _unread = child.stderr.take();
    ends(child);
}

fn a_reader_that_has_gone_ends_nobody() {
    for role in ["text", "panics"] {
        let mut child = start(role);
        drop(child.stderr.take());
        ends(child);
    }
}

fn lines_of_others_are_passed_on() {
    let mut child = start("passes on");
    let mut log = Vec::new();
    child.stderr.take().unwrap().read_to_end(&mut log).unwrap();
    ends(child);
    assert_eq!(log, b"shard-0 | a line\nnot \xff text\n");
}

fn dropped_lines_are_counted() {
    let mut child = start("drops");
    let mut said = [0; WRITTEN.len()];
    child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(said, WRITTEN);
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(log.by_ref().take(MANY / 4).all(|line| line.starts_with('x')));
    child.stdin.take().unwrap().write_all(b"go").unwrap();
    let rest: Vec<_> = log.collect();
    ends(child);
    let told: Vec<usize> = rest
        .iter()
        .filter_map(|line| {
            line.split_once(" lines of the log were dropped")?.0.rsplit(' ').next()?.parse().ok()
        })
        .collect();
    let written = MANY / 4 + rest.iter().filter(|line| line.starts_with('x')).count();
    // Lines that tell of it can be dropped, too, and are counted.
    assert!((MANY - written..MANY).contains(told.last().unwrap()), "{told:?} of {written}");
    assert!(rest.iter().any(|line| line == "the last one"));
}

fn levels_are_those_that_were_asked_for() {
    for (level, lines) in [
        ("off", 0),
        ("OFF", 0),
        ("error", 1),
        ("ERROR", 1),
        ("critical", 1),
        ("Fatal", 1),
        ("warn", 2),
        ("warning", 2),
        ("WARNING", 2),
        ("Warning ", 2),
        ("info", 3),
        ("INFO", 3),
        ("debug", 4),
        ("DEBUG", 4),
        ("trace", 4),
        ("off,process=error", 1),
        ("error, process=WARNING", 2),
        ("warning,other=debug", 2),
        ("", 3),
        (" ", 3),
    ] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let out = command.env(ROLE, "levels").env("LOG_LEVEL", level).output().unwrap();
        assert!(out.status.success());
        let log = String::from_utf8(out.stderr).unwrap();
        assert_eq!(log.lines().count(), lines, "{level:?}: {log}");
    }
    for level in [
        "junk",
        "warnings",
        "20",
        "-1",
        "verbose",
        "info,",
        "info debug",
        "process",
        "process=loud",
        "a=b=c,,[",
        "[=info",
    ] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let out = command.env(ROLE, "levels").env("LOG_LEVEL", level).output().unwrap();
        let log = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(64), "{level:?}: {log}");
        assert!(log.starts_with("LOG_LEVEL: "), "{log}");
    }
}
