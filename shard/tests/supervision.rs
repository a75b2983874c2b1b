//! A shard that loses a part of itself ends, and says which part. This program runs itself as that shard.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/client.rs"]
mod client;
#[path = "support/fake.rs"]
mod fake;
#[path = "support/tiny.rs"]
mod tiny;

use std::{
    future::pending,
    io::{self, BufRead, BufReader},
    path::Path,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use fake::{Fake, Fault, Script};
use kernels::PeerFault;
use lifecycle::{EX_SOFTWARE, EX_UNAVAILABLE, Supervisor};
use lorax_shard::server::{self, Rank};
use proto::{AttachRequest, SlotLoad, StageRequest, Step};
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
};
use tokio_stream::{Stream, StreamExt, wrappers::UnixListenerStream};

/// How the shard that is tested is told what goes wrong.
const FAULT: &str = "SHARD_TEST_FAULT";
/// What it prints when that is about to happen.
const NOW: &str = "from now on";
/// What a process may take to end after one of its parts failed.
const PROMPT: Duration = Duration::from_secs(2);
/// What a step may take.
const STEP_TIMEOUT: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    match std::env::var(FAULT) {
        Ok(fault) => play(&fault),
        Err(_) => {
            each_part_that_fails_ends_the_process();
            a_reader_of_adapters_that_fails_is_replaced();
            ExitCode::SUCCESS
        }
    }
}

/// Every fault, and what the log says of it.
const FAULTS: [(&str, &str); 22] = [
    ("step panics", "engine panicked: the test's panic in embed"),
    ("upload panics", "engine panicked: the test's panic in upload"),
    ("copies panic", "engine panicked: the test's panic in loaded"),
    ("seat panics", "engine panicked: the test's panic in seat"),
    ("device fails", "engine has ended, which it must not while the process runs"),
    ("load fails", "engine has ended, which it must not while the process runs"),
    ("a rank ends", "engine cannot go on: embed: rank 1 has ended: ending the process"),
    ("a rank is late", "engine cannot go on: upload: rank 1 has not come within 3s: ending the process"),
    ("a rank differs", "engine has ended, which it must not while the process runs"),
    ("step hangs", "engine has made no progress for"),
    ("device hangs", "engine has made no progress for"),
    ("load hangs", "engine has made no progress for"),
    ("attach hangs", "engine has made no progress for"),
    ("connections end", "gRPC server has ended, which it must not while the process runs"),
    ("connections panic", "gRPC server panicked: the test's panic in a connection"),
    ("connections hangs", "gRPC server has made no progress for"),
    ("gRPC server: panics", "gRPC server panicked: the test's panic"),
    ("gRPC server: returns", "gRPC server has ended, which it must not while the process runs"),
    ("gRPC server: hangs", "gRPC server has made no progress for"),
    ("step streams: panics", "step streams panicked: the test's panic"),
    ("step streams: returns", "step streams has ended, which it must not while the process runs"),
    ("step streams: hangs", "step streams has made no progress for"),
];

/// Runs a shard with a fault to its end: its exit code, its log, and the time from the fault on.
fn run(fault: &str) -> (Option<i32>, String, Duration) {
    let mut shard = Command::new(std::env::current_exe().unwrap())
        .env(FAULT, fault)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut log, mut begun) = (String::new(), Instant::now());
    for text in BufReader::new(shard.stderr.take().unwrap()).lines().map(Result::unwrap) {
        if text == NOW {
            begun = Instant::now();
        }
        log += &(text + "\n");
    }
    assert!(log.contains(NOW), "{fault}: {log}");
    (shard.wait().unwrap().code(), log, begun.elapsed())
}

fn each_part_that_fails_ends_the_process() {
    for (fault, line) in FAULTS {
        let (code, log, took) = run(fault);
        let lost = ["a rank ends", "a rank is late"].contains(&fault);
        assert_eq!(code, Some(if lost { EX_UNAVAILABLE } else { EX_SOFTWARE }), "{fault}: {log}");
        assert!(log.contains(line), "{fault}: {log}");
        let limit = if fault.ends_with("hangs") { STEP_TIMEOUT + PROMPT } else { PROMPT };
        assert!(took < limit, "{fault}: {took:?}");
    }
}

/// It fails the request that it reads for, and the next one is read.
fn a_reader_of_adapters_that_fails_is_replaced() {
    for (fault, line) in [
        ("staging panics", "staging of adapter one panicked"),
        ("staging hangs", "staging of adapter one has not ended within 2 s"),
    ] {
        let (code, log, took) = run(fault);
        assert_eq!(code, Some(0), "{fault}: {log}");
        assert!(log.contains(line), "{fault}: {log}");
        assert!(took < tiny::READ_TIMEOUT + PROMPT, "{fault}: {took:?}");
    }
}

