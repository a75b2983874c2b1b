//! The session that the router has begun, and the stream that its events go to.

use tokio::sync::mpsc::{Sender, error::TrySendError};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::StepError;
use crate::step::{Event, SessionEvent, Step};

/// Where the events of one Execute call go.
pub struct EventStream {
    /// Tells this call's steps from those of others that are still on their way.
    id: u64,
    events: Sender<Result<SessionEvent, StepError>>,
    /// Dropped with the stream: whoever passes its steps on learns that nobody takes them any more.
    _taken: DropGuard,
}

impl EventStream {
    /// The stream of one call, by a number that no other call has, and what tells that it has ended.
    pub fn new(id: u64, events: Sender<Result<SessionEvent, StepError>>) -> (EventStream, CancellationToken) {
        let ended = CancellationToken::new();
        (EventStream { id, events, _taken: ended.clone().drop_guard() }, ended)
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Session {
    /// Chosen by the router; none before it has begun one.
    number: Option<u64>,
    /// Id of the step that was taken last.
    last_step: u64,
    /// Whether a stream has joined the session, which no other may do then.
    joined: bool,
    stream: Option<EventStream>,
}

impl Session {
    /// Begins a session. The stream of the one before ends.
    pub(super) fn begin(&mut self, number: u64) {
        *self = Session { number: Some(number), ..Session::default() };
    }

    /// Has a stream receive the session's events, or ends it with an error.
    pub(super) fn join(&mut self, stream: EventStream) {
        let refused = match self.number {
            None => StepError::NoSession,
            Some(number) if self.joined => StepError::SecondStream(number),
            Some(_) => {
                self.joined = true;
                self.stream = Some(stream);
                return;
            }
        };
        // Whoever opened the stream may be gone.
        let _ = stream.events.try_send(Err(refused));
    }

    /// Whether a step came over the stream that is listened to. What comes over others has no effect.
    pub(super) fn hears(&self, stream: u64) -> bool {
        self.stream.as_ref().is_some_and(|open| open.id == stream)
    }

    /// Refuses a step of another session, or one that does not follow the one before.
    pub(super) fn take(&mut self, step: &Step) -> Result<(), StepError> {
        self.expect(step.session)?;
        let expected = self.last_step + 1;
        if step.id != expected {
            return Err(StepError::NotConsecutive { got: step.id, expected });
        }
        self.last_step = step.id;
        Ok(())
    }

    /// Refuses what belongs to another session.
    pub(super) fn expect(&self, session: u64) -> Result<(), StepError> {
        if self.number == Some(session) {
            return Ok(());
        }
        Err(StepError::OtherSession { got: session, current: self.number.unwrap_or(0) })
    }

    /// Tells the router of an event. The channel holds more than the slots and the two steps that may be in flight can
    /// cause: a router for which it has no room has stopped reading, and its stream ends.
    pub(super) fn emit(&mut self, event: Event) {
        let Some(session) = self.number else { return };
        let Some(stream) = &self.stream else { return };
        match stream.events.try_send(Ok(SessionEvent { session, event })) {
            Ok(()) => {}
            Err(error) => {
                if matches!(error, TrySendError::Full(_)) {
                    tracing::warn!(session, "the router does not read its events: their stream is ended");
                }
                self.stream = None;
            }
        }
    }

    /// Ends the stream with an error.
    pub(super) fn fail(&mut self, error: StepError) {
        if let Some(stream) = self.stream.take() {
            // A router that does not read sees the end of the stream alone.
            let _ = stream.events.try_send(Err(error));
        }
    }
}
