//! Processes that share a folder, fail and are killed. This program runs itself as those processes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeSet,
    fs::{self, File},
    hint::spin_loop,
    io::{self, BufRead, BufReader, Read, Write},
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use rustix::process::{Resource, Rlimit, Signal, getpid, kill_process, setrlimit};
use signal_hook::consts::SIGXFSZ;
use store::{Deletion, Store, StoreError, content_of};

/// How a process is told what to do.
const ROLE: &str = "STORE_TEST_ROLE";
/// Bytes of the folder.
const LIMIT: u64 = 40_000;
/// Processes that are killed, in pairs.
const ROUNDS: u64 = 50;
const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";

fn main() -> ExitCode {
    if let Ok(role) = std::env::var(ROLE) {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        play(&role, Path::new(&arguments[0]), arguments[1].parse().unwrap(), arguments[2].parse().unwrap());
        return ExitCode::SUCCESS;
    }
    nothing_is_left_of_a_process_that_is_killed();
    the_room_and_the_holds_of_a_process_end_with_it();
    processes_publish_the_same_content();
    a_disk_that_takes_no_more_bytes_leaves_nothing();
    ExitCode::SUCCESS
}

/// Runs a process on the folder, which does not begin before its stdin ends.
fn spawn(role: &str, root: &Path, seed: u64, micros: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .env(ROLE, role)
        .arg(root)
        .args([seed, micros].map(|n| n.to_string()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn say(what: &str) {
    let mut out = io::stdout().lock();
    writeln!(out, "{what}").and_then(|()| out.flush()).unwrap();
}

fn wait_for_the_end_of_stdin() {
    io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

fn play(role: &str, root: &Path, seed: u64, micros: u64) {
    match role {
        "churns" => {
            thread::spawn(move || {
                let start = Instant::now();
                while start.elapsed() < Duration::from_micros(micros) {
                    spin_loop();
                }
                kill_process(getpid(), Signal::KILL).unwrap();
            });
            churn(root, &mut StdRng::seed_from_u64(seed));
        }
        "reserves" => {
            let partial = Store::open(root, LIMIT).unwrap().reserve(LIMIT).unwrap();
            fs::write(partial.folder().join(WEIGHTS), "half of it").unwrap();
            say("reserved");
            wait_for_the_end_of_stdin();
        }
        "holds" => {
            let store = Store::open(root, LIMIT).unwrap();
            let content = store.scan().unwrap()[0].content;
            let _hold = store.hold(content).unwrap().unwrap();
            say("held");
            wait_for_the_end_of_stdin();
        }
        "publishes" => {
            let store = Store::open(root, LIMIT).unwrap();
            say("ready");
            wait_for_the_end_of_stdin();
            publish(&store, 1, seed, 4000).unwrap();
        }
        "publishes on a full disk" => {
            // The limit on the size of files fails a write as a full disk does; its signal must not end the process.
            signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))).unwrap();
            let store = Store::open(root, LIMIT).unwrap();
            setrlimit(Resource::Fsize, Rlimit { current: Some(micros), maximum: Some(micros) }).unwrap();
            let error = publish(&store, 1, 1, 50).unwrap_err();
            assert!(matches!(error, StoreError::Io { .. }), "{error}");
        }
        other => panic!("{other}"),
    }
}

fn publish(store: &Store, n: u64, version: u64, bytes: u64) -> Result<(), StoreError> {
    say("reserve");
    let partial = store.reserve(bytes + 2)?;
    say("write");
    fs::write(partial.folder().join(CONFIG), "{}").unwrap();
    let mut file = File::create(partial.folder().join(WEIGHTS)).unwrap();
    for _ in 0..10 {
        file.write_all(&vec![n as u8; (bytes / 10) as usize]).unwrap();
    }
    say("publish");
    partial.publish(wide(version), wide(version)).map(drop)
}

fn wide<const N: usize>(n: u64) -> [u8; N] {
    let mut wide = [1; N];
    wide[..8].copy_from_slice(&n.to_le_bytes());
    wide
}

/// Publishes, uses and deletes until the process is killed.
fn churn(root: &Path, random: &mut StdRng) {
    say("open");
    let store = Store::open(root, LIMIT).unwrap();
    loop {
        let n = random.random_range(0..12);
        match random.random_range(0..10) {
            0..6 => match publish(&store, n, n + 100 * random.random_range(0..3), 500 * (n + 1)) {
                Ok(()) => {}
                Err(StoreError::Full { bytes, .. }) => {
                    say("make room");
                    store.make_room(bytes).unwrap();
                }
                Err(other) => panic!("{other}"),
            },
            6..9 => {
                say("delete");
                if let Some(found) = store.scan().unwrap().first() {
                    store.delete(found.content).unwrap();
                }
            }
            _ => {
                say("hold");
                if let Some(found) = store.scan().unwrap().last() {
                    drop(store.hold(found.content).unwrap());
                }
            }
        }
    }
}

/// Names in a folder of the store.
fn names(root: &Path, folder: &str) -> Vec<String> {
    let item = |item: io::Result<fs::DirEntry>| item.unwrap().file_name().into_string().unwrap();
    fs::read_dir(root.join(folder)).unwrap().map(item).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Only whole contents whose hash is right, and nothing else.
fn assert_whole(root: &Path, case: &str) -> usize {
    let store = Store::open(root, LIMIT).unwrap();
    let entries: BTreeSet<String> = names(root, "contents").into_iter().collect();
    let found = store.scan().unwrap();
    let (mut known, mut bytes) = (BTreeSet::new(), 0);
    for one in &found {
        let open = |name: &str| File::open(store.path(one.content).join(name)).unwrap();
        let (config, weights) = (open(CONFIG), open(WEIGHTS));
        assert_eq!(content_of(&[(CONFIG, &config), (WEIGHTS, &weights)]).unwrap(), one.content, "{case}");
        assert_eq!(names(&store.path(one.content), ".").len(), 2, "{case}");
        assert_eq!(one.bytes, config.metadata().unwrap().len() + weights.metadata().unwrap().len(), "{case}");
        assert!(!one.versions.is_empty(), "{case}");
        known.extend(one.versions.iter().map(|version| hex(version)));
        bytes += one.bytes;
        assert!(store.hold(one.content).unwrap().is_some(), "{case}");
    }
    assert_eq!(
        entries,
        found.iter().map(|one| hex(&one.content)).collect(),
        "{case}: no entry had to be removed"
    );
    for folder in ["partial", "removing"] {
        assert_eq!(names(root, folder), Vec::<String>::new(), "{case}");
    }
    assert!(!root.join("new").exists(), "{case}");
    let indexed: BTreeSet<String> = names(root, "versions").into_iter().collect();
    assert!(indexed.is_subset(&known), "{case}: {indexed:?} {known:?}");
    assert!(bytes <= LIMIT, "{case}: {bytes}");
    assert_eq!(store.used().unwrap(), bytes, "{case}");
    drop(store.reserve(LIMIT - bytes).unwrap());
    found.len()
}

fn nothing_is_left_of_a_process_that_is_killed() {
    let root = tempfile::tempdir().unwrap();
    let mut random = StdRng::seed_from_u64(17);
    let (mut ends, mut most) = (BTreeSet::new(), 0);
    for round in 0..ROUNDS {
        let delays = [0; 2].map(|_| random.random_range(0..80_000));
        let children = delays.map(|micros| spawn("churns", root.path(), random.random(), micros));
        for child in children {
            let output = child.wait_with_output().unwrap();
            let signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
            assert_eq!(signal, Some(9), "{output:?}");
            let last = String::from_utf8(output.stdout).unwrap().lines().last().map(str::to_owned);
            ends.extend(last);
        }
        if root.path().join("VERSION").exists() || round > 0 {
            most = most.max(assert_whole(root.path(), &format!("round {round}, {delays:?} us")));
        }
    }
    assert!(ends.len() >= 3, "they were killed in {ends:?} only");
    assert!(most >= 1, "nothing was ever published");
}

fn the_room_and_the_holds_of_a_process_end_with_it() {
    for kill in [true, false] {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path(), LIMIT).unwrap();
        let begin = |role| {
            let mut child = spawn(role, root.path(), 0, 0);
            let mut line = String::new();
            BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
            assert!(!line.is_empty());
            child
        };
        let end = |mut child: Child| {
            if kill {
                child.kill().unwrap()
            } else {
                drop(child.stdin.take())
            }
            assert_eq!(child.wait().unwrap().success(), !kill);
        };
        let child = begin("reserves");
        drop(Store::open(root.path(), LIMIT).unwrap());
        assert!(matches!(store.reserve(1), Err(StoreError::Full { used: LIMIT, .. })), "it lives");
        assert_eq!(store.make_room(1).unwrap(), Vec::<[u8; 32]>::new());
        end(child);
        drop(store.reserve(LIMIT).unwrap());
        publish(&store, 1, 1, 100).unwrap();
        let content = store.scan().unwrap()[0].content;
        let child = begin("holds");
        assert_eq!(store.delete(content).unwrap(), Deletion::Held);
        end(child);
        assert_eq!(store.delete(content).unwrap(), Deletion::Gone);
        assert_eq!(assert_whole(root.path(), "after it has ended"), 0);
    }
}

fn processes_publish_the_same_content() {
    let root = tempfile::tempdir().unwrap();
    let mut children: Vec<Child> =
        (0..8).map(|version| spawn("publishes", root.path(), version / 2, 0)).collect();
    for child in &mut children {
        let mut line = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
        assert_eq!(&line, b"ready\n");
    }
    children.iter_mut().for_each(|child| drop(child.stdin.take()));
    children.into_iter().for_each(|child| assert!(child.wait_with_output().unwrap().status.success()));
    assert_eq!(assert_whole(root.path(), "eight publishers"), 1);
    let store = Store::open(root.path(), LIMIT).unwrap();
    assert_eq!(store.scan().unwrap()[0].versions, [0, 1, 2, 3].map(wide::<32>));
}

fn a_disk_that_takes_no_more_bytes_leaves_nothing() {
    // The weights have 50 bytes, and the record has more than 200, so it is the record that cannot be written.
    for bytes in [50, 60, 63, 100, 150, 200] {
        let root = tempfile::tempdir().unwrap();
        let output = spawn("publishes on a full disk", root.path(), 0, bytes).wait_with_output().unwrap();
        assert!(output.status.success(), "{bytes}: {output:?}");
        assert_eq!(names(root.path(), "partial"), Vec::<String>::new(), "{bytes}");
        assert_eq!(assert_whole(root.path(), "a full disk"), 0);
    }
}
