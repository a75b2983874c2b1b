//! Failures of tasks and threads, as whoever is told of them sees them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    future::pending,
    sync::mpsc::{Receiver, TryRecvError, sync_channel},
    thread,
    time::{Duration, Instant},
};

use futures::FutureExt;
use lifecycle::{Failure, Supervisor};

/// What a report gets to arrive; it takes milliseconds.
const SOON: Duration = Duration::from_secs(30);

fn reporting() -> (Supervisor, Receiver<Failure>) {
    let (reports, received) = sync_channel(16);
    let supervisor = Supervisor::reporting_to(move |failure| reports.try_send(failure).unwrap()).unwrap();
    (supervisor, received)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

#[test]
fn a_panic_is_reported_with_its_message() {
    let (supervisor, failures) = reporting();
    let panicked =
        |name: &str, message: &str| Failure::Panicked { name: name.into(), message: message.into() };
    let runtime = runtime();
    let _entered = runtime.enter();
    let number = 7;
    supervisor.task("task", SOON, async { panic!("a text") });
    assert_eq!(failures.recv_timeout(SOON), Ok(panicked("task", "a text")));
    supervisor.task("late task", SOON, async move {
        tokio::task::yield_now().await;
        panic!("number {number}")
    });
    assert_eq!(failures.recv_timeout(SOON), Ok(panicked("late task", "number 7")));
    supervisor.thread("thread", || panic!("a text")).unwrap();
    assert_eq!(failures.recv_timeout(SOON), Ok(panicked("thread", "a text")));
    supervisor.thread("odd", || std::panic::panic_any(7)).unwrap();
    assert_eq!(failures.recv_timeout(SOON), Ok(panicked("odd", "no message")));
    let empty: Vec<u8> = Vec::new();
    supervisor.thread("index", move || assert_eq!(empty[std::hint::black_box(0)], 1)).unwrap();
    assert!(failures.recv_timeout(SOON).unwrap().to_string().contains("index panicked: index out of bounds"));
}

#[test]
fn an_early_return_is_reported() {
    let (supervisor, failures) = reporting();
    let runtime = runtime();
    let _entered = runtime.enter();
    for name in ["task", "thread"] {
        match name {
            "task" => drop(supervisor.task(name, SOON, async {})),
            _ => drop(supervisor.thread(name, || {}).unwrap()),
        }
        assert_eq!(failures.recv_timeout(SOON), Ok(Failure::Returned { name: name.into() }));
    }
}

#[test]
fn what_ends_in_order_is_not_reported() {
    let (supervisor, failures) = reporting();
    let runtime = runtime();
    let entered = runtime.enter();
    let aborted = supervisor.task("aborted", SOON, pending());
    aborted.abort();
    assert!(runtime.block_on(aborted).unwrap_err().is_cancelled());
    supervisor.task("dropped with the runtime", SOON, pending());
    drop(entered);
    drop(runtime);
    let second = self::runtime();
    supervisor.stopping();
    second.block_on(async { supervisor.task("stopped", SOON, async {}).await }).unwrap();
    supervisor.thread("stopped", || {}).unwrap().join().unwrap();
    assert_eq!(failures.try_recv(), Err(TryRecvError::Empty));
    supervisor.thread("panics", || panic!("even so")).unwrap();
    assert!(matches!(failures.recv_timeout(SOON), Ok(Failure::Panicked { .. })));
}

#[test]
fn a_hang_is_reported_by_the_clock() {
    let (supervisor, failures) = reporting();
    let pulse = supervisor.watch("engine", Duration::from_millis(200));
    let idle = supervisor.watch("idle", Duration::from_millis(1));
    let (go_on, gone_on) = sync_channel::<()>(0);
    let hanging = thread::spawn(move || {
        pulse.busy();
        let _ = gone_on.recv();
    });
    let Failure::Overdue { name, age, limit } = failures.recv_timeout(SOON).unwrap() else { panic!() };
    assert_eq!((&*name, limit), ("engine", Duration::from_millis(200)));
    assert!(age > limit, "{age:?}");
    drop(go_on);
    hanging.join().unwrap();
    assert_eq!(failures.try_recv(), Err(TryRecvError::Empty), "the idle one is never overdue");
    drop(idle);
}

/// What a poll may take where one takes too long.
const LIMIT: Duration = Duration::from_millis(200);

/// A task whose second poll returns when the sender is dropped.
async fn hang(gone_on: Receiver<()>) {
    tokio::task::yield_now().await;
    _ = gone_on.recv();
    pending().await
}

#[test]
fn a_poll_that_does_not_return_is_reported_before_the_tasks_that_it_holds_up() {
    let (supervisor, failures) = reporting();
    let runtime = runtime();
    let _entered = runtime.enter();
    for turn in 0..3 {
        let others = ["one", "two"].map(|name| supervisor.task(name, LIMIT, pending()));
        let (go_on, gone_on) = sync_channel(0);
        let hanging = supervisor.task("hanging", LIMIT, hang(gone_on));
        let first = failures.recv_timeout(SOON).unwrap();
        assert!(
            matches!(&first, Failure::Overdue { name, age, .. } if &**name == "hanging" && *age > LIMIT),
            "{first}"
        );
        let held_up = [0; 2].map(|_| failures.recv_timeout(SOON).unwrap());
        for name in ["one", "two"] {
            let found = held_up.iter().find(|failure| failure.name() == name);
            assert!(
                matches!(found, Some(Failure::HeldUp { age, .. }) if *age > LIMIT),
                "{turn}: {held_up:?}"
            );
        }
        drop(go_on);
        hanging.abort();
        others.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

#[test]
fn a_runtime_that_somebody_else_blocks_is_reported() {
    let (supervisor, failures) = reporting();
    let runtime = runtime();
    let _entered = runtime.enter();
    supervisor.task("held up", LIMIT, pending());
    let (go_on, gone_on) = sync_channel(0);
    runtime.spawn(hang(gone_on));
    let failure = failures.recv_timeout(SOON).unwrap();
    assert!(matches!(&failure, Failure::HeldUp { name, .. } if &**name == "held up"), "{failure}");
    assert!(failure.to_string().contains("held up has not been polled for "), "{failure}");
    drop(go_on);
}

#[test]
fn a_task_with_a_runtime_of_its_own_is_supervised_like_any_other() {
    let (supervisor, failures) = reporting();
    let failure = || failures.recv_timeout(SOON).unwrap();
    let thread =
        supervisor.runtime("engine", SOON, async { assert_eq!(thread::current().name(), Some("engine")) });
    assert_eq!(failure(), Failure::Returned { name: "engine".into() });
    thread.unwrap().join().unwrap();
    supervisor.runtime("engine", SOON, async { panic!("a bug") }).unwrap();
    assert_eq!(failure().to_string(), "engine panicked: a bug");
    let (go_on, gone_on) = sync_channel(0);
    supervisor.runtime("engine", LIMIT, hang(gone_on)).unwrap();
    assert!(matches!(failure(), Failure::Overdue { name, .. } if &*name == "engine"));
    drop(go_on);
}

#[test]
fn a_task_may_wait_for_longer_than_its_polls_may_take() {
    let (supervisor, failures) = reporting();
    let runtime = runtime();
    let _entered = runtime.enter();
    for limit in [1, 10, 50, 100] {
        supervisor.task(format!("{limit} ms"), Duration::from_millis(limit), pending());
    }
    let pulse = supervisor.watch("each poll", LIMIT);
    drop(runtime.spawn(pulse.polls(pending::<()>())));
    // The tasks of the runtime have their turns meanwhile.
    assert!(failures.recv_timeout(Duration::from_millis(1500)).is_err());
}

#[test]
fn polls_that_take_too_long_are_reported_and_waits_are_not() {
    let (supervisor, failures) = reporting();
    let runtime = runtime();
    let (go_on, gone_on) = sync_channel(0);
    drop(runtime.spawn(supervisor.watch("hanging", LIMIT).polls(hang(gone_on))));
    let begun = Instant::now();
    let failure = failures.recv_timeout(SOON).unwrap();
    assert!(matches!(&failure, Failure::Overdue { name, .. } if &**name == "hanging"), "{failure}");
    assert!(begun.elapsed() < LIMIT + Duration::from_secs(2));
    drop(go_on);
}

#[test]
fn a_layer_may_replace_a_task() {
    let (supervisor, failures) = reporting();
    let supervisor =
        supervisor.layer(
            |name, task| {
                if name == "victim" { task.map(|()| panic!("in its place")).boxed() } else { task }
            },
        );
    let runtime = runtime();
    let _entered = runtime.enter();
    supervisor.task("other", SOON, async {});
    assert_eq!(failures.recv_timeout(SOON), Ok(Failure::Returned { name: "other".into() }));
    supervisor.task("victim", SOON, async {});
    assert_eq!(failures.recv_timeout(SOON).unwrap().to_string(), "victim panicked: in its place");
    supervisor.runtime("victim", SOON, async {}).unwrap();
    assert_eq!(failures.recv_timeout(SOON).unwrap().to_string(), "victim panicked: in its place");
}
