//! Processes that live and die together: the ranks of a model, or the router alone.

use std::time::{Duration, Instant};

use futures::future::{join_all, select_all};
use tokio::time::sleep_until;

use crate::{
    child::{Child, End},
    supervisor::Failure,
};

/// The first wait before a restart. Each further one is twice as long.
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
/// The longest wait before a restart.
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
/// After running this long, a group is taken to be well, and its next restart is as quick as the first.
const STABLE: Duration = Duration::from_secs(60);

/// A group that is started again whenever one of its members ends.
pub(crate) struct Group<Start> {
    start: Start,
    members: Vec<Child>,
    phase: Phase,
    started: Instant,
    backoff: Duration,
    /// The number of times that the group was started.
    lives: usize,
    /// Whether all members have served at the same time at some point.
    served: bool,
}

enum Phase {
    Running,
    /// One member has ended, and the others are being killed.
    Ending,
    /// All members are gone, and new ones start then.
    Waiting(Instant),
}

impl<Start: Fn() -> Result<Vec<Child>, Failure>> Group<Start> {
    /// Starts the members.
    pub(crate) fn start(start: Start) -> Result<Group<Start>, Failure> {
        let members = start()?;
        Ok(Group {
            start,
            members,
            phase: Phase::Running,
            started: Instant::now(),
            backoff: FIRST_BACKOFF,
            lives: 1,
            served: false,
        })
    }

    /// Time since the group was last started, and the number of times that it was started.
    pub(crate) fn life(&self) -> (Duration, usize) {
        (self.started.elapsed(), self.lives)
    }

    /// Returns whether all members have served at the same time, since the last start or before it.
    pub(crate) fn has_served(&mut self) -> bool {
        let serve = !self.members.is_empty() && self.members.iter().all(Child::serves);
        self.served |= serve;
        self.served
    }

    /// Keeps the group running until a member ends: its name, and how. Every wait in here can be given up and
    /// taken up again.
    pub(crate) async fn next_end(&mut self) -> Result<(String, End), Failure> {
        loop {
            match self.phase {
                Phase::Running => {
                    let ends = self.members.iter_mut().map(|child| Box::pin(child.ended()));
                    let (end, index, _) = select_all(ends).await;
                    self.phase = Phase::Ending;
                    return Ok((self.members[index].name().to_owned(), end?));
                }
                Phase::Ending => {
                    // The other ranks wait for this one in a collective. New ones must not start before all are gone:
                    // they take the memory that they find free.
                    join_all(self.members.iter_mut().map(Child::kill)).await;
                    self.has_served();
                    self.members.clear();
                    self.phase = Phase::Waiting(Instant::now() + self.next_backoff());
                }
                Phase::Waiting(until) => {
                    sleep_until(until.into()).await;
                    self.members = (self.start)()?;
                    (self.phase, self.started) = (Phase::Running, Instant::now());
                    self.lives += 1;
                }
            }
        }
    }

    fn next_backoff(&mut self) -> Duration {
        if self.started.elapsed() > STABLE {
            self.backoff = FIRST_BACKOFF;
        }
        let wait = self.backoff;
        tracing::warn!("restarting in {:.1} s", wait.as_secs_f32());
        self.backoff = (wait * 2).min(LONGEST_BACKOFF);
        wait
    }

    /// Asks all members to end, and kills them after `patience`. True if all that were running ended in order.
    pub(crate) async fn stop(self, patience: Duration) -> bool {
        match self.phase {
            Phase::Running => {
                let stopped = join_all(self.members.into_iter().map(|child| child.stop(patience))).await;
                stopped.into_iter().all(|in_order| in_order)
            }
            // The members that are left are being killed.
            _ => true,
        }
    }
}
