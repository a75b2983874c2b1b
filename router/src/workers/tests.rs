use std::sync::mpsc::{SyncSender, sync_channel};

use futures::FutureExt;
use tokio::sync::mpsc;
use tracing::{Level, info_span};

use super::*;
use crate::metrics::Metrics;

const SECOND: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(30);

/// Workers, and the metrics in which they count.
fn workers(threads: usize, limit: Duration) -> (Arc<Workers>, Metrics) {
    let metrics = Metrics::new().unwrap();
    (Arc::new(Workers::new(threads, limit, metrics.workers())), metrics)
}

/// The lines that are logged meanwhile.
fn lines_of(work: impl FnOnce()) -> Vec<String> {
    telemetry::testing::logged(Level::INFO, work).lines().map(Into::into).collect()
}

/// Jobs that hang until they are let go.
struct Hanging {
    workers: Arc<Workers>,
    go_on: Vec<SyncSender<()>>,
}

impl Hanging {
    /// One more; it has begun when this returns.
    async fn add(&mut self) {
        let (go_on, gone_on) = sync_channel::<()>(0);
        let (tell, mut told) = mpsc::channel(1);
        let workers = self.workers.clone();
        tokio::spawn(async move {
            let work = move || {
                tell.try_send(()).unwrap();
                _ = gone_on.recv();
            };
            workers.run("the hanging job", &Principal::anonymous(), work).await
        });
        timeout(PATIENCE, told.recv()).await.unwrap().unwrap();
        self.go_on.push(go_on);
    }

