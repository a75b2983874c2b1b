//! The step loop: one thread that owns the model's state and runs what it is sent, in order.

mod heartbeat;
mod idle;
mod pass;
mod pipeline;
mod pooling;
mod sampling;
mod sequence;
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

use crate::{
    adapters::Adapters,
    step::{Event, Masks, Step},
};
pub use heartbeat::Heartbeat;
use pipeline::Pipeline;
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
    /// Give a step its masks.
    Masks {
        /// The id of the [`EventStream`] that they came with.
        stream: u64,
        /// The masks.
        masks: Masks,
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
    pipeline: Pipeline<B>,
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
            pipeline: Pipeline::default(),
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
        loop {
            let command = if self.pipeline.is_running() || self.state.is_loading() {
                commands.try_recv()
            } else {
                commands.blocking_recv().ok_or(TryRecvError::Disconnected)
            };
            self.heartbeat.turn();
            match command {
                // Neither the next step nor this one's result may wait for the other.
                Err(TryRecvError::Empty) if self.pipeline.is_running() => thread::yield_now(),
                Err(TryRecvError::Empty) => thread::park_timeout(LOAD_POLL),
                Err(TryRecvError::Disconnected) => return Ok(()),
                Ok(command) => {
                    if !self.pipeline.is_running() {
                        self.set_oldest(Some(Instant::now()), pulse);
                    }
                    self.handle(command)?;
                }
            }
            self.advance()?;
            for event in self.state.slot_events()? {
                self.session.emit(event);
            }
            self.set_oldest(self.pipeline.oldest(), pulse);
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

    fn handle(&mut self, command: Command) -> kernels::Result<()> {
        match command {
            Command::Attach { session, held } => {
                // Nothing that the new session does may overtake the steps in flight, whose results nobody wants.
                self.pipeline.abandon(&mut self.state)?;
                self.session.begin(session);
                let kept = self.state.begin_session()?;
                // Whoever asked may be gone.
                let _ = held.send(kept);
            }
            Command::Execute(stream) => self.session.join(stream),
            Command::Step { stream, step } if self.session.hears(stream) => {
                let step = step.and_then(|step| self.session.take(&step).map(|()| step));
                self.pipeline.push(step);
            }
            Command::Masks { stream, masks } if self.session.hears(stream) => {
                match self.session.expect(masks.session) {
                    Ok(()) => self.pipeline.add_masks(masks),
                    Err(error) => self.pipeline.push(Err(error)),
                }
            }
            // It comes from a stream that has ended: there is nobody to answer to.
            Command::Step { .. } | Command::Masks { .. } => {}
        }
        Ok(())
    }

    /// Launches what can be launched, and answers the steps that have ended.
    fn advance(&mut self) -> kernels::Result<()> {
        loop {
            if let Err(refused) = self.pipeline.launch(&mut self.state)? {
                self.session.fail(refused);
            }
            match self.pipeline.poll(&mut self.state)? {
                Some(result) => self.session.emit(Event::Step(result)),
                None => return Ok(()),
            }
        }
    }
}
