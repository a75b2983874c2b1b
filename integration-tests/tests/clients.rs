//! API clients of other projects, as they are published, against a server of the demo model.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    path::Path,
    process::{Child, Command, Stdio},
};

use integration_tests::server::{Server, demo_model};

/// Scripts, and whether they are told the address of the server or that of OpenAI's interface.
const SCRIPTS: [(&str, &str); 8] = [
    ("python/openai_client.py", "/v1"),
    ("python/openai_fields.py", "/v1"),
    ("python/langchain_client.py", "/v1"),
    ("python/litellm_client.py", "/v1"),
    ("python/inference_client.py", ""),
    ("python/instructor_client.py", "/v1"),
    ("clients/openai.mjs", "/v1"),
    ("clients/ai.mjs", "/v1"),
];

/// Starts a script with the packages of the tests.
fn start(script: &str, args: &[&str]) -> Child {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (program, needed, target) = match script.ends_with(".py") {
        true => (folder.join("../.venv/bin/python"), folder.join("../.venv/bin/python"), "venv"),
        false => ("node".into(), folder.join("clients/node_modules/.installed"), "clients"),
    };
    assert!(needed.exists(), "{} is missing: make {target}", needed.display());
    let script = folder.join(script);
    Command::new(program).arg(script).args(args).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn clients_of_other_projects_are_served() {
    let server = Server::start(&[]).unwrap();
    let model = demo_model().unwrap();
    let name = model.file_name().unwrap().to_str().unwrap();
    let start = |(script, path): (&'static str, &str)| {
        (script, start(script, &[&format!("{}{path}", server.url), name]))
    };
    let running: Vec<_> = SCRIPTS.into_iter().map(start).collect();
    let failed = running.into_iter().filter_map(|(script, child)| {
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        (!output.status.success()).then(|| format!("{script}:\n{errors}"))
    });
    let failed: Vec<_> = failed.collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
