//! Failures of tasks and threads, as whoever is told of them sees them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::mpsc::{Receiver, TryRecvError, sync_channel},
    thread,
    time::Duration,
};

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
    supervisor.task("task", async { panic!("a text") });
    assert_eq!(failures.recv_timeout(SOON), Ok(panicked("task", "a text")));
    supervisor.task("late task", async move {
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
            "task" => drop(supervisor.task(name, async {})),
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
    let aborted = supervisor.task("aborted", std::future::pending());
    aborted.abort();
    assert!(runtime.block_on(aborted).unwrap_err().is_cancelled());
    supervisor.task("dropped with the runtime", std::future::pending());
    drop(entered);
    drop(runtime);
    let second = self::runtime();
    supervisor.stopping();
    second.block_on(async { supervisor.task("stopped", async {}).await }).unwrap();
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
