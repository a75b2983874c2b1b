//! The process itself: when it ends.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead, BufReader},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use config::{
    Config, Device, Devices, Division, LogConfig, ModelConfig, RouterConfig, ShardConfig, ShardsConfig,
};

/// A shard of a small model, with its stdin open.
fn start(folder: &Path) -> Child {
    start_with(folder, 1 << 20)
}

/// The same, with so much memory for adapters.
fn start_with(folder: &Path, adapter_host_memory: u64) -> Child {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures");
    let config = Config {
        model: ModelConfig {
            id: "tiny".into(),
            path: fixtures.join("tiny/model"),
            merged_adapter: None,
            revision: None,
            sha: None,
        },
        shards: ShardsConfig { uds: vec![folder.join("shard.sock")], rendezvous: folder.join("ranks") },
        router: RouterConfig::default(),
        shard: ShardConfig {
            device: Device::Cpu,
            threads: Some(1),
            max_batch_size: 4,
            max_active_adapters: 2,
            kv_memory: Some(1 << 20),
            adapter_host_memory,
            ..ShardConfig::default()
        },
        log: LogConfig::default(),
    };
    let path = folder.join("config.json");
    // Of an earlier start.
    let _ = std::fs::remove_file(&path);
    config.write(&path).unwrap();
    Command::new(env!("CARGO_BIN_EXE_lorax-shard"))
        .args(["--config".as_ref(), path.as_os_str()])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn a_shard_ends_with_whoever_holds_its_stdin() {
    let folder = tempfile::tempdir().unwrap();
    for served in [false, true] {
        let mut shard = start(folder.path());
        let mut log = BufReader::new(shard.stderr.take().unwrap()).lines().map(Result::unwrap);
        if served {
            assert!(log.any(|line| line.contains("serving on")));
        }
        drop(shard.stdin.take());
        assert_eq!(log.find(|line| line.starts_with("error")), None);
        assert_eq!(shard.wait().unwrap().code(), Some(0), "served: {served}");
    }
}

#[test]
fn a_shard_ends_at_once_when_it_is_told_to() {
    let folder = tempfile::tempdir().unwrap();
    for host_memory in [1 << 20, 4 << 30, 24 << 30, 100 << 30] {
        for told in ["TERM", "INT", "stdin"] {
            let mut shard = start_with(folder.path(), host_memory);
            let mut log = BufReader::new(shard.stderr.take().unwrap()).lines().map(Result::unwrap);
            assert!(log.any(|line| line.contains("serving on")));
            // A session that goes on does not keep it.
            let connection = UnixStream::connect(folder.path().join("shard.sock")).unwrap();
            let begun = Instant::now();
            let held = match told {
                "stdin" => None,
                signal => {
                    let killed = Command::new("kill").args(["-s", signal, &shard.id().to_string()]).status();
                    assert!(killed.unwrap().success());
                    shard.stdin.take()
                }
            };
            let status = shard.wait().unwrap();
            let case = format!("{host_memory} bytes, {told}: {:?}", begun.elapsed());
            assert_eq!(status.code(), Some(0), "{case}");
            // The launcher kills it after 5 s.
            assert!(begun.elapsed() < Duration::from_secs(3), "{case}");
            assert_eq!(log.find(|line| line.starts_with("error") || line.contains("ERROR")), None, "{case}");
            drop((held, connection));
        }
    }
}

#[test]
fn a_shard_that_fails_ends_though_its_stdin_is_open() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("shard.sock/in the way")).unwrap();
    let mut shard = start(folder.path());
    // To wait for a child closes its stdin.
    let held = shard.stdin.take();
    assert_eq!(shard.wait().unwrap().code(), Some(1));
    drop(held);
}

/// The launcher reads this, too. The model has 4 query heads.
#[test]
fn a_shard_says_among_how_many_ranks_a_model_can_be_divided() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/tiny/model");
    let divides = |model: &Path, more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorax-shard"));
        command.args(["--divides".as_ref(), model.as_os_str()]).args(more).output().unwrap()
    };
    for (at_most, ranks, refused) in [
        ("1", 1, None),
        ("2", 2, None),
        ("3", 2, Some(3)),
        ("4", 4, None),
        ("5", 4, Some(5)),
        ("6", 4, Some(6)),
        ("7", 4, Some(7)),
        ("8", 4, Some(8)),
        ("100", 4, Some(100)),
        ("0", 1, None),
    ] {
        let said = divides(&model, &["--at-most", at_most]);
        assert!(said.status.success(), "{said:?}");
        let division: Division = serde_json::from_slice(&said.stdout).unwrap();
        let refused = refused.map(|ranks| format!("4 query heads cannot be divided among {ranks} ranks"));
        assert_eq!(division, Division { ranks, refused }, "at most {at_most}");
    }
    let missing = divides(Path::new("/no/model"), &[]);
    let said = String::from_utf8(missing.stderr).unwrap();
    assert!(!missing.status.success() && missing.stdout.is_empty() && said.contains("/no/model"), "{said}");
    for more in [&["--devices"][..], &["--config", "/none"], &["--at-most", "all"]] {
        let refused = divides(&model, more);
        assert!(!refused.status.success() && refused.stdout.is_empty(), "{more:?}: {refused:?}");
    }
}

/// The launcher reads this, and nothing else may be on stdout.
#[test]
fn a_shard_lists_the_gpus_that_its_build_can_use() {
    for args in
        [&["--devices"][..], &["--devices", "--dtype", "float16"], &["--devices", "--dtype", "float32"]]
    {
        let listed = Command::new(env!("CARGO_BIN_EXE_lorax-shard")).args(args).output().unwrap();
        assert!(listed.status.success(), "{listed:?}");
        let devices: Devices = serde_json::from_slice(&listed.stdout).unwrap();
        assert!(devices.gpus.is_empty() && devices.missing.unwrap().contains("no CUDA backend"));
    }
    for args in [
        &[][..],
        &["--dtype", "float16"],
        &["--devices", "--config", "/none"],
        &["--devices", "--dtype", "int4"],
    ] {
        let refused = Command::new(env!("CARGO_BIN_EXE_lorax-shard")).args(args).output().unwrap();
        assert!(!refused.status.success() && refused.stdout.is_empty(), "{args:?}: {refused:?}");
    }
}
