//! Exit codes, and the ends of a process.

use std::{
    error::Error,
    io::{self, Write},
    sync::{OnceLock, mpsc::sync_channel},
    thread,
    time::Duration,
};

/// Exit code of a configuration that cannot work (sysexits.h).
pub const EX_USAGE: i32 = 64;
/// Exit code of a process that has lost another one without which it cannot work (sysexits.h).
pub const EX_UNAVAILABLE: i32 = 69;
/// Exit code of a fault of the program itself (sysexits.h).
pub const EX_SOFTWARE: i32 = 70;

/// What the log gets to write its last lines.
const LAST_LINES: Duration = Duration::from_secs(1);

static FLUSH: OnceLock<fn()> = OnceLock::new();

/// Names the function that writes what is still buffered of the log. It is called before the process ends by
/// [`exit`], by [`end_now`], by [`fail`] or by a supervisor. Only the first call counts.
pub fn before_exit(flush: fn()) {
    // A second one is ignored, as documented.
    let _ = FLUSH.set(flush);
}

/// Writes the last lines of the log and exits in order.
pub fn exit(code: i32) -> ! {
    last_lines(|| ());
    std::process::exit(code)
}

/// Prints an error with its causes to stderr, after the last lines of the log, and exits.
pub fn fail(code: i32, error: &(dyn Error + 'static)) -> ! {
    let text = with_causes(error);
    last_lines(move || {
        // Where stderr is closed, the exit code is all that can be told.
        let _ = writeln!(io::stderr(), "error: {text}");
    });
    std::process::exit(code)
}

/// An error and its causes in one line. A cause that the error's own text holds already is not repeated.
fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let message = cause.to_string();
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        next = cause.source();
    }
    text
}

/// Writes the last lines of the log and ends the process at once. Nothing is dropped, and none of the handlers run that
/// [`exit`] runs: those of a GPU's driver can hang when its work does, and to give back memory that the driver has locked
/// takes it seconds, while the kernel takes all of it back together.
pub fn end_now(code: i32) -> ! {
    last_lines(|| ());
    signal_hook::low_level::exit(code)
}

/// Writes what is buffered of the log, then does `more`, and returns when it is done or takes too long: whoever reads
/// the log may have stalled.
fn last_lines(more: impl FnOnce() + Send + 'static) {
    let (done, written) = sync_channel(1);
    let writing = thread::Builder::new().name("last lines".into()).spawn(move || {
        if let Some(flush) = FLUSH.get() {
            flush();
        }
        more();
        // The receiver may have given up.
        let _ = done.send(());
    });
    if writing.is_ok() {
        // Either way the process ends.
        let _ = written.recv_timeout(LAST_LINES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Layer>>,
    }

    fn layers(texts: &[&'static str]) -> Layer {
        let source = (texts.len() > 1).then(|| Box::new(layers(&texts[1..])));
        Layer { text: texts[0], source }
    }

    #[test]
    fn causes_are_told_once() {
        for (texts, line) in [
            (&["a"][..], "a"),
            (&["opening x", "no such file"], "opening x: no such file"),
            (&["opening x: no such file", "no such file"], "opening x: no such file"),
            (&["a", "b", "c"], "a: b: c"),
            (&["a: c", "b", "c"], "a: c: b"),
        ] {
            assert_eq!(with_causes(&layers(texts)), line);
        }
    }
}
