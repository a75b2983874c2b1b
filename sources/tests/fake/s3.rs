//! An S3 server (moto) and AWS's own client, in a process of their own.
#![allow(dead_code, clippy::unwrap_used, reason = "each test uses a part, and fails by panicking")]

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use serde_json::{Value, json};

/// The server. It ends when its input is closed.
pub(crate) struct S3 {
    _process: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    pub(crate) url: String,
}

impl S3 {
    pub(crate) fn start() -> S3 {
        // Every crate whose tests use it is a folder of the workspace's root.
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
        let mut process = Command::new(format!("{root}/.venv/bin/python"))
            .arg(format!("{root}/sources/tests/s3_server.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("`make venv` makes the environment of this test");
        let (orders, answers) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        let mut server =
            S3 { _process: process, orders, answers: BufReader::new(answers), url: String::new() };
        server.url = server.answer().as_str().unwrap().to_owned();
        server
    }

    fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        serde_json::from_str(&line).expect("an answer of the server")
    }

    /// Has AWS's own client do something.
    pub(crate) fn call(&mut self, order: &Value) -> Value {
        writeln!(self.orders, "{order}").unwrap();
        self.answer()
    }

    pub(crate) fn put(&mut self, bucket: &str, files: &[(&str, &[u8])]) {
        for (key, bytes) in files {
            self.call(&json!(["put", bucket, key, hex(bytes)]));
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
