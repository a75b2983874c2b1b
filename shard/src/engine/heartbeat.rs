//! The heartbeat of the step loop, which other threads read without waiting for the loop.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Counts the turns of the loop, and knows the age of its oldest unfinished work.
#[derive(Debug)]
pub struct Heartbeat {
    epoch: Instant,
    turns: AtomicU64,
    /// When the oldest unfinished command or step began, in microseconds after `epoch`, or [`IDLE`].
    oldest: AtomicU64,
}

/// The value of `oldest` while there is no unfinished command or step.
const IDLE: u64 = u64::MAX;

impl Default for Heartbeat {
    fn default() -> Heartbeat {
        Heartbeat { epoch: Instant::now(), turns: AtomicU64::new(0), oldest: AtomicU64::new(IDLE) }
    }
}

impl Heartbeat {
    /// The number of turns that the loop has made. It makes none while it waits for work.
    pub fn turns(&self) -> u64 {
        self.turns.load(Relaxed)
    }

    /// The age of the oldest command or step that the loop has not finished; `None` while it waits for work.
    pub fn oldest(&self) -> Option<Duration> {
        let began = Some(self.oldest.load(Relaxed)).filter(|&began| began != IDLE)?;
        Some(self.epoch.elapsed().saturating_sub(Duration::from_micros(began)))
    }

    /// Sets when the oldest unfinished work began.
    pub(super) fn set_oldest(&self, began: Option<Instant>) {
        let micros = |began: Instant| began.saturating_duration_since(self.epoch).as_micros() as u64;
        self.oldest.store(began.map_or(IDLE, micros), Relaxed);
    }

    /// Counts a turn.
    pub(super) fn turn(&self) {
        self.turns.fetch_add(1, Relaxed);
    }
}
