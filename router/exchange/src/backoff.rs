//! Failures that are remembered for a short time, which grows while they repeat.

use std::{hash::Hash, time::Duration};

use crate::{Fault, lru::Lru};

#[derive(Debug)]
struct Failure {
    fault: Fault,
    until: Duration,
    /// How long this one is remembered.
    backoff: Duration,
}

/// The failures of references or of contents.
#[derive(Debug)]
pub(crate) struct Backoff<K> {
    failures: Lru<K, Failure>,
    first: Duration,
    longest: Duration,
}

impl<K: Copy + Eq + Hash> Backoff<K> {
    pub(crate) fn new(first: Duration, longest: Duration, remembered: usize) -> Self {
        Self { failures: Lru::new(remembered), first, longest }
    }

    /// The failure that holds at present.
    pub(crate) fn current(&self, key: K, now: Duration) -> Option<&Fault> {
        self.failures.peek(key).filter(|failure| now < failure.until).map(|failure| &failure.fault)
    }

    /// Something has failed. If its last failure is not long ago, this one is remembered for twice as long.
    pub(crate) fn add(&mut self, key: K, fault: Fault, now: Duration) {
        let last = self.failures.peek(key);
        let recent = last.filter(|last| now < last.until + self.longest);
        let backoff = recent.map_or(self.first, |last| last.backoff * 2).min(self.longest);
        self.failures.insert(key, Failure { fault, until: now + backoff, backoff });
    }

    /// It has succeeded.
    pub(crate) fn clear(&mut self, key: K) {
        self.failures.remove(key);
    }

    pub(crate) fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        self.failures.retain(keep);
    }

    pub(crate) fn check(&self) {
        self.failures.check();
    }
}
