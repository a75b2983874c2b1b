//! Jobs and steps in flight: they have been sent and have not ended.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use super::PermitHold;
use crate::{
    adapters::Leases,
    generation::{Failure, Update},
    metrics::{Outcome, SequenceTimes},
    ranks::RankError,
};

/// A job that has been submitted and has not ended.
pub(super) struct InFlight {
    pub(super) updates: mpsc::Sender<Update>,
    pub(super) outcome: Outcome,
    /// Tokens of the prompt.
    pub(super) prompt: usize,
    /// Prompt positions that have been reported; they are computed again after a preemption.
    pub(super) prompt_reported: u32,
    /// Tokens that have been generated.
    pub(super) generated: usize,
    /// Time at which it was submitted, and from its start on the time at which its first rows were planned.
    pub(super) planned: Instant,
    /// Time at which the first of them came.
    pub(super) first_token: Option<Instant>,
    /// Time at which the last of them came.
    pub(super) last_token: Option<Instant>,
    pub(super) _hold: PermitHold,
    /// Keeps its adapter in host memory until it is admitted, and with that in a slot.
    pub(super) leases: Option<Arc<Leases>>,
}

impl InFlight {
    /// When it got where, if it has a token.
    pub(super) fn times(&self) -> Option<SequenceTimes> {
        let (first, last) = (self.first_token?, self.last_token?);
        Some(SequenceTimes { planned: self.planned, first, last })
    }

    /// Tells the client that nothing follows. There is a place for it, unless the client has gone.
    pub(super) fn fail(self, failure: Failure) {
        self.outcome.end(failure.end());
        let _ = self.updates.try_send(Update::Failed(failure));
    }
}

/// Steps that have been sent and not answered.
pub(super) struct Steps {
    sent: u64,
    answered: u64,
    /// Time since which the oldest step has been the oldest: a step waits for the one before it.
    since: Instant,
}

impl Steps {
    pub(super) fn new() -> Steps {
        Steps { sent: 0, answered: 0, since: Instant::now() }
    }

    pub(super) fn sent(&mut self, id: u64) {
        if self.sent == self.answered {
            self.since = Instant::now();
        }
        self.sent = id;
    }

    /// Takes the answer of the oldest step, and no other.
    pub(super) fn answered(&mut self, id: u64, now: Instant) -> Result<(), RankError> {
        let expected = self.answered + 1;
        if id != expected || id > self.sent {
            return Err(RankError::UnexpectedStep { actual: id, expected });
        }
        self.answered = id;
        self.since = now;
        Ok(())
    }

    /// Time since the oldest one became the oldest; zero if there is none.
    pub(super) fn age(&self) -> Duration {
        if self.sent > self.answered { self.since.elapsed() } else { Duration::ZERO }
    }

    /// Fails if the oldest one is too old.
    pub(super) fn check(&self, limit: Duration) -> Result<(), RankError> {
        if self.age() > limit {
            return Err(RankError::LateStep { step: self.answered + 1, limit });
        }
        Ok(())
    }
}