    /// Lets all of them end.
    async fn end(&mut self) {
        self.go_on.clear();
        let ended = async {
            while !lock(&self.workers.jobs).running.is_empty() {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, ended).await.unwrap();
    }
}

#[tokio::test]
async fn work_that_panics_fails_alone_and_gives_its_thread_back() {
    let (workers, _metrics) = workers(1, LIMIT);
    let caller = Principal::anonymous();
    for _ in 0..3 {
        let failed = workers.run("a job", &caller, || assert_eq!(1, 2, "a bug")).await;
        assert_eq!(failed, Err(WorkError::Panicked));
        assert_eq!(workers.run("a job", &caller, || 7).await, Ok(7));
    }
}

/// Otherwise clients that leave would have as many threads as they like.
#[tokio::test]
async fn work_whose_caller_has_left_keeps_its_thread_until_it_ends() {
    let (workers, _metrics) = workers(1, LIMIT);
    let caller = Principal::anonymous();
    let (tell, mut told) = mpsc::channel(1);
    let (go_on, gone_on) = sync_channel::<()>(0);
    {
        let mut left = Box::pin(workers.run("a job", &caller, move || {
            tell.try_send(()).unwrap();
            _ = gone_on.recv();
        }));
        assert!(left.as_mut().now_or_never().is_none());
        timeout(PATIENCE, told.recv()).await.unwrap().unwrap();
    }
    let turn = || workers.turns.acquire(caller.tenant.id, 1);
    assert!(turn().now_or_never().is_none(), "its work goes on");
    drop(go_on);
    timeout(PATIENCE, turn()).await.unwrap();
}

/// The pool does not go down with as many jobs as it has threads, and the supervisor hears of as many more.
#[tokio::test]
async fn jobs_that_hang_are_replaced_up_to_a_bound() {
    for threads in [1, 2, 3, 8] {
        let (workers, metrics) = workers(threads, LIMIT);
        let mut hanging = Hanging { workers: workers.clone(), go_on: Vec::new() };
        let page = |hanging: usize, overdue: usize| {
            let page = metrics.render();
            assert!(page.contains(&format!("lorax_workers_hanging {hanging}\n")), "{page}");
            assert!(page.contains(&format!("lorax_workers_overdue_total {overdue}\n")), "{page}");
        };
        for round in 0..2 {
            let before = round * 2 * threads;
            for number in 1..=threads {
                hanging.add().await;
                assert_eq!(workers.tick(LIMIT), None);
                assert_eq!(workers.tick(SECOND), None, "{number} of {threads}");
                page(number, before + number);
                assert_eq!(workers.run("a job", &Principal::anonymous(), || 7).await, Ok(7));
            }
            for number in 1..=threads {
                hanging.add().await;
                assert_eq!(workers.tick(LIMIT), None, "it may take as long");
                let failure = workers.tick(SECOND);
                page(threads + number, before + threads + number);
                assert_eq!(failure.is_some(), number == threads, "{number} of {threads}: {failure:?}");
            }
            let failure = workers.tick(SECOND).unwrap().to_string();
            assert!(failure.starts_with("validation workers has made no progress for "), "{failure}");
            hanging.end().await;
            assert_eq!(workers.tick(SECOND), None, "all have ended");
            page(0, before + 2 * threads);
        }
    }
}

#[tokio::test]
async fn threads_are_no_more_than_before_once_jobs_that_hung_have_ended() {
    let (workers, _metrics) = workers(2, LIMIT);
    let mut hanging = Hanging { workers: workers.clone(), go_on: Vec::new() };
    for _ in 0..3 {
        hanging.add().await;
        hanging.add().await;
        assert_eq!(workers.tick(LIMIT + SECOND), None);
        hanging.end().await;
        // Both threads, and no third.
        hanging.add().await;
        hanging.add().await;
        let caller = Principal::anonymous();
        assert!(workers.run("a third job", &caller, || ()).now_or_never().is_none());
        assert_eq!(lock(&workers.jobs).running.len(), 2);
        hanging.end().await;
    }
}

#[test]
fn a_job_that_hangs_is_logged_once_with_its_name_its_request_and_its_age() {
    let (workers, _metrics) = workers(1, LIMIT);
    let lines = lines_of(|| {
        let turn = || free_turn(&workers);
        let first = info_span!("request", id = "r-1").in_scope(|| workers.begin("tokenizing", turn()));
        for _ in 0..13 {
            assert_eq!(workers.tick(SECOND), None);
        }
        let second = info_span!("request", id = "r-2").in_scope(|| workers.begin("a chat template", turn()));
        for _ in 0..11 {
            workers.tick(SECOND);
        }
        drop(first);
        assert_eq!(workers.tick(SECOND), None, "the place of the first is free");
        drop(second);
    });
    let wanted = [
        ("r-1", "tokenizing has not ended after 11.0 s; another thread takes its place"),
        ("r-2", "a chat template has not ended after 11.0 s; another thread would be one too many"),
        ("r-1", "tokenizing has ended after 24.0 s"),
        ("r-2", "a chat template has ended after 12.0 s"),
    ];
    assert_eq!(lines.len(), wanted.len(), "{lines:#?}");
    for (line, (id, text)) in lines.iter().zip(wanted) {
        assert!(line.contains(&format!("request{{id=\"{id}\"}}")) && line.ends_with(text), "{line}");
    }
}

/// A thread's turn, which is free.
fn free_turn(workers: &Workers) -> Grant<TenantId> {
    let turn = workers.turns.acquire(Principal::anonymous().tenant.id, 1);
    turn.now_or_never().unwrap()
}

#[tokio::test]
async fn a_pool_that_hangs_is_reported_in_time() {
    let limit = Duration::from_millis(400);
    let (report, failures) = sync_channel(64);
    let supervisor = Supervisor::reporting_to(move |failure| report.try_send(failure).unwrap()).unwrap();
    let (workers, _metrics) = workers(1, limit);
    supervisor.task(NAME, PATIENCE, workers.clone().watch(supervisor.clone()));
    let mut hanging = Hanging { workers: workers.clone(), go_on: Vec::new() };
    hanging.add().await;
    // Gets its turn when the first one is given up.
    hanging.add().await;
    let begun = Instant::now();
    let failure =
        tokio::task::spawn_blocking(move || failures.recv_timeout(PATIENCE)).await.unwrap().unwrap();
    assert!(
        matches!(&failure, Failure::Overdue { name, age, .. } if &**name == NAME && *age > limit),
        "{failure}"
    );
    assert!(begun.elapsed() < limit + 2 * SECOND, "{:?}", begun.elapsed());
    hanging.end().await;
}
