//! Records what the exchange is told and what it decides, so that a run can be played again.

use std::{
    fs::OpenOptions,
    io::{self, BufWriter, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use exchange::Limits;
use lifecycle::Supervisor;
use tokio::sync::mpsc;

/// The thread's name, also in the log.
const NAME: &str = "adapter trace";
/// Lines on their way to the file.
const LINES: usize = 4096;

/// A trace that is being recorded.
pub(super) struct Trace {
    lines: mpsc::Sender<String>,
}

impl Trace {
    /// Begins a new file, which a thread of its own writes.
    pub(super) fn start(path: &Path, limits: &Limits, supervisor: &Supervisor) -> io::Result<Trace> {
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        let mut file = BufWriter::new(file);
        writeln!(file, "{}", exchange::trace::limits(limits))?;
        let (lines, mut received) = mpsc::channel::<String>(LINES);
        supervisor.thread(NAME, move || {
            if let Err(error) = write(&mut file, &mut received) {
                tracing::error!("the trace of adapters ends here: {error}");
                // The server goes on without it.
                while received.blocking_recv().is_some() {}
            }
        })?;
        Ok(Trace { lines })
    }

    /// Adds a line.
    pub(super) async fn record(&self, line: String) {
        // The thread ends only when the process does.
        let _ = self.lines.send(line).await;
    }
}

/// Writes lines until no more can come. A line is in the file before the thread waits for another one.
fn write(file: &mut impl Write, lines: &mut mpsc::Receiver<String>) -> io::Result<()> {
    while let Some(mut line) = lines.blocking_recv() {
        loop {
            writeln!(file, "{line}")?;
            match lines.try_recv() {
                Ok(next) => line = next,
                Err(_) => break,
            }
        }
        file.flush()?;
    }
    Ok(())
}
