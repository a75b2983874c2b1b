//! One child process: started with the run configuration, watched by its heartbeat, its log passed on, stopped through
//! its stdin.

use std::{
    fmt, io,
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use lifecycle::{EX_UNAVAILABLE, HEARTBEAT, SERVING};
use rustix::process::{Pid, Signal, kill_process_group};
use telemetry::Lines;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader},
    process::{Child as Process, ChildStdin, ChildStdout, Command},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout, timeout_at},
};

/// The longest line of a log. The rest of a longer one is a line of its own.
const LINE: u64 = 16 << 10;
/// A process that was killed is gone within this time, unless it is in a call of a driver that does not return.
const KILLED: Duration = Duration::from_secs(10);
/// Time for the pipes of a process that has ended to end as well. Without it a grandchild could hold them open for
/// ever.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The end of a child.
#[derive(Debug, Clone, Copy)]
pub(crate) enum End {
    /// The process has exited.
    Exited(ExitStatus),
    /// There was no heartbeat for so long. The process is there still.
    Silent(Duration),
    /// It was told to stop, did not, and was killed.
    Killed,
}

impl End {
    /// Returns whether it ended as it was told to.
    pub(crate) fn is_in_order(&self) -> bool {
        matches!(self, End::Exited(status) if status.success())
    }

    /// Returns whether it ended for a reason of its own: not because it was told to, or because it had lost another
    /// process of its group.
    pub(crate) fn is_of_its_own(&self) -> bool {
        match self {
            End::Exited(status) => !matches!(status.code(), Some(0 | EX_UNAVAILABLE)),
            End::Silent(_) => true,
            End::Killed => false,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Exited(status) => write!(f, "{status}"),
            End::Silent(time) => write!(f, "no sign of life for {:.1} s", time.as_secs_f32()),
            End::Killed => write!(f, "killed"),
        }
    }
}

/// The way in which the log of a child is passed on.
#[derive(Clone)]
pub(crate) struct Output {
    /// The launcher's log.
    pub(crate) lines: Lines,
    /// Whether lines are passed on as they are, without the child's name in front.
    pub(crate) plain: bool,
}

/// A running child. Dropping it kills it.
pub(crate) struct Child {
    name: String,
    process: Process,
    /// Its process group, in which is whatever it starts.
    group: Option<Pid>,
    /// How long it was silent, if that was too long.
    hangs: Option<Duration>,
    /// Closing it tells the child to stop. Held apart, because waiting for a process closes its own.
    stdin: Option<ChildStdin>,
    heartbeat: Heartbeat,
    /// The task that passes the log on; `None` once the child has ended.
    log: Option<JoinHandle<()>>,
}

/// Variables that children do not get. They have the keys of callers from the run configuration, which nobody else can
/// read, and what the hub's token opens has been fetched by the launcher.
pub(crate) const SECRETS: [&str; 3] = ["LORAX_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"];

