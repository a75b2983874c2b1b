//! Signs of life for the parent.

use std::{
    fs::File,
    io::{self, Write},
    os::{fd::AsFd, unix::fs::FileTypeExt},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, Thread},
    time::Duration,
};

/// Time between two signs of life.
pub const HEARTBEAT: Duration = Duration::from_millis(500);
/// The sign of life of a process that starts.
pub const STARTING: u8 = b'.';
/// The sign of life of a process that serves.
pub const SERVING: u8 = b'+';

/// Writes a byte to stdout every [`HEARTBEAT`], from a thread of its own, until nobody reads stdout any more.
///
/// The parent learns that the process is not suspended and is given time, and whether it has started. Whether its
/// parts make progress is for a [`Supervisor`](crate::Supervisor) to say.
pub(crate) struct Heartbeat {
    serving: Arc<AtomicBool>,
    thread: Option<Thread>,
}

impl Heartbeat {
    /// Starts to beat, as a process that starts. Where stdout is not a pipe, nobody counts, and nothing is written.
    pub(crate) fn start() -> io::Result<Heartbeat> {
        let serving = Arc::new(AtomicBool::new(false));
        let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        if !stdout.metadata()?.file_type().is_fifo() {
            return Ok(Heartbeat { serving, thread: None });
        }
        let flag = serving.clone();
        let thread = thread::Builder::new().name("heartbeat".into()).spawn(move || {
            let mut stdout = stdout;
            while stdout.write_all(&[if flag.load(Relaxed) { SERVING } else { STARTING }]).is_ok() {
                thread::park_timeout(HEARTBEAT);
            }
        })?;
        Ok(Heartbeat { serving, thread: Some(thread.thread().clone()) })
    }

    /// Tells the parent, at once, that the process serves.
    pub(crate) fn serving(&self) {
        self.serving.store(true, Relaxed);
        if let Some(thread) = &self.thread {
            thread.unpark();
        }
    }
}
