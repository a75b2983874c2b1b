//! The step loop: one thread that owns the model's state and runs what it is sent, in order.

mod idle;
mod pass;
mod rehearse;
mod state;

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use kernels::Backend;
use model::Model;
use tokio::sync::{
    mpsc::{Receiver, Sender, error::TryRecvError},
    oneshot,
};

use crate::{
    adapters::Adapters,
    step::{Event, Step},
};
use state::State;
pub use state::{Limits, StepError};

/// How often an idle loop looks whether an adapter has arrived: far less than the milliseconds that a copy takes.
const LOAD_POLL: Duration = Duration::from_micros(50);

/// What the loop is sent.
pub enum Command {
    /// Run a step, or refuse what came in its place.
    Step(Result<Box<Step>, StepError>),
    /// Send events here from now on.
    Attach(Sender<Result<Event, StepError>>),
    /// Forget everything that runs.
    Reset(oneshot::Sender<()>),
}

/// A model, the memory that it computes in, and everybody who listens.
pub struct Engine<B: Backend> {
    state: State<B>,
    events: Option<Sender<Result<Event, StepError>>>,
}

impl<B: Backend> Engine<B> {
    /// Sets memory aside, but for keys and values.
    pub fn new(
        ops: Arc<B>,
        model: Arc<Model<B>>,
        adapters: Arc<Adapters<B>>,
        limits: Limits,
    ) -> kernels::Result<Engine<B>> {
        Ok(Engine { state: State::new(ops, model, adapters, limits)?, events: None })
    }

    /// Runs the largest step and others like it: what the device has left afterwards is free for keys, values and
    /// adapters.
    pub fn rehearse(&mut self) -> kernels::Result<()> {
        self.state.set_blocks(self.state.largest_blocks())?;
        self.state.rehearse_prefill()
    }

    /// Sets aside blocks for keys and values, and prepares the steps that use them.
    pub fn set_blocks(&mut self, num_blocks: usize) -> kernels::Result<()> {
        self.state.set_blocks(num_blocks)?;
        self.state.record()
    }

    /// Runs until all senders are gone. Errors: the device failed; nothing that it holds can be trusted.
    pub fn run(mut self, mut commands: Receiver<Command>) -> kernels::Result<()> {
        let mut launched: Option<pass::Launched<B>> = None;
        loop {
            let command = if launched.is_some() || self.state.is_loading() {
                commands.try_recv()
            } else {
                commands.blocking_recv().ok_or(TryRecvError::Disconnected)
            };
            match command {
                // Neither the next step nor this one's result may wait for the other.
                Err(TryRecvError::Empty) if launched.is_some() => thread::yield_now(),
                Err(TryRecvError::Empty) => thread::park_timeout(LOAD_POLL),
                Err(TryRecvError::Disconnected) => return Ok(()),
                Ok(Command::Attach(events)) => self.events = Some(events),
                Ok(Command::Reset(done)) => {
                    launched = None;
                    self.events = None;
                    self.state.reset()?;
                    // Whoever asked may be gone.
                    let _ = done.send(());
                }
                // Steps of a stream that has failed have nobody to answer to.
                Ok(Command::Step(_)) if self.events.is_none() => {}
                Ok(Command::Step(step)) => {
                    let next = match step {
                        Ok(step) => self.state.launch(&step, Instant::now())?,
                        Err(refused) => Err(refused),
                    };
                    self.finish(&mut launched)?;
                    match next {
                        Ok(next) => launched = Some(next),
                        Err(refused) => {
                            self.emit(Err(refused));
                            self.events = None;
                        }
                    }
                }
            }
            if launched.as_ref().is_some_and(|launched| self.state.is_ready(launched)) {
                self.finish(&mut launched)?;
            }
            for event in self.state.slot_events()? {
                self.emit(Ok(event));
            }
        }
    }

    fn finish(&mut self, launched: &mut Option<pass::Launched<B>>) -> kernels::Result<()> {
        if let Some(launched) = launched.take() {
            let result = self.state.collect(launched)?;
            self.emit(Ok(Event::Step(result)));
        }
        Ok(())
    }

    fn emit(&mut self, event: Result<Event, StepError>) {
        // The channel holds more than the two steps that may be in flight: a send waits only for a router that has
        // stopped reading, and fails only when it is gone.
        if self.events.as_ref().is_some_and(|events| events.blocking_send(event).is_err()) {
            self.events = None;
        }
    }
}
