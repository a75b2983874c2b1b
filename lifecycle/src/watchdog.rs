//! Deadlines on the progress of tasks: a thread that counts how long each of them has been busy with one thing.

use std::{
    future::poll_fn,
    io,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::time::{MissedTickBehavior, interval};

use crate::Failure;

/// Time between two looks at all tasks.
const TICK: Duration = Duration::from_millis(100);
/// The most that one tick adds to an age. A process that was suspended, or whose machine was, finds that much more time
/// has passed; that is nobody's fault, and its tasks get the rest of their time when it goes on.
const LONGEST_TICK: Duration = Duration::from_secs(1);
/// Time between two polls of a task that waits; less if its limit is short.
const TURN: Duration = Duration::from_millis(250);
/// What a task that is not polled may take beyond its limit: the one that holds up its runtime is reported first.
const HELD_UP: Duration = Duration::from_secs(1);

/// The task waits for something to do.
const IDLE: u8 = 0;
/// It does something that must end within its limit.
const BUSY: u8 = 1;
/// It is between two polls, the next of which is due within a turn.
const DUE: u8 = 2;

/// The progress of one task. Clones speak for the same task; when the last is dropped, the task is watched no longer.
///
/// A task is idle at first. While it is busy, it must call [`beat`](Pulse::beat) more often than its limit allows.
#[derive(Debug, Clone)]
pub struct Pulse(Arc<Watched>);

#[derive(Debug)]
struct Watched {
    name: Arc<str>,
    /// [`IDLE`], [`BUSY`] or [`DUE`].
    state: AtomicU8,
    /// Microseconds since the last beat.
    age: AtomicU64,
    /// Microseconds that it may be busy without a beat.
    limit: AtomicU64,
}

impl Pulse {
    /// The task has made progress.
    pub fn beat(&self) {
        self.0.age.store(0, Relaxed);
    }

    /// The task has begun something that must end, or make progress, within the limit.
    pub fn busy(&self) {
        self.enter(BUSY);
    }

    /// The task waits for something to do, which may take any time.
    pub fn idle(&self) {
        self.enter(IDLE);
    }

    fn enter(&self, state: u8) {
        self.beat();
        self.0.state.store(state, Relaxed);
    }

    /// Watches each poll of a future, which must return within the limit. It does not matter how long the future waits
    /// in between.
    pub async fn polls<F: Future>(self, future: F) -> F::Output {
        let mut future = pin!(future);
        let polled = poll_fn(|context| {
            self.busy();
            let polled = future.as_mut().poll(context);
            self.idle();
            polled
        });
        polled.await
    }

    /// Watches the polls of a future, and polls it several times a second whether or not it is woken: it is overdue as
    /// well when its runtime does not get round to it.
    pub async fn turns<F: Future>(self, future: F) -> F::Output {
        let mut future = pin!(future);
        let limit = Duration::from_micros(self.0.limit.load(Relaxed));
        let mut turns = interval(TURN.min(limit / 4).max(Duration::from_millis(1)));
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let polled = poll_fn(|context| {
            self.busy();
            let polled = future.as_mut().poll(context);
            // Once it is pending, this task will be woken for its next turn.
            while polled.is_pending() && turns.poll_tick(context).is_ready() {}
            self.enter(if polled.is_pending() { DUE } else { IDLE });
            polled
        });
        polled.await
    }

    /// Changes how long the task may be busy without a beat, what it is doing now included.
    pub fn set_limit(&self, limit: Duration) {
        self.0.limit.store(micros(limit), Relaxed);
    }

    /// How long the task has been busy since its last beat, to the tenth of a second; zero while it is idle.
    pub fn age(&self) -> Duration {
        match self.0.state.load(Relaxed) {
            IDLE => Duration::ZERO,
            _ => Duration::from_micros(self.0.age.load(Relaxed)),
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// All tasks that are watched.
#[derive(Debug, Clone, Default)]
pub(crate) struct Watchdog(Arc<Mutex<Vec<Weak<Watched>>>>);

impl Watchdog {
    /// Starts the thread, which lives as long as the watchdog or one of its clones, and reports each overdue task once.
    pub(crate) fn start(report: impl Fn(Failure) + Send + 'static) -> io::Result<Watchdog> {
        let watchdog = Watchdog::default();
        let tasks = Arc::downgrade(&watchdog.0);
        thread::Builder::new().name("watchdog".into()).spawn(move || {
            let mut last = Instant::now();
            loop {
                thread::park_timeout(TICK);
                let Some(tasks) = tasks.upgrade() else { return };
                let passed = last.elapsed();
                last += passed;
                for failure in Watchdog(tasks).tick(passed.min(LONGEST_TICK)) {
                    report(failure);
                }
            }
        })?;
        Ok(watchdog)
    }

    pub(crate) fn watch(&self, name: Arc<str>, limit: Duration) -> Pulse {
        let watched = Watched {
            name,
            state: AtomicU8::new(IDLE),
            age: AtomicU64::new(0),
            limit: AtomicU64::new(micros(limit)),
        };
        let watched = Arc::new(watched);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&watched));
        Pulse(watched)
    }

    /// Lets time pass for all busy tasks; returns those that are overdue, which count as idle from then on.
    fn tick(&self, passed: Duration) -> Vec<Failure> {
        let mut overdue = Vec::new();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|task| {
            let Some(task) = task.upgrade() else { return false };
            let state = task.state.load(Relaxed);
            if state == IDLE {
                return true;
            }
            let age = task.age.fetch_add(micros(passed), Relaxed).saturating_add(micros(passed));
            let limit = task.limit.load(Relaxed);
            let most = if state == DUE { limit.saturating_add(micros(HELD_UP)) } else { limit };
            if age > most {
                task.state.store(IDLE, Relaxed);
                let (name, age, limit) =
                    (task.name.clone(), Duration::from_micros(age), Duration::from_micros(limit));
                overdue.push(match state {
                    DUE => Failure::HeldUp { name, age },
                    _ => Failure::Overdue { name, age, limit },
                });
            }
            true
        });
        overdue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_task_is_overdue_once_it_was_busy_for_longer_than_its_limit() {
        let watchdog = Watchdog::default();
        let pulse = watchdog.watch("engine".into(), 3 * SECOND);
        let overdue = |ticks: u32| (0..ticks).flat_map(|_| watchdog.tick(SECOND)).collect::<Vec<_>>();
        assert!(overdue(100).is_empty(), "idle");
        pulse.busy();
        assert!(overdue(3).is_empty(), "busy for as long as it may be");
        assert_eq!(pulse.age(), 3 * SECOND);
        pulse.beat();
        assert!(overdue(3).is_empty(), "it has made progress");
        pulse.idle();
        assert!(overdue(100).is_empty(), "idle again");
        assert_eq!(pulse.age(), Duration::ZERO);
        pulse.busy();
        pulse.set_limit(5 * SECOND);
        assert!(overdue(5).is_empty(), "the limit was raised");
        let failures = overdue(100);
        assert_eq!(failures.len(), 1, "told once");
        let text = failures[0].to_string();
        assert_eq!(text, "engine has made no progress for 6.0 s, and may take 5.0 s");
        pulse.busy();
        drop(pulse);
        assert!(overdue(100).is_empty(), "it is gone");
    }

    #[test]
    fn each_task_has_a_time_of_its_own() {
        let watchdog = Watchdog::default();
        let pulses: Vec<_> =
            (1..=20).map(|limit| watchdog.watch(format!("task {limit}").into(), limit * SECOND)).collect();
        pulses.iter().for_each(Pulse::busy);
        for second in 1..=20 {
            let names: Vec<_> =
                watchdog.tick(SECOND).iter().map(|failure| failure.name().to_owned()).collect();
            // Overdue a second after its limit was reached.
            let expected = (second > 1).then(|| format!("task {}", second - 1));
            assert_eq!(names, expected.into_iter().collect::<Vec<_>>());
        }
    }
}
