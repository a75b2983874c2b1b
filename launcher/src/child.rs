//! One child process: started with the run configuration, its log lines prefixed, ended through its stdin.

use std::{path::Path, process::ExitStatus, process::Stdio, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::{Child as Process, ChildStdin, Command},
    task::JoinHandle,
    time::timeout,
};

/// A running child. Dropping it kills it.
pub(crate) struct Child {
    pub(crate) name: String,
    process: Process,
    /// Closing it tells the child to stop. Held apart, because waiting for a process closes its own.
    stdin: Option<ChildStdin>,
    /// None once it has ended.
    log: Option<JoinHandle<()>>,
}

impl Child {
    /// Starts `program` with `args`. Its lines are passed on, with its name in front unless `plain`.
    pub(crate) fn start(name: &str, program: &Path, args: &[&str], plain: bool) -> std::io::Result<Child> {
        let mut process = Command::new(program)
            .args(args)
            // Children have the keys from the run configuration, which nobody else can read.
            .env_remove("LORAX_API_KEY")
            // The child reads its end of this until we close ours, or die.
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Ctrl-C in a terminal goes to its whole process group: only the launcher is to act on it.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let prefix = if plain { String::new() } else { format!("{name:8}| ") };
        let log = match process.stderr.take() {
            Some(lines) => tokio::spawn(pass_on(lines, prefix)),
            None => tokio::spawn(std::future::ready(())),
        };
        let stdin = process.stdin.take();
        Ok(Child { name: name.into(), process, stdin, log: Some(log) })
    }

    /// Waits for its end, and for its last line.
    pub(crate) async fn ended(&mut self) -> std::io::Result<ExitStatus> {
        let status = self.process.wait().await?;
        if let Some(log) = self.log.take() {
            // A grandchild could hold the pipe open for ever.
            let _ = timeout(Duration::from_secs(1), log).await;
        }
        Ok(status)
    }

    /// Asks it to end, and kills it after `patience`. True if it ended by itself, in order, or had ended before.
    pub(crate) async fn stop(mut self, patience: Duration) -> bool {
        if self.log.is_none() {
            return true;
        }
        drop(self.stdin.take());
        match timeout(patience, self.ended()).await {
            Ok(Ok(status)) => status.success(),
            _ => {
                tracing::warn!("{} did not stop within {} s, killing it", self.name, patience.as_secs());
                // It may have ended meanwhile.
                let _ = self.process.kill().await;
                false
            }
        }
    }
}

async fn pass_on(lines: impl AsyncRead + Unpin, prefix: String) {
    let mut lines = BufReader::new(lines).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        eprintln!("{prefix}{}", String::from_utf8_lossy(&line));
    }
}
