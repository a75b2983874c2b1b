//! Tasks and threads that come to harm while the router runs.
//!
//! The tasks of the router are killed in `tests/tasks.rs`, in a process of its own. What a test cannot reach from
//! outside is killed beside its code: the task of a connection in `server/connections.rs`, and work for requests in
//! `workers.rs`. The connections to shards are broken in `failures.rs` and `ranks.rs`.

use std::{
    fs,
    future::pending,
    path::PathBuf,
    sync::{Arc, mpsc::sync_channel},
    time::{Duration, Instant},
};

use lifecycle::Failure;
use serde_json::json;
use tokio::{
    io::copy_bidirectional,
    net::{UnixListener, UnixStream},
    process::Command,
    runtime::Builder,
    sync::Notify,
    task::spawn_blocking,
    time::timeout,
};

use crate::{
    process::Program,
    router::{PATIENCE, Router, tokens},
    shard::Script,
    sockets::LONG,
};

/// All of a runtime's threads are blocked, as by work that belongs on another thread.
#[test]
fn threads_that_are_blocked_are_reported_with_a_task_that_they_hold_up() {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let limit = Duration::from_secs(1);
    let router = runtime.block_on(Router::start_with(Script::saying(tokens("a")), |config| {
        config.router.step_timeout = Some(limit);
    }));
    assert_eq!(*router.failures.lock().unwrap(), []);
    let failures = router.failures.clone();
    let (go_on, gone_on) = sync_channel::<()>(0);
    let (told, blocked) = sync_channel(1);
    runtime.spawn(async move {
        told.send(()).unwrap();
        _ = gone_on.recv();
    });
    blocked.recv_timeout(PATIENCE).unwrap();
    let watching = Builder::new_current_thread().enable_all().build().unwrap();
    watching.block_on(async {
        let mut looks = tokio::time::interval(Duration::from_millis(20));
        let found = async {
            while failures.lock().unwrap().is_empty() {
                looks.tick().await;
            }
        };
        timeout(PATIENCE, found).await.unwrap();
    });
    let failure = failures.lock().unwrap()[0].clone();
    assert!(matches!(&failure, Failure::HeldUp { age, .. } if *age > limit), "{failure}");
    drop(go_on);
}

/// Passes connections on to a shard. Each time it is told to freeze, those that are open stay open, and nothing passes
/// through them any more.
async fn relay(at: PathBuf, shard: PathBuf, freeze: Arc<Notify>) {
    let listener = UnixListener::bind(at).unwrap();
    loop {
        // Kept until the runtime ends.
        let frozen = Arc::new(Notify::new());
        loop {
            tokio::select! {
                near = listener.accept() => {
                    let (shard, frozen) = (shard.clone(), frozen.clone());
                    tokio::spawn(async move {
                        let mut near = near.unwrap().0;
                        let mut far = UnixStream::connect(shard).await.unwrap();
                        tokio::select! {
                            _ = copy_bidirectional(&mut near, &mut far) => {}
                            () = frozen.notified() => pending().await,
                        }
                    });
                }
                () = freeze.notified() => break,
            }
        }
        frozen.notify_waiters();
    }
}

/// A connection to a shard whose task hangs, in either process.
#[tokio::test]
async fn a_connection_to_a_shard_that_hangs_is_replaced() {
    let (limit, freeze) = (Duration::from_secs(1), Arc::new(Notify::new()));
    let told = freeze.clone();
    let router = Router::start_with(Script::saying(tokens("a")), move |config| {
        config.router.step_timeout = Some(limit);
        let shard = config.shards.uds[0].clone();
        let at = shard.with_extension("relay");
        config.shards.uds[0] = at.clone();
        tokio::spawn(relay(at, shard, told));
    })
    .await;
    let ask = |adapter: &str| json!({"inputs": "x", "parameters": {"adapter_id": adapter}});
    for adapter in ["one", "two", "three"] {
        // Both connections are open: for steps and for adapters.
        router.ok("/generate", &ask(adapter)).await;
        freeze.notify_one();
        let begun = Instant::now();
        assert_eq!(router.post("/generate", &json!({"inputs": "x"})).await.0, 503);
        router.health(200, "").await;
        assert!(begun.elapsed() < limit + Duration::from_secs(2), "{:?}", begun.elapsed());
        router.ok("/generate", &ask(&format!("{adapter} more"))).await;
    }
    assert_eq!(*router.failures.lock().unwrap(), []);
}

/// A key file on a file system that does not answer: a pipe that nobody writes.
#[tokio::test]
async fn a_key_file_that_cannot_be_read_to_its_end_is_told_of_and_its_keys_stay() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.json");
    let keys = |key: &str| json!({"keys": [{"key": key, "tenant": "a"}]}).to_string();
    fs::write(&file, keys("old")).unwrap();
    let change = |router: &mut config::RouterConfig| router.api_key_file = Some(file.clone());
    let mut program = Program::start(Script::saying(tokens("a")), change);
    let address = program.says("listening on ").await;
    assert_eq!(program.says("api-key-file: ").await, "1 keys are valid now");
    let client = reqwest::Client::new();
    let status = async |key: &str| {
        let request = client.get(format!("http://{address}/info")).bearer_auth(key);
        request.send().await.unwrap().status().as_u16()
    };
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().await.unwrap().success());
    fs::rename(&pipe, &file).unwrap();
    let told = timeout(LONG, program.says("key file watcher: ")).await.unwrap();
    assert!(told.ends_with("has not been read within 2 s; the keys stay as they are"), "{told}");
    assert_eq!((status("old").await, status("new").await), (200, 401));
    // The file system answers again.
    let (text, there) = (keys("new"), file.clone());
    timeout(LONG, spawn_blocking(move || fs::write(there, text))).await.unwrap().unwrap().unwrap();
    assert_eq!(timeout(LONG, program.says("api-key-file: ")).await.unwrap(), "1 keys are valid now");
    assert_eq!((status("old").await, status("new").await), (401, 200));
    program.signal("-TERM").await;
    assert_eq!(program.ended().await, Some(0), "though it is being read again");
}
