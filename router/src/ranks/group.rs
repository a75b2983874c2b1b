//! A session with all ranks.

use std::{
    mem,
    time::{Duration, Instant},
};

use futures::{
    Stream, StreamExt,
    stream::{self, BoxStream, SelectAll},
};
use prost::bytes::Bytes;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::{
    RankError,
    loads::{Loaded, Loads},
    merge::Resident,
    steps,
};
use crate::wire::{self, Event, Info};

/// Messages that a rank may have ahead of it. Two steps are in flight, each with one message of masks at most, and the
/// ranks of a model run each step together, so only one that has stopped reading is further behind.
const STEPS: usize = 16;

/// A message of a rank, or the end of its stream.
type Message = (usize, Result<proto::ExecuteEvent, RankError>);

/// A session with all ranks: each gets every step, and the end of any is the end of the group.
pub(crate) struct Group {
    /// The model that the ranks serve together.
    pub(crate) info: Info,
    /// The adapters that were in slots when the session began.
    pub(crate) resident: Resident,
    session: u64,
    /// For each rank, where encoded steps go.
    steps: Vec<mpsc::Sender<Bytes>>,
    messages: SelectAll<BoxStream<'static, Message>>,
    loads: Loads,
}

/// The two ends of a rank's stream of steps.
pub(super) fn channel() -> (mpsc::Sender<Bytes>, mpsc::Receiver<Bytes>) {
    mpsc::channel(STEPS)
}

/// One rank's part of a session.
pub(super) struct RankStream {
    pub(super) steps: mpsc::Sender<Bytes>,
    pub(super) events: Streaming<proto::ExecuteEvent>,
}

impl Group {
    pub(super) fn new(session: u64, info: Info, resident: Resident, ranks: Vec<RankStream>) -> Group {
        let loads = Loads::new(ranks.len());
        let mut steps = Vec::new();
        let mut messages = SelectAll::new();
        for (rank, stream) in ranks.into_iter().enumerate() {
            steps.push(stream.steps);
            messages.push(messages_of(rank, stream.events).boxed());
        }
        Group { info, resident, session, steps, messages, loads }
    }

    /// Sends a step to every rank.
    pub(crate) fn send(&mut self, mut step: proto::Step) -> Result<(), RankError> {
        step.session = self.session;
        let now = Instant::now();
        for (slot, key) in wire::loads(&step) {
            self.loads.sent(slot, key, now);
        }
        // With the first step, each rank empties the slots that not all ranks have.
        let beyond = mem::take(&mut self.resident.beyond);
        let of_its_own = |rank: usize| {
            let slots = beyond.get(rank).filter(|slots| !slots.is_empty())?;
            let unload = step.unload.iter().chain(slots).copied().collect();
            Some(steps::encode(proto::Step { unload, ..step.clone() }))
        };
        let own: Vec<_> = (0..self.steps.len()).map(of_its_own).collect();
        let same = steps::encode(step);
        for ((rank, steps), own) in self.steps.iter().enumerate().zip(own) {
            let message = own.unwrap_or_else(|| same.clone());
            steps.try_send(message).map_err(|error| not_sent(rank, &error))?;
        }
        Ok(())
    }

    /// Sends masks of a step to every rank.
    pub(crate) fn send_masks(&mut self, mut masks: proto::Masks) -> Result<(), RankError> {
        masks.session = self.session;
        let same = steps::encode_masks(masks);
        for (rank, steps) in self.steps.iter().enumerate() {
            steps.try_send(same.clone()).map_err(|error| not_sent(rank, &error))?;
        }
        Ok(())
    }

    /// The next event of the group. Dropping the future loses no event.
    pub(crate) async fn next(&mut self) -> Result<Event, RankError> {
        loop {
            // Every rank has a stream, and the end of one is a message.
            let (rank, message) = self.messages.next().await.ok_or(RankError::Ended { rank: 0 })?;
            let message = message?;
            if message.session != self.session {
                tracing::debug!(rank, session = message.session, "ignored an event of another session");
                continue;
            }
            match wire::event(message).map_err(|source| RankError::Wire { rank, source })? {
                Event::Step(_) if rank != 0 => return Err(RankError::UnexpectedResult { rank }),
                Event::Step(result) => return Ok(Event::Step(result)),
                Event::Slot { slot, key, error } => {
                    if let Some(Loaded { slot, key, error }) = self.loads.reported(rank, slot, key, error)? {
                        return Ok(Event::Slot { slot, key, error });
                    }
                }
            }
        }
    }

    /// Fails if a load into a slot was sent longer than `limit` ago.
    pub(crate) fn check_loads(&self, limit: Duration) -> Result<(), RankError> {
        self.loads.overdue(limit, Instant::now()).map_or(Ok(()), Err)
    }
}

fn not_sent(rank: usize, error: &mpsc::error::TrySendError<Bytes>) -> RankError {
    match error {
        mpsc::error::TrySendError::Full(_) => RankError::Behind { rank, steps: STEPS },
        mpsc::error::TrySendError::Closed(_) => RankError::Ended { rank },
    }
}

fn messages_of(
    rank: usize,
    events: Streaming<proto::ExecuteEvent>,
) -> impl Stream<Item = Message> + Send + 'static {
    let failed = move |status: Status| RankError::Status { rank, message: status.message().to_owned() };
    let messages = events.map(move |message| (rank, message.map_err(failed)));
    messages.chain(stream::iter([(rank, Err(RankError::Ended { rank }))]))
}
