//! The log of all programs: lines on stderr, as text or as JSON, of the levels that `LOG_LEVEL` asks for.
//!
//! Nobody waits for the log. A thread of its own writes it; when whoever reads stderr stalls, lines wait in a bounded
//! queue and are then dropped, and when the reader is gone, lines go nowhere. Neither can stop or end the program.

mod level;
pub mod testing;

use std::{
    fs::File,
    io::{self, IsTerminal, Write},
    os::fd::AsFd,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};

pub use level::LevelError;
use level::filter;

/// Lines that wait for a reader of stderr. Those that come then are dropped.
const WAITING: usize = 8192;

static WRITER: Mutex<Option<WorkerGuard>> = Mutex::new(None);

/// The log of this process. Dropping it writes what waits.
pub struct Log {
    lines: Lines,
}

/// Writes lines of others to the log, as they are. Clones write to the same log.
#[derive(Clone)]
pub struct Lines {
    queue: NonBlocking,
    dropped: ErrorCounter,
    /// The number of dropped lines that the log told last.
    told: Arc<AtomicUsize>,
}

/// The reason that there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `LOG_LEVEL` is not a level.
    #[error("LOG_LEVEL: {0}")]
    Level(#[from] LevelError),
    /// Its thread or its file cannot be had.
    #[error("the log: {0}")]
    Io(#[from] io::Error),
}

impl LogError {
    /// Returns whether the environment is at fault.
    pub fn is_usage(&self) -> bool {
        matches!(self, LogError::Level(_))
    }
}

/// Starts the log of this process, which panics go to as well. To be called once, at the start of the program.
pub fn start(json: bool) -> Result<Log, LogError> {
    let filter = filter()?;
    // Not `io::stderr`, whose lock would be held for as long as a reader stalls.
    let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let (queue, writer) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(WAITING)
        .thread_name("log")
        .finish(stderr);
    *WRITER.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(queue.clone())
        .with_ansi(io::stderr().is_terminal())
        .log_internal_errors(false);
    if json {
        log.json().init()
    } else {
        log.with_target(false).init()
    }
    panic::set_hook(Box::new(log_panic));
    Ok(Log { lines: Lines { dropped: queue.error_counter(), queue, told: Arc::default() } })
}

/// Writes what waits, unless nobody reads it for a second. Later lines are lost.
pub fn flush() {
    let writer = WRITER.lock().unwrap_or_else(PoisonError::into_inner).take();
    // Where it cannot write, it prints that, which panics if stdout is closed.
    let _ = panic::catch_unwind(AssertUnwindSafe(|| drop(writer)));
}

/// The default hook writes to stderr itself, which may block.
fn log_panic(panic: &panic::PanicHookInfo<'_>) {
    let message = panic.payload_as_str().unwrap_or("no message");
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("unnamed");
    let backtrace = std::backtrace::Backtrace::capture();
    if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
        tracing::error!("thread {thread:?} panicked at {place}: {message}\n{backtrace}");
    } else {
        tracing::error!("thread {thread:?} panicked at {place}: {message}");
    }
}

impl Log {
    /// For lines that are no events of this process.
    pub fn lines(&self) -> Lines {
        self.lines.clone()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        flush();
    }
}

impl Lines {
    /// Writes a line after a prefix. Never blocks: a line for which there is no room is dropped, and once there is room
    /// again the log says how many were.
    pub fn write(&self, prefix: &str, line: &[u8]) {
        let before = self.dropped.dropped_lines();
        let line = [prefix.as_bytes(), line, b"\n"].concat();
        // Where it was not queued, it was counted.
        let _ = self.queue.clone().write_all(&line);
        let dropped = self.dropped.dropped_lines();
        if dropped == before && dropped > self.told.swap(dropped, Relaxed) {
            tracing::warn!("{dropped} lines of the log were dropped so far, because nobody read it");
        }
    }
}
