//! The step loop: one thread that owns the model's state and runs what it is sent, in order.

mod heartbeat;
mod idle;
mod pass;
mod session;
mod state;
mod warm_up;

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use kernels::Backend;
use lifecycle::Pulse;
use model::{Model, adapter::ContentHash};
use tokio::sync::{
    mpsc::{Receiver, error::TryRecvError},
    oneshot,
};

use crate::{adapters::Adapters, step::Step};
pub use heartbeat::Heartbeat;
pub use session::EventStream;
use session::Session;
use state::State;
pub use state::{Limits, StepError};

/// How often an idle loop checks whether an adapter has arrived: far less than the milliseconds that a copy takes.
const LOAD_POLL: Duration = Duration::from_micros(50);

/// What the loop is sent.
pub enum Command {
    /// Begin a session: end the stream of the one before, and forget its sequences.
    Attach {
        /// The session's number.
        session: u64,
        /// Where to answer.
        held: oneshot::Sender<Held>,
    },
    /// Send the session's events here.
    Execute(EventStream),
    /// Run a step, or refuse what came in its place.
    Step {
        /// The id of the [`EventStream`] that it came with.
        stream: u64,
        /// The step.
        step: Result<Box<Step>, StepError>,
    },
}

/// Adapters that outlive a session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held {
    /// Slots whose adapters are ready: the slot, its adapter, the bytes that it takes there.
    pub slots: Vec<(u32, ContentHash, usize)>,
    /// Adapters in host memory, and the bytes that each takes there.
    pub host: Vec<(ContentHash, usize)>,
}

/// A model, the memory that it computes in, and whoever listens.
pub struct Engine<B: Backend> {
    state: State<B>,
    session: Session,
    heartbeat: Arc<Heartbeat>,
    longest_step: Duration,
    /// When the oldest work that is not finished began, as of the last turn.
    oldest: Option<Instant>,
}

impl<B: Backend> Engine<B> {
    /// Sets memory aside, but for keys and values.
    pub fn new(
        ops: Arc<B>,
        model: Arc<Model<B>>,
        adapters: Arc<Adapters<B>>,
        limits: Limits,
    ) -> kernels::Result<Engine<B>> {
        Ok(Engine {
            state: State::new(ops, model, adapters, limits)?,
            session: Session::default(),
            heartbeat: Arc::default(),
            longest_step: Duration::ZERO,
            oldest: None,
        })
    }

    /// Runs the largest step and others like it, and notes how long the largest takes: what the device has left
    /// afterwards is free for keys, values and adapters.
    pub fn warm_up(&mut self) -> kernels::Result<()> {
        self.state.set_blocks(self.state.largest_blocks())?;
        self.longest_step = self.state.warm_up_prefill()?;
        Ok(())
    }

    /// Sets aside blocks for keys and values, and prepares the steps that use them.
    pub fn set_blocks(&mut self, num_blocks: usize) -> kernels::Result<()> {
        self.state.set_blocks(num_blocks)?;
        self.state.record()
    }

    /// Runs a step of modest size and infers how long the largest one would take: for a device that
    /// [`Self::warm_up`] would keep from serving for too long.
    pub fn estimate_longest_step(&mut self) -> kernels::Result<()> {
        self.longest_step = self.state.estimate_longest_step()?;
        Ok(())
    }

    /// How long the largest step takes.
    pub fn longest_step(&self) -> Duration {
        self.longest_step
    }

    /// What tells others whether the loop is alive.
    pub fn heartbeat(&self) -> Arc<Heartbeat> {
        self.heartbeat.clone()
    }

    /// Runs until all senders are gone; `pulse` is busy while there is work, and beats when some of it is finished.
    /// Errors: the device failed; nothing that it holds can be trusted.
    pub fn run(mut self, mut commands: Receiver<Command>, pulse: &Pulse) -> kernels::Result<()> {
        let mut launched: Option<pass::Launched<B>> = None;
        loop {
            let command = if launched.is_some() || self.state.is_loading() {
                commands.try_recv()
            } else {
                commands.blocking_recv().ok_or(TryRecvError::Disconnected)
            };
            self.heartbeat.turn();
            match command {
                // Neither the next step nor this one's result may wait for the other.
                Err(TryRecvError::Empty) if launched.is_some() => thread::yield_now(),
                Err(TryRecvError::Empty) => thread::park_timeout(LOAD_POLL),
                Err(TryRecvError::Disconnected) => return Ok(()),
                Ok(command) => {
                    if launched.is_none() {
                        self.set_oldest(Some(Instant::now()), pulse);
                    }
                    self.handle(command, &mut launched)?;
                }
            }
            if launched.as_ref().is_some_and(|launched| self.state.is_ready(launched)) {
                self.finish(&mut launched)?;
            }
            for event in self.state.slot_events()? {
                self.session.emit(event);
            }
            self.set_oldest(launched.as_ref().map(pass::Launched::started), pulse);
        }
    }

    /// Shows others the oldest work that is not finished.
    fn set_oldest(&mut self, oldest: Option<Instant>, pulse: &Pulse) {
        if oldest == self.oldest {
            return;
        }
        self.oldest = oldest;
        self.heartbeat.set_oldest(oldest);
        match oldest {
            Some(_) => pulse.busy(),
            None => pulse.idle(),
        }
    }

    fn handle(&mut self, command: Command, launched: &mut Option<pass::Launched<B>>) -> kernels::Result<()> {
        match command {
            Command::Attach { session, held } => {
                // Nothing that the new session does may overtake the step in flight, whose result nobody wants.
                if let Some(launched) = launched.take() {
                    self.state.collect(launched)?;
                }
                self.session.begin(session);
                let kept = self.state.begin_session()?;
                // Whoever asked may be gone.
                let _ = held.send(kept);
            }
            Command::Execute(stream) => self.session.join(stream),
            Command::Step { stream, step } if self.session.hears(stream) => {
                let step = step.and_then(|step| self.session.take(&step).map(|()| step));
                let next = match step {
                    Ok(step) => self.state.launch(&step, Instant::now())?,
                    Err(refused) => Err(refused),
                };
                self.finish(launched)?;
                match next {
                    Ok(next) => *launched = Some(next),
                    Err(refused) => self.session.fail(refused),
                }
            }
            // It comes from a stream that has ended: there is nobody to answer to.
            Command::Step { .. } => {}
        }
        Ok(())
    }

    fn finish(&mut self, launched: &mut Option<pass::Launched<B>>) -> kernels::Result<()> {
        if let Some(launched) = launched.take() {
            let result = self.state.collect(launched)?;
            self.session.emit(crate::step::Event::Step(result));
        }
        Ok(())
    }
}
