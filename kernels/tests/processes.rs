//! Ranks as processes. This program runs itself again as each of them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "a rank prints what its parent waits for")]

#[path = "support/rounds.rs"]
mod rounds;

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use kernels::{Error, prelude::*};

/// How a process is told which rank it is, of how many, in which folder, and what it does.
const RANK: &str = "KERNELS_TEST_RANK";
/// How long ranks wait for one that stands still.
const PATIENCE: Duration = Duration::from_millis(1500);

fn main() -> ExitCode {
    if let Ok(told) = std::env::var(RANK) {
        return rank(&told);
    }
    for ranks in [2, 3, 4, 8] {
        sums_are_exact(ranks);
        println!("test sums_are_exact with {ranks} ranks ... ok");
    }
    for ranks in [2, 4] {
        for signal in ["KILL", "STOP"] {
            a_rank_that_is_stopped_is_named(ranks, signal);
            println!("test a rank of {ranks} after SIG{signal} ... ok");
        }
    }
    ExitCode::SUCCESS
}

/// A process that does what it was told.
fn rank(told: &str) -> ExitCode {
    let words: Vec<&str> = told.splitn(4, ' ').collect();
    let (rank, ranks) = (words[0].parse().unwrap(), words[1].parse().unwrap());
    let (rounds, folder) = (words[2].parse::<usize>().unwrap(), Path::new(words[3]));
    if rounds > 0 {
        let be = rounds::rank_of(folder, rank, ranks, rounds::PATIENCE).unwrap();
        println!("{:x}", rounds::run(&be, rounds));
        return ExitCode::SUCCESS;
    }
    // Reduces until another rank is lost.
    let be = rounds::rank_of(folder, rank, ranks, PATIENCE).unwrap();
    println!("joined");
    let mut x = be.wide_mat(4, 100).unwrap();
    loop {
        be.fill(&mut x, &[1.0; 400]).unwrap();
        match be.all_reduce(&mut x) {
            Ok(()) => assert!(be.download(&x).unwrap().iter().all(|x| *x == ranks as f32)),
            Err(error @ Error::Peer { .. }) => {
                println!("{error}");
                // Stays, so that the others do not see this one end.
                std::io::stdin().read_line(&mut String::new()).unwrap();
                return ExitCode::SUCCESS;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

struct Rank {
    process: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Rank {
    fn start(folder: &Path, rank: usize, ranks: usize, rounds: usize) -> Rank {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .env(RANK, format!("{rank} {ranks} {rounds} {}", folder.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(process.stdout.take().unwrap());
        Rank { process, out }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.process.kill();
        self.process.wait().unwrap();
    }
}

fn start(folder: &Path, ranks: usize, rounds: usize) -> Vec<Rank> {
    // Higher ranks come first, and wait for the lower ones.
    let mut started: Vec<_> = (0..ranks).rev().map(|rank| Rank::start(folder, rank, ranks, rounds)).collect();
    started.reverse();
    started
}

fn sums_are_exact(ranks: usize) {
    let folder = tempfile::tempdir().unwrap();
    let rounds = 10_000;
    let mut started = start(folder.path(), ranks, rounds);
    let hashes: Vec<_> = started.iter_mut().map(Rank::line).collect();
    assert!(hashes.iter().all(|hash| !hash.is_empty() && *hash == hashes[0]), "{hashes:?}");
    for rank in &mut started {
        assert!(rank.process.wait().unwrap().success());
    }
}

fn a_rank_that_is_stopped_is_named(ranks: usize, signal: &str) {
    let folder = tempfile::tempdir().unwrap();
    let mut started = start(folder.path(), ranks, 0);
    for rank in &mut started {
        assert_eq!(rank.line(), "joined");
    }
    let victim = ranks - 1;
    let since = Instant::now();
    let process = rustix::process::Pid::from_child(&started[victim].process);
    let number = if signal == "KILL" { rustix::process::Signal::KILL } else { rustix::process::Signal::STOP };
    rustix::process::kill_process(process, number).unwrap();
    let says =
        if signal == "KILL" { "has ended".to_owned() } else { format!("has not come within {PATIENCE:?}") };
    for rank in &mut started[..victim] {
        assert_eq!(rank.line(), format!("all_reduce: rank {victim} {says}"));
    }
    let took = since.elapsed();
    assert!(took < PATIENCE + Duration::from_secs(5), "{signal}: {took:?}");
    if signal == "KILL" {
        assert!(took < PATIENCE, "a rank that has ended is seen at once, not after {took:?}");
    }
}