impl Child {
    /// Starts `program` with `args`. It may be silent for as long as `patience`.
    pub(crate) fn start(
        name: String,
        program: &Path,
        args: &[String],
        patience: Duration,
        output: &Output,
    ) -> io::Result<Child> {
        let mut command = Command::new(program);
        SECRETS.iter().for_each(|name| _ = command.env_remove(name));
        let mut process = command
            .args(args)
            // The child reads its end of this until we close ours, or die.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C in a terminal goes to its whole process group: only the launcher is to act on it.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let prefix = if output.plain { String::new() } else { format!("{name:8}| ") };
        let log = process.stderr.take().map(|log| tokio::spawn(pass_on(log, prefix, output.lines.clone())));
        let heartbeat =
            Heartbeat { bytes: process.stdout.take(), last: Instant::now(), patience, serving: false };
        let group = process.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
        Ok(Child { name, stdin: process.stdin.take(), process, group, hangs: None, heartbeat, log })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Returns whether the child has reported that it serves.
    pub(crate) fn serves(&self) -> bool {
        self.heartbeat.serving
    }

    /// Waits until it has ended, with its last line passed on, or until it was silent for too long.
    pub(crate) async fn ended(&mut self) -> io::Result<End> {
        let status = tokio::select! {
            biased;
            silent = self.heartbeat.stopped() => {
                self.hangs = Some(silent);
                return Ok(End::Silent(silent));
            }
            status = self.process.wait() => status?,
        };
        // Bytes that were sent before the end count. A pipe that stays open does not matter.
        let _ = timeout(LAST_WORDS, self.heartbeat.read_to_end()).await;
        self.last_lines().await;
        Ok(End::Exited(status))
    }

    /// From now on it may be silent no longer than this, even if it was told more before.
    pub(crate) fn must_beat_within(&mut self, silence: Duration) {
        self.heartbeat.patience = self.heartbeat.patience.min(silence);
    }

    /// Asks it to end, and kills it when `patience` has passed `since` then, or at once if it hangs. Afterwards it is
    /// gone, with all that it has started; no signal ends a process inside of a driver, which is waited for. The future
    /// may be dropped and this called again.
    pub(crate) async fn stop(&mut self, since: Instant, patience: Duration) -> io::Result<End> {
        drop(self.stdin.take());
        let end = match self.hangs {
            Some(silent) => End::Silent(silent),
            None => tokio::select! {
                biased;
                status = self.process.wait() => End::Exited(status?),
                () = sleep_until(since + patience) => {
                    tracing::warn!("{} did not stop within {} s, killing it", self.name, patience.as_secs_f32());
                    End::Killed
                }
                silent = self.heartbeat.stopped_while_open() => End::Silent(silent),
            },
        };
        if let Some(group) = self.group {
            // Usually there is nothing left.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let status = loop {
            match timeout(KILLED, self.process.wait()).await {
                Ok(status) => break status?,
                Err(_) => {
                    tracing::error!(
                        "{} was killed, but is still there: a driver does not let it go",
                        self.name
                    );
                }
            }
        };
        self.last_lines().await;
        // One that was killed as it ended by itself has ended in order: the kernel was still taking its memory back.
        Ok(if matches!(end, End::Killed) && status.success() { End::Exited(status) } else { end })
    }

    /// Waits until the last line of a process that has ended is passed on.
    async fn last_lines(&mut self) {
        if let Some(log) = &mut self.log {
            let _ = timeout(LAST_WORDS, log).await;
            self.log = None;
        }
    }
}

/// The signs of life of a child: bytes on its stdout.
struct Heartbeat {
    /// `None` once the child has closed its end.
    bytes: Option<ChildStdout>,
    last: Instant,
    patience: Duration,
    serving: bool,
}

impl Heartbeat {
    /// Waits until nothing has come for too long; returns for how long.
    async fn stopped(&mut self) -> Duration {
        loop {
            let deadline = self.last + self.patience;
            if self.bytes.is_some() && timeout_at(deadline, self.next()).await.is_ok() {
                continue;
            }
            sleep_until(deadline).await;
            // After the launcher or its machine was suspended, timers fire before what came meanwhile is seen.
            if self.bytes.is_none() || timeout(HEARTBEAT, self.next()).await.is_err() {
                return self.last.elapsed();
            }
        }
    }

    /// As [`Self::stopped`], but a child that has closed its end is never silent.
    async fn stopped_while_open(&mut self) -> Duration {
        loop {
            if self.bytes.is_none() {
                return std::future::pending().await;
            }
            let silent = self.stopped().await;
            if self.bytes.is_some() {
                return silent;
            }
        }
    }

    async fn read_to_end(&mut self) {
        while self.bytes.is_some() {
            self.next().await;
        }
    }

    /// Waits for the next bytes, or for the end.
    async fn next(&mut self) {
        let Some(bytes) = &mut self.bytes else { return };
        let mut read = [0; 64];
        match bytes.read(&mut read).await {
            Ok(count @ 1..) => {
                self.last = Instant::now();
                self.serving |= read[..count].contains(&SERVING);
            }
            _ => self.bytes = None,
        }
    }
}

/// Passes on a log line by line.
async fn pass_on(log: impl AsyncRead + Unpin, prefix: String, lines: Lines) {
    let (mut log, mut line) = (BufReader::new(log), Vec::new());
    let mut in_a_line = false;
    while let Ok(1..) = (&mut log).take(LINE).read_until(b'\n', &mut line).await {
        let ends = line.pop_if(|last| *last == b'\n').is_some();
        // If the part before this had the full length, nothing of the line may be left.
        if !(in_a_line && line.is_empty()) {
            lines.write(&prefix, &line);
        }
        in_a_line = !ends;
        line.clear();
    }
}
