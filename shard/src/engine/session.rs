//! The router's session, and the stream that carries its events.

use tokio::sync::mpsc::{Sender, error::TrySendError};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::StepError;
use crate::step::{Event, SessionEvent, Step};

/// The stream of events of one Execute call.
pub struct EventStream {
    /// Tells this call's steps from those of earlier calls that still arrive.
    id: u64,
    events: Sender<Result<SessionEvent, StepError>>,
    /// Cancels the token that [`Self::new`] returned when the stream is dropped, so that no further steps are passed
    /// on.
    _ended: DropGuard,
}

impl EventStream {
    /// Makes the stream of one call; no other call may have the same `id`. The token is cancelled when the stream ends.
    pub fn new(id: u64, events: Sender<Result<SessionEvent, StepError>>) -> (EventStream, CancellationToken) {
        let ended = CancellationToken::new();
        (EventStream { id, events, _ended: ended.clone().drop_guard() }, ended)
    }
}

/// The session that the router has begun, if there is one.
#[derive(Default)]
pub(super) struct Session {
    /// The session's number, which the router chose; `None` before the first session.
    number: Option<u64>,
    /// The id of the last step that was accepted.
    last_step: u64,
    /// Whether a stream has joined the session. A second one is refused.
    joined: bool,
    stream: Option<EventStream>,
}

impl Session {
    /// Begins a session, and ends the stream of the one before.
    pub(super) fn begin(&mut self, number: u64) {
        *self = Session { number: Some(number), ..Session::default() };
    }

    /// Sends the session's events over a stream from now on, or ends the stream with an error.
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
        // Sending fails if the router has closed the stream already.
        let _ = stream.events.try_send(Err(refused));
    }

    /// Whether this is the session's stream. Steps of other streams are ignored.
    pub(super) fn hears(&self, stream: u64) -> bool {
        self.stream.as_ref().is_some_and(|open| open.id == stream)
    }

    /// Accepts a step. Errors: it belongs to another session, or its id does not follow the last one.
    pub(super) fn take(&mut self, step: &Step) -> Result<(), StepError> {
        self.expect(step.session)?;
        let expected = self.last_step + 1;
        if step.id != expected {
            return Err(StepError::NotConsecutive { got: step.id, expected });
        }
        self.last_step = step.id;
        Ok(())
    }

    /// Refuses a message of another session.
    pub(super) fn expect(&self, session: u64) -> Result<(), StepError> {
        if self.number == Some(session) {
            return Ok(());
        }
        Err(StepError::OtherSession { got: session, current: self.number.unwrap_or(0) })
    }

    /// Sends an event to the router. The channel has room for more events than all slots and the two steps in flight
    /// can cause. If it is full, the router has stopped reading, and its stream is ended.
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
            // If the channel is full, the router only sees that the stream ends.
            let _ = stream.events.try_send(Err(error));
        }
    }
}
