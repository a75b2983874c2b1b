//! The launcher under test, beside children that are scripts.

use std::{
    fs,
    io::{BufRead, BufReader, Lines},
    os::unix::fs::symlink,
    path::Path,
    process::{Child, ChildStderr, Command, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

/// A shard that serves until it is told to stop.
const SHARD: &str = "say shard up; touch \"$socket\"; serve; say shard down";
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
        launcher.shard(SHARD).router(ROUTER)
    }

    /// With the path of an empty model, which children that are scripts do not read.
    pub(crate) fn with_model() -> Launcher {
        let launcher = Launcher::new();
        let model = launcher.folder.path().join("model.gguf");
        fs::write(&model, "").unwrap();
        launcher.env("MODEL_ID", model.to_str().unwrap())
    }

    /// What the shard does.
    pub(crate) fn shard(self, script: &str) -> Launcher {
        fs::write(self.folder.path().join("lorax-shard.sh"), script).unwrap();
        self
    }

    /// What the router does.
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
        Running { process, log }
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

/// A launcher that runs; killed when it is dropped.
pub(crate) struct Running {
    process: Child,
    log: Lines<BufReader<ChildStderr>>,
}

impl Running {
    /// Lines up to the first that has `text` in it.
    pub(crate) fn until(&mut self, text: &str) -> Vec<String> {
        let mut lines = Vec::new();
        for line in self.log.by_ref() {
            lines.push(line.unwrap());
            if lines.last().is_some_and(|line| line.contains(text)) {
                return lines;
            }
        }
        panic!("no {text:?} in {lines:#?}")
    }

    pub(crate) fn signal(&self, signal: &str) {
        let kill = Command::new("kill").args([signal, &self.process.id().to_string()]).status();
        assert!(kill.unwrap().success());
    }

    /// Waits for the end: exit status, and the lines that nobody has read.
    pub(crate) fn ended(mut self) -> (Option<i32>, Vec<String>) {
        let lines = self.log.by_ref().map(Result::unwrap).collect();
        (self.process.wait().unwrap().code(), lines)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
