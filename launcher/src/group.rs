//! Processes that live and die together: the ranks of a model, or the router alone.

use std::{
    io,
    time::{Duration, Instant},
};

use futures::future::{join_all, select_all};
use tokio::time::sleep_until;

use crate::{
    child::{Child, End},
    supervisor::Failure,
};

/// The first wait before a restart. Each further one is twice as long.
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
/// The longest wait before a restart of a group that has not served, which cannot help itself.
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
/// The same for one that has served: whoever lost its answers asks again, and to load a model takes a while anyway.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// After running this long, a group is taken to be well, and its next restart is as quick as the first.
const STABLE: Duration = Duration::from_secs(60);
/// Time for the other members to end once one has ended. They may wait for it in a collective that never returns.
const LAST_WORK: Duration = Duration::from_secs(3);
/// A member that is silent for longer than this when another one has ended is taken to be the cause: ranks that wait
/// for a suspended one give up after about as long as the launcher does. One that has closed its stdout is on its way
/// out, and may take a while to free the memory of its GPU.
const SUSPECT: Duration = Duration::from_secs(2);

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
    /// The same since the last start, once the members have ended.
    served_last: bool,
}

#[derive(Clone, Copy)]
enum Phase {
    Running,
    /// The member `first` has ended like that, and the others were told to end as well.
    Ending {
        first: usize,
        end: End,
        since: Instant,
    },
    /// All members are gone.
    Ended,
    /// New members start then.
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
            served_last: false,
        })
    }

    /// Time since the group was last started, and the number of times that it was started.
    pub(crate) fn life(&self) -> (Duration, usize) {
        (self.started.elapsed(), self.lives)
    }

    /// Returns whether all members have served at the same time, since the last start or before it.
    pub(crate) fn has_served(&mut self) -> bool {
        self.served |= self.serves();
        self.served
    }

    fn serves(&self) -> bool {
        !self.members.is_empty() && self.members.iter().all(Child::serves)
    }

    /// Keeps the group running until it has ended: returns the member that was the cause, and how it ended, once all
    /// members are gone. The future may be dropped and this called again, without anything being lost.
    pub(crate) async fn next_end(&mut self) -> Result<(String, End), Failure> {
        loop {
            match self.phase {
                Phase::Running => {
                    let (first, end) = self.first_end().await?;
                    self.members.iter_mut().for_each(|child| child.must_beat_within(SUSPECT));
                    self.phase = Phase::Ending { first, end, since: Instant::now() };
                }
                Phase::Ending { first, end, since } => {
                    // New members must not start before all are gone: they take the memory that they find free.
                    let mut ends = self.stop_all(since, LAST_WORK).await?;
                    ends[first] = end;
                    let cause = self.cause(&ends, first);
                    self.served_last = self.serves();
                    self.served |= self.served_last;
                    self.members.clear();
                    self.phase = Phase::Ended;
                    return Ok(cause);
                }
                Phase::Ended => self.phase = Phase::Waiting(Instant::now() + self.next_backoff()),
                Phase::Waiting(until) => {
                    sleep_until(until.into()).await;
                    self.members = (self.start)()?;
                    (self.phase, self.started) = (Phase::Running, Instant::now());
                    self.lives += 1;
                }
            }
        }
    }

    /// Waits for the first member to end.
    async fn first_end(&mut self) -> io::Result<(usize, End)> {
        let ends = self.members.iter_mut().map(|child| Box::pin(child.ended()));
        let (end, index, _) = select_all(ends).await;
        let end = end?;
        report(self.members[index].name(), end);
        Ok((index, end))
    }

    async fn stop_all(&mut self, since: Instant, patience: Duration) -> io::Result<Vec<End>> {
        let stopped = join_all(self.members.iter_mut().map(|child| child.stop(since.into(), patience))).await;
        stopped.into_iter().collect()
    }

    /// The member because of which the group has ended: one that hangs, else the first one, unless it ended because it
    /// had lost another one.
    fn cause(&self, ends: &[End], first: usize) -> (String, End) {
        let others = (0..ends.len()).filter(|&index| index != first);
        for index in others.clone() {
            match ends[index] {
                end if end.is_of_its_own() => report(self.members[index].name(), end),
                end => tracing::info!("{} was stopped with it ({end})", self.members[index].name()),
            }
        }
        let mut of_their_own =
            std::iter::once(first).chain(others).filter(|&index| ends[index].is_of_its_own());
        let hangs = ends.iter().position(|end| matches!(end, End::Silent(_)));
        let index = hangs.or_else(|| of_their_own.next()).unwrap_or(first);
        (self.members[index].name().to_owned(), ends[index])
    }

    fn next_backoff(&mut self) -> Duration {
        if self.started.elapsed() > STABLE {
            self.backoff = FIRST_BACKOFF;
        }
        let longest = if self.served_last { LONGEST_PAUSE } else { LONGEST_BACKOFF };
        let wait = self.backoff.min(longest);
        tracing::warn!("restarting in {:.1} s", wait.as_secs_f32());
        self.backoff = (wait * 2).min(LONGEST_BACKOFF);
        wait
    }

    /// Asks all members to end, and kills them after `patience`. True if all that were running ended in order.
    pub(crate) async fn stop(mut self, patience: Duration) -> bool {
        let ending = match self.phase {
            Phase::Ending { since, .. } => Some(since),
            _ => None,
        };
        let patience = if ending.is_some() { LAST_WORK } else { patience };
        let ends = self.stop_all(ending.unwrap_or_else(Instant::now), patience).await;
        ending.is_some() || ends.is_ok_and(|ends| ends.iter().all(End::is_in_order))
    }
}

fn report(name: &str, end: End) {
    match end {
        End::Silent(_) => tracing::error!("{name} hangs ({end}): killing it"),
        _ => tracing::error!("{name} ended ({end})"),
    }
}
