//! Signs of life for the parent.

use std::{
    fs::File,
    io::{self, Write},
    os::{fd::AsFd, unix::fs::FileTypeExt},
    thread,
    time::Duration,
};

/// Time between two signs of life.
pub const HEARTBEAT: Duration = Duration::from_millis(500);

/// Writes a byte to stdout every [`HEARTBEAT`] from now on, from a thread of its own, until nobody reads stdout any
/// more. The parent learns that the process is not suspended and is given time; whether its parts make progress is
/// for a [`Supervisor`](crate::Supervisor) to say. Where stdout is not a pipe, nobody counts, and nothing is written.
pub fn start_heartbeat() -> io::Result<()> {
    let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    if !stdout.metadata()?.file_type().is_fifo() {
        return Ok(());
    }
    thread::Builder::new().name("heartbeat".into()).spawn(|| {
        let mut stdout = io::stdout();
        while stdout.write_all(b".").and_then(|()| stdout.flush()).is_ok() {
            thread::park_timeout(HEARTBEAT);
        }
    })?;
    Ok(())
}
