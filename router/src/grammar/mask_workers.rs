//! The threads that compute masks. The engine asks for a mask as soon as it knows the token before it, and the mask is
//! there, if all is well, before the forward pass of its step has ended.

use std::{
    fmt, io, mem,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use lifecycle::{Pulse, Supervisor};
use sampling::Ban;
use scheduler::RequestId;
use tokio::sync::Notify;

use super::{CompiledGrammar, matchers::Matchers};

/// More threads than this would not find enough to do: a mask takes some tens of microseconds.
const MAX_THREADS: usize = 8;

/// The reason that there is no mask.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MaskError {
    /// The grammar cannot go on, or takes too much to go on with.
    #[error("the grammar cannot be followed any further: {0}")]
    Grammar(String),
    /// The request bans all tokens with which the grammar could go on.
    #[error("the grammar goes on only with tokens that the request bans")]
    Banned,
    /// The sequence has ended.
    #[error("the sequence has ended")]
    Ended,
}

/// The beginning of a sequence.
#[derive(Debug, Clone)]
pub(crate) struct Begin {
    pub(crate) grammar: Arc<CompiledGrammar>,
    /// Before it has so many tokens, those that end a text are allowed only where nothing else is.
    pub(crate) min_tokens: u32,
    /// Tokens that the shards never choose, whatever the mask says.
    pub(crate) bans: Arc<[Ban]>,
}

/// A mask that is wanted.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) sequence: RequestId,
    pub(crate) step: u64,
    /// The tokens that the sequence has got since its last mask.
    pub(crate) tokens: Vec<u32>,
    /// With the first mask of a sequence.
    pub(crate) begin: Option<Begin>,
}

/// A mask that has been computed.
#[derive(Debug)]
pub(crate) struct Computed {
    pub(crate) sequence: RequestId,
    pub(crate) step: u64,
    pub(crate) mask: Result<Vec<u8>, MaskError>,
}

enum Command {
    Mask(Wanted, Arc<Results>),
    End(RequestId),
    Stop,
}

/// Masks on their way back. There is at most one of each sequence.
#[derive(Default)]
pub(crate) struct Results {
    computed: Mutex<Vec<Computed>>,
    pub(crate) added: Notify,
}

impl Results {
    pub(crate) fn take(&self) -> Vec<Computed> {
        mem::take(&mut *lock(&self.computed))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Lists, whose elements are added and taken as a whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What one thread has to do, in order: at most one mask of each sequence, and its end.
#[derive(Default)]
struct Queue {
    commands: Mutex<Vec<Command>>,
    added: Condvar,
    /// Sequences that the thread keeps.
    sequences: AtomicUsize,
}

impl Queue {
    fn add(&self, command: Command) {
        lock(&self.commands).push(command);
        self.added.notify_one();
    }

    fn take(&self, pulse: &Pulse) -> Vec<Command> {
        pulse.idle();
        let mut commands = lock(&self.commands);
        while commands.is_empty() {
            commands = self.added.wait(commands).unwrap_or_else(PoisonError::into_inner);
        }
        pulse.busy();
        mem::take(&mut *commands)
    }
}

/// The thread that keeps the state of a sequence. The state is forgotten when this is dropped.
pub(crate) struct Seat {
    sequence: RequestId,
    queue: Arc<Queue>,
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Seat({:?})", self.sequence)
    }
}

impl Seat {
    /// Has a mask computed, which is added to the results.
    pub(crate) fn want(&self, wanted: Wanted, results: &Arc<Results>) {
        self.queue.add(Command::Mask(wanted, results.clone()));
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.queue.sequences.fetch_sub(1, Ordering::Relaxed);
        self.queue.add(Command::End(self.sequence));
    }
}

/// The threads. They end when this is dropped, which must not be before the process is told to stop.
pub(crate) struct MaskWorkers(Vec<Arc<Queue>>);

impl MaskWorkers {
    /// Starts half as many threads as there are processors. None may take longer than `limit` for a mask.
    pub(crate) fn start(limit: Duration, supervisor: &Supervisor) -> io::Result<MaskWorkers> {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let threads = (processors / 2).clamp(1, MAX_THREADS);
        let start = |index| {
            let (queue, name) = (Arc::new(Queue::default()), format!("masks {index}"));
            let pulse = supervisor.watch(name.clone(), limit);
            supervisor.thread(name, {
                let queue = queue.clone();
                move || work(&queue, &pulse)
            })?;
            Ok(queue)
        };
        (0..threads).map(start).collect::<io::Result<_>>().map(MaskWorkers)
    }

    /// Gives a sequence to the thread that has fewest.
    pub(crate) fn seat(&self, sequence: RequestId) -> Option<Seat> {
        let queue = self.0.iter().min_by_key(|queue| queue.sequences.load(Ordering::Relaxed))?.clone();
        queue.sequences.fetch_add(1, Ordering::Relaxed);
        Some(Seat { sequence, queue })
    }
}

impl Drop for MaskWorkers {
    fn drop(&mut self) {
        self.0.iter().for_each(|queue| queue.add(Command::Stop));
    }
}

fn work(queue: &Queue, pulse: &Pulse) {
    let mut matchers = Matchers::default();
    loop {
        // Results of what came together are told together: a step waits for the last of its masks anyway.
        let mut told: Option<Arc<Results>> = None;
        for command in queue.take(pulse) {
            pulse.beat();
            match command {
                Command::Stop => return,
                Command::End(sequence) => matchers.end(sequence),
                Command::Mask(Wanted { sequence, step, tokens, begin }, results) => {
                    begin.into_iter().for_each(|begin| matchers.begin(sequence, begin));
                    let mask = matchers.mask(sequence, &tokens);
                    lock(&results.computed).push(Computed { sequence, step, mask });
                    if let Some(last) = told.replace(results.clone())
                        && !Arc::ptr_eq(&last, &results)
                    {
                        last.added.notify_one();
                    }
                }
            }
        }
        told.into_iter().for_each(|results| results.added.notify_one());
    }
}
