//! The step loop: one thread that owns all state of the model and runs the commands that it receives, in order.

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
    adapters::{Adapters, Properties},
    agreement,
    step::{Event, Masks, Step},
};
pub use heartbeat::Heartbeat;
use pipeline::Pipeline;
pub use session::EventStream;
use session::Session;
use state::State;
pub use state::{Limits, StepError};

/// How long an idle loop sleeps before it checks again whether an adapter's copy has ended. Copies take milliseconds.
const LOAD_POLL: Duration = Duration::from_micros(50);

/// A command to the loop.
pub enum Command {
    /// Begin a session: end the previous session's stream, and drop its sequences.
    Attach {
        /// The session's number.
        session: u64,
        /// Receives the answer.
        held: oneshot::Sender<Held>,
    },
    /// Send the session's events over this stream.
    Execute(EventStream),
    /// Run a step, or end the stream if its message was not a valid step.
    Step {
        /// The id of the [`EventStream`] of the call that it came over.
        stream: u64,
        /// The step.
        step: Result<Box<Step>, StepError>,
    },
    /// Pass masks to a step that was sent before.
    Masks {
        /// The id of the [`EventStream`] of the call that they came over.
        stream: u64,
        /// The masks.
        masks: Masks,
    },
}

/// Adapters that outlive a session.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Held {
    /// The slots that are ready, each with its adapter and the bytes that it takes on the device.
    pub slots: Vec<(u32, ContentHash, usize)>,
    /// The adapters in host memory, used last told last.
    pub host: Vec<Arc<Properties>>,
}

/// The state of the step loop: a model, its memory, and the router's session.
pub struct Engine<B: Backend> {
    state: State<B>,
    session: Session,
    pipeline: Pipeline<B>,
    heartbeat: Arc<Heartbeat>,
    longest_step: Duration,
    /// When the oldest unfinished work began, as of the last turn.
    oldest: Option<Instant>,
}

impl<B: Backend> Engine<B> {
    /// Allocates all memory except that of the KV cache.
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

    /// Runs the largest step and other prefill steps, and measures how long the largest takes. The memory that the
    /// device has left afterwards is free for the KV cache and adapters.
    pub fn warm_up(&mut self) -> kernels::Result<()> {
        self.state.set_blocks(self.state.largest_blocks())?;
        let longest_step = self.state.warm_up_prefill()?;
        self.set_longest_step(longest_step)
    }

    /// Allocates the KV cache, and captures the CUDA graphs of decode steps on a device that has them.
    pub fn set_blocks(&mut self, num_blocks: usize) -> kernels::Result<()> {
        self.state.set_blocks(num_blocks)?;
        self.state.capture_graphs()
    }

    /// Runs a small step, and estimates from it how long the largest one would take: for a device on which
    /// [`Self::warm_up`] would take too long.
    pub fn estimate_longest_step(&mut self) -> kernels::Result<()> {
        let longest_step = self.state.estimate_longest_step()?;
        self.set_longest_step(longest_step)
    }

    /// Notes how long the largest step takes on the slowest rank.
    fn set_longest_step(&mut self, own: Duration) -> kernels::Result<()> {
        let longest = agreement::largest(self.state.group(), own.as_micros() as usize)?;
        self.longest_step = Duration::from_micros(longest as u64);
        Ok(())
    }

    /// How long the largest step takes.
    pub fn longest_step(&self) -> Duration {
        self.longest_step
    }

    /// The heartbeat, by which other threads see whether the loop is alive.
    pub fn heartbeat(&self) -> Arc<Heartbeat> {
        self.heartbeat.clone()
    }

    /// Runs until all senders are dropped. `pulse` is busy while there is work, and is told whenever the oldest of it
    /// has been finished. Errors: the device failed, and its memory can no longer be trusted.
    pub fn run(mut self, mut commands: Receiver<Command>, pulse: &Pulse) -> kernels::Result<()> {
        loop {
            let command = if self.pipeline.is_running() || self.state.is_loading() {
                commands.try_recv()
            } else {
                commands.blocking_recv().ok_or(TryRecvError::Disconnected)
            };
            self.heartbeat.turn();
            match command {
                // Poll for both the next command and the running step's result: neither may delay the other.
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

    /// Publishes when the oldest unfinished work began.
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
                // The steps in flight must end before the new session changes anything; their results are dropped.
                self.pipeline.abandon(&mut self.state)?;
                self.session.begin(session);
                let kept = self.state.begin_session(session)?;
                // Sending fails if the caller has gone away.
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
            // These came over a stream that has ended.
            Command::Step { .. } | Command::Masks { .. } => {}
        }
        Ok(())
    }

    /// Launches all steps that can be launched, and sends the results of those that have ended.
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
