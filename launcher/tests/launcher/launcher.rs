//! The launcher under test, beside children that are scripts.

use std::{
    cell::RefCell,
    fs::{self, File},
    io::{BufRead, BufReader, Lines, Write},
    os::unix::fs::symlink,
    path::Path,
    process::{Child, ChildStderr, Command, Stdio},
    sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel},
    thread,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

/// A shard that serves until it is told to stop.
const SHARD: &str = "say shard up; serving; serve; say shard down";
/// A router that does the same, and keeps its configuration for the test.
const ROUTER: &str = "cp \"$config\" \"$CHILDREN/config.json\"; say router up; serve; say router down";

/// A launcher that can be started.
pub(crate) struct Launcher {
    folder: TempDir,
    command: Command,
}

impl Launcher {
    /// With an empty environment, and children that serve.
    pub(crate) fn new() -> Launcher {
        // Its own copy, because it looks for its children beside itself; linked, because a file that is being written
        // cannot be run.
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let program = folder.path().join("lorax-launcher");
        fs::hard_link(env!("CARGO_BIN_EXE_lorax-launcher"), &program).unwrap();
        let child = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/launcher/child.sh");
        for name in ["lorax-router", "lorax-shard"] {
            symlink(&child, folder.path().join(name)).unwrap();
        }
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("CHILDREN", folder.path())
            .env("HF_HOME", folder.path().join("hf"))
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        let launcher = Launcher { folder, command };
        let launcher = launcher.devices(r#"echo '{"gpus": [], "missing": "no driver"}'"#);
        // Among as many ranks as are asked for.
        let launcher = launcher.divides(r#"echo "{\"ranks\": $4, \"refused\": null}""#);
        launcher.shard(SHARD).router(ROUTER)
    }

    /// With the path of an empty model, which children that are scripts do not read.
    pub(crate) fn with_model() -> Launcher {
        let launcher = Launcher::new();
        let model = launcher.folder.path().join("model.gguf");
        fs::write(&model, "").unwrap();
        launcher.env("MODEL_ID", model.to_str().unwrap())
    }

    /// Replaces the script of the shard.
    pub(crate) fn shard(self, script: &str) -> Launcher {
        fs::write(self.folder.path().join("lorax-shard.sh"), script).unwrap();
        self
    }

    /// Replaces what a shard does that is asked for its GPUs.
    pub(crate) fn devices(self, script: &str) -> Launcher {
        fs::write(self.folder.path().join("devices.sh"), script).unwrap();
        self
    }

    /// Replaces what a shard does that is asked among how many ranks a model can be divided: `$2` is the model, `$4` the
    /// most ranks.
    pub(crate) fn divides(self, script: &str) -> Launcher {
        fs::write(self.folder.path().join("divides.sh"), script).unwrap();
        self
    }

    /// A shard that has as many GPUs.
    pub(crate) fn gpus(self, count: usize) -> Launcher {
        let gpu = |index| format!(r#"{{"name": "a GPU", "pci": "0000:{index:02}:00.0"}}"#);
        let gpus: Vec<_> = (0..count).map(gpu).collect();
        self.devices(&format!("echo '{{\"gpus\": [{}], \"missing\": null}}'", gpus.join(", ")))
    }

    /// Replaces the script of the router.
    pub(crate) fn router(self, script: &str) -> Launcher {
        fs::write(self.folder.path().join("lorax-router.sh"), script).unwrap();
        self
    }

    pub(crate) fn args(mut self, args: &[&str]) -> Launcher {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Launcher {
        self.command.env(name, value);
        self
    }

    /// A folder of the test's own.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Runs to the end: exit status and log.
    pub(crate) fn fails(mut self) -> (i32, String) {
        self.failure()
    }

    /// The same, of one that can be started again.
    pub(crate) fn failure(&mut self) -> (i32, String) {
        let out = self.command.output().unwrap();
        (out.status.code().unwrap(), String::from_utf8(out.stderr).unwrap())
    }

    /// Runs to the end: all that it prints.
    pub(crate) fn output(mut self) -> String {
        let out = self.command.output().unwrap();
        String::from_utf8([out.stdout, out.stderr].concat()).unwrap()
    }

    pub(crate) fn start(&mut self) -> Running {
        let mut process = self.command.spawn().unwrap();
        let log = BufReader::new(process.stderr.take().unwrap()).lines();
        let (ended, end) = sync_channel(1);
        let id = process.id().to_string();
        thread::spawn(move || {
            if end.recv_timeout(HANGS) == Err(RecvTimeoutError::Timeout) {
                kill("-KILL", &id);
            }
        });
        Running { process, log: Some(log), _ended: ended }
    }

    /// A pipe with this name in the folder of the children.
    pub(crate) fn fifo(&self, name: &str) -> Fifo {
        let path = self.folder().join(name);
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        // Opened for both, so that nobody has to wait for the other side.
        let file = File::options().read(true).write(true).open(path).unwrap();
        Fifo(BufReader::new(file).into())
    }

    /// Starts, waits until the router is there, stops, and returns the configuration that it got.
    pub(crate) fn configuration(&mut self) -> Value {
        let mut running = self.start();
        running.until("router up");
        running.signal("-TERM");
        let (status, log) = running.ended();
        assert_eq!(status, Some(0), "{log:?}");
        serde_json::from_slice(&fs::read(self.folder().join("config.json")).unwrap()).unwrap()
    }
}

/// Deadline of a test; none takes more than some seconds.
const HANGS: Duration = Duration::from_secs(60);

/// Sends a signal to a process, or to a group of processes.
pub(crate) fn kill(signal: &str, id: &str) {
    let kill = Command::new("kill").args([signal, "--", id]).status();
    assert!(kill.unwrap().success());
}

/// A pipe between children and test.
pub(crate) struct Fifo(RefCell<BufReader<File>>);

impl Fifo {
    pub(crate) fn write_line(&self, line: &str) {
        writeln!(self.0.borrow_mut().get_mut(), "{line}").unwrap();
    }

    pub(crate) fn read_line(&self) -> String {
        let mut line = String::new();
        self.0.borrow_mut().read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

/// A launcher that runs; killed when it is dropped, and after [`HANGS`].
pub(crate) struct Running {
    process: Child,
    log: Option<Lines<BufReader<ChildStderr>>>,
    _ended: SyncSender<()>,
}

impl Running {
    /// Lines up to the first that has `text` in it.
    pub(crate) fn until(&mut self, text: &str) -> Vec<String> {
        let mut lines = Vec::new();
        for line in self.log.iter_mut().flatten() {
            lines.push(line.unwrap());
            if lines.last().is_some_and(|line| line.contains(text)) {
                return lines;
            }
        }
        panic!("no {text:?} in {lines:#?}")
    }

    /// Lines up to the first at which all of `texts` have been there.
    pub(crate) fn until_all(&mut self, texts: &[&str]) -> Vec<String> {
        let mut lines = Vec::<String>::new();
        while let Some(text) = texts.iter().find(|text| !lines.iter().any(|line| line.contains(**text))) {
            lines.extend(self.until(text));
        }
        lines
    }

    pub(crate) fn signal(&self, signal: &str) {
        kill(signal, &self.process.id().to_string());
    }

    /// Closes the log, so that nobody can read it any more.
    pub(crate) fn close_log(&mut self) {
        self.log = None;
    }

    /// Waits for the end without reading the log.
    pub(crate) fn status(&mut self) -> Option<i32> {
        self.process.wait().unwrap().code()
    }

    /// Waits for the end: exit status, and the lines that nobody has read.
    pub(crate) fn ended(mut self) -> (Option<i32>, Vec<String>) {
        let lines = self.log.iter_mut().flatten().map(Result::unwrap).collect();
        (self.status(), lines)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