/// The shard that is tested.
fn play(fault: &str) -> ExitCode {
    tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(false).init();
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let served = runtime.block_on(async {
        let script = Script::default();
        let (engine, adapters) = tiny::engine(Fake::new(script.clone()), folder.path());
        let supervisor = Supervisor::ending_the_process().unwrap();
        let (victim, kind) = fault.split_once(": ").unwrap_or_default();
        let supervisor = layered(supervisor, victim.to_owned(), kind.to_owned());
        let socket = folder.path().join("shard.sock");
        let connections = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
        let rank = Rank { engine, adapters, info: client::info() };
        if fault.starts_with("connections") {
            let broken = breaking(connections, fault.to_owned());
            let served = server::serve(rank, broken, STEP_TIMEOUT, pending(), &supervisor);
            return tokio::select! { served = served => served, () = connect_twice(&socket) => Ok(()) };
        }
        let served = server::serve(rank, connections, STEP_TIMEOUT, pending(), &supervisor);
        if fault.starts_with("staging") {
            let read = fail_to_read(fault, &script, &socket);
            return tokio::select! { served = served => served, () = read => std::process::exit(0) };
        }
        tokio::select! { served = served => served, () = provoke(fault, &script, &socket) => Ok(()) }
    });
    panic!("{fault}: the shard lives: {served:?}")
}

/// One connection, then a fault.
fn breaking(
    connections: UnixListenerStream,
    fault: String,
) -> impl Stream<Item = io::Result<UnixStream>> + Send + 'static {
    let mut taken = 0;
    connections.map_while(move |connection| {
        taken += 1;
        match &*fault {
            _ if taken == 1 => Some(connection),
            "connections panic" => panic!("the test's panic in a connection"),
            "connections hangs" => hang(),
            _ => None,
        }
    })
}

fn hang() -> ! {
    loop {
        std::thread::park();
    }
}

/// Has a task fail on SIGUSR1.
fn layered(supervisor: Supervisor, victim: String, kind: String) -> Supervisor {
    supervisor.layer(move |name, task| {
        assert!(["gRPC server", "step streams"].contains(&name), "no test kills {name}");
        if name != victim {
            return task;
        }
        let (kind, mut told) = (kind.clone(), signal(SignalKind::user_defined1()).unwrap());
        Box::pin(async move {
            tokio::select! {
                () = task => return,
                told = told.recv() => told.unwrap(),
            }
            match &*kind {
                "panics" => panic!("the test's panic"),
                "hangs" => hang(),
                _ => {}
            }
        })
    })
}

async fn connect_twice(socket: &Path) {
    drop(client::connect(socket).await);
    eprintln!("{NOW}");
    // Held, so that nobody's end is taken for the server's.
    let _held = UnixStream::connect(socket).await.unwrap();
    pending().await
}

/// Asks for an adapter whose reader fails, and for another one.
async fn fail_to_read(fault: &str, script: &Script, socket: &Path) {
    let mut client = client::connect(socket).await;
    client.attach(AttachRequest { session: 1 }).await.unwrap();
    script.fail("stage", if fault == "staging panics" { Fault::Panic } else { Fault::Hang });
    eprintln!("{NOW}");
    client.stage(order(socket, "one")).await.unwrap_err();
    script.mend("stage");
    client.stage(order(socket, "two")).await.unwrap();
}

/// Has one of the adapters staged in the first session.
fn order(socket: &Path, name: &str) -> StageRequest {
    client::order(&socket.with_file_name("adapters").join(name), 1)
}

/// Is the router that meets the fault.
async fn provoke(fault: &str, script: &Script, socket: &Path) {
    let mut client = client::connect(socket).await;
    client.attach(AttachRequest { session: 1 }).await.unwrap();
    let stage = order(socket, "one");
    let content = stage.content.clone();
    client.stage(stage).await.unwrap();
    let load = vec![SlotLoad { slot: 0, content }];
    let load = if fault.starts_with("load") || fault == "copies panic" { load } else { Vec::new() };
    let (steps, outgoing) = tokio::sync::mpsc::channel(2);
    let outgoing = tokio_stream::wrappers::ReceiverStream::new(outgoing);
    let outgoing = tokio_stream::StreamExt::map(outgoing, client::request);
    let mut events = client.execute(outgoing).await.unwrap().into_inner();
    match fault {
        "step panics" => script.fail("embed", Fault::Panic),
        "upload panics" => script.fail("upload", Fault::Panic),
        "copies panic" => script.fail("loaded", Fault::Panic),
        "seat panics" => script.fail("seat", Fault::Panic),
        "device fails" => script.fail("embed", Fault::Device),
        "load fails" => script.fail("load", Fault::Device),
        "a rank ends" => script.fail("embed", Fault::Peer(PeerFault::Ended)),
        "a rank is late" => script.fail("upload", Fault::Peer(PeerFault::Late(Duration::from_secs(3)))),
        "a rank differs" => script.fail("embed", Fault::Peer(PeerFault::Differs)),
        "step hangs" => script.fail("embed", Fault::Hang),
        "load hangs" => script.fail("load", Fault::Hang),
        "device hangs" | "attach hangs" => script.hold(),
        _ => assert!(fault.contains(": "), "an unknown fault"),
    }
    let before = script.marks();
    eprintln!("{NOW}");
    if fault.contains(": ") {
        let id = std::process::id().to_string();
        assert!(Command::new("kill").args(["-USR1", &id]).status().unwrap().success());
        return pending().await;
    }
    steps.send(Step { load, ..client::first_step(1) }).await.unwrap();
    if fault == "attach hangs" {
        while script.marks() < before + 2 {
            tokio::task::yield_now().await;
        }
        client.attach(AttachRequest { session: 2 }).await.unwrap();
        panic!("the engine does not answer");
    }
    // There is nothing to read until the process ends.
    let _ = events.message().await;
    pending().await
}
