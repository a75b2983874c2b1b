//! Rates: limits by the minute, and how fast permits come back.

use std::time::Duration;

/// Shortest and longest time that a client is told to wait for a permit.
const ESTIMATES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Weight of the newest interval in the moving average.
const NEWEST: f64 = 0.1;

/// A token bucket: it holds what may be used in a minute and is filled again at that rate. What is used beyond its
/// content is a debt.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Bucket {
    /// The part that has been used and not been refilled.
    used: f64,
    at: Duration,
}

impl Bucket {
    pub(super) fn take(&mut self, per_minute: Option<u32>, amount: f64, now: Duration) {
        if let Some(limit) = per_minute {
            self.fill(limit, now);
            self.used += amount;
        }
    }

    /// Time until the bucket has one more; zero if it has one.
    pub(super) fn ready_in(&mut self, per_minute: u32, now: Duration) -> Duration {
        self.fill(per_minute, now);
        let missing = self.used + 1.0 - f64::from(per_minute);
        if missing <= 0.0 {
            return Duration::ZERO;
        }
        // A limit of 0 is never ready again.
        let seconds = 60.0 * missing / f64::from(per_minute).max(f64::MIN_POSITIVE);
        Duration::try_from_secs_f64(seconds)
            .unwrap_or(Duration::from_secs(3600))
            .min(Duration::from_secs(3600))
    }

    pub(super) fn is_unused(&self) -> bool {
        self.used <= 0.0
    }

    fn fill(&mut self, per_minute: u32, now: Duration) {
        let seconds = now.saturating_sub(self.at).as_secs_f64();
        self.used = (self.used - seconds * f64::from(per_minute) / 60.0).max(0.0);
        self.at = now;
    }
}

/// The pace at which permits come back: a moving average of the time between two of them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pace {
    last: Option<Duration>,
    seconds: Option<f64>,
}

impl Pace {
    pub(super) fn released(&mut self, now: Duration) {
        if let Some(last) = self.last {
            let seconds = now.saturating_sub(last).as_secs_f64();
            self.seconds = Some(self.seconds.map_or(seconds, |known| known + NEWEST * (seconds - known)));
        }
        self.last = Some(now);
    }

    /// The expected time until so many permits have come back.
    pub(super) fn estimate(&self, permits: usize) -> Duration {
        let seconds = self.seconds.unwrap_or(0.0) * permits as f64;
        Duration::try_from_secs_f64(seconds).unwrap_or(ESTIMATES.1).clamp(ESTIMATES.0, ESTIMATES.1)
    }
}
