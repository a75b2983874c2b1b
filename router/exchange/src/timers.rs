//! The times at which something is due.

use std::{collections::BTreeSet, time::Duration};

use crate::{AskId, CallId};

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    /// A call no longer counts against those that are not slow.
    Slow(CallId),
    /// A call fails.
    Call(CallId),
    /// An ask fails.
    Ask(AskId),
}

#[derive(Debug, Default)]
pub(crate) struct Timers(BTreeSet<(Duration, Timer)>);

impl Timers {
    pub(crate) fn add(&mut self, at: Duration, timer: Timer) {
        self.0.insert((at, timer));
    }

    pub(crate) fn remove(&mut self, at: Duration, timer: Timer) {
        self.0.remove(&(at, timer));
    }

    /// Takes one that is due.
    pub(crate) fn due(&mut self, now: Duration) -> Option<Timer> {
        let &(at, timer) = self.0.first().filter(|(at, _)| *at <= now)?;
        self.0.remove(&(at, timer));
        Some(timer)
    }

    /// The time at which the next one is due.
    pub(crate) fn next(&self) -> Option<Duration> {
        self.0.first().map(|&(at, _)| at)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &(Duration, Timer)> {
        self.0.iter()
    }
}
