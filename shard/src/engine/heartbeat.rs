//! The heartbeat of the step loop: what others may ask of it without waiting for it.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// The turns of the loop, and since when it has had work that is not finished.
#[derive(Debug)]
pub struct Heartbeat {
    epoch: Instant,
    turns: AtomicU64,
    /// When the oldest unfinished command or step began, in microseconds after `epoch`; [`IDLE`] without one.
    oldest: AtomicU64,
}

/// No command and no step.
const IDLE: u64 = u64::MAX;

impl Default for Heartbeat {
    fn default() -> Heartbeat {
        Heartbeat { epoch: Instant::now(), turns: AtomicU64::new(0), oldest: AtomicU64::new(IDLE) }
    }
}

impl Heartbeat {
    /// Turns that the loop has made. A loop that waits for work makes none.
    pub fn turns(&self) -> u64 {
        self.turns.load(Relaxed)
    }

    /// Age of the oldest command or step that the loop has not finished; none when it waits for work.
    pub fn oldest(&self) -> Option<Duration> {
        let began = Some(self.oldest.load(Relaxed)).filter(|&began| began != IDLE)?;
        Some(self.epoch.elapsed().saturating_sub(Duration::from_micros(began)))
    }

    /// Notes the oldest work that is not finished.
    pub(super) fn set_oldest(&self, began: Option<Instant>) {
        let micros = |began: Instant| began.saturating_duration_since(self.epoch).as_micros() as u64;
        self.oldest.store(began.map_or(IDLE, micros), Relaxed);
    }

    pub(super) fn turn(&self) {
        self.turns.fetch_add(1, Relaxed);
    }
}
