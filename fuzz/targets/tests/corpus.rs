//! Replays the inputs in `fuzz/corpus`, among which are all that once crashed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    path::Path,
    sync::mpsc::{RecvTimeoutError, sync_channel},
    thread,
    time::{Duration, Instant},
};

use fuzz_targets::{
    Outcome, adapter_config, chat_template, gguf, request_body::Server, safetensors, tokenizer,
};

/// Time for one input in a debug build on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(10);
/// Most inputs of a target, and bytes of all targets: the corpora are kept short.
const MAX_INPUTS: usize = 60;
const MAX_BYTES: usize = 300_000;

fn corpora() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../corpus"))
}

/// Names and contents of a target's inputs, by name.
fn inputs(target: &str) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(corpora().join(target)).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let mut inputs: Vec<_> = entries.map(|path| (name(&path), fs::read(&path).unwrap())).collect();
    inputs.sort();
    inputs
}

/// Replays a target's inputs. Those whose name begins with `valid-` have to be read, and those with `refused-` to be
/// refused; the others may become either.
fn replay(target: &str, run: impl Fn(&[u8]) -> Outcome + Send + 'static) {
    let inputs = inputs(target);
    assert!((20..=MAX_INPUTS).contains(&inputs.len()), "{}", inputs.len());
    let (tell, told) = sync_channel(0);
    let replaying = thread::spawn(move || {
        for (name, input) in inputs {
            tell.send(name.clone()).unwrap();
            let begun = Instant::now();
            let outcome = run(&input);
            let took = begun.elapsed();
            assert!(took < AT_ONCE, "{name} took {took:?}: {outcome:?}");
            match outcome {
                Outcome::Refused(message) => {
                    assert!(!message.is_empty(), "{name}");
                    assert!(!name.starts_with("valid-"), "{name}: {message}");
                }
                Outcome::Read => assert!(!name.starts_with("refused-"), "{name} was read"),
            }
        }
    });
    let mut last = String::new();
    // The first input waits for what all of a target share to be set up.
    loop {
        match told.recv_timeout(3 * AT_ONCE) {
            Ok(name) => last = name,
            Err(RecvTimeoutError::Timeout) => panic!("{target}: {last} does not end"),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    replaying.join().unwrap();
}

#[test]
fn gguf_files_are_read_or_refused() {
    replay("gguf", gguf::run);
}

#[test]
fn safetensors_files_are_read_or_refused() {
    replay("safetensors", safetensors::run);
}

#[test]
fn adapter_configurations_are_read_or_refused() {
    replay("adapter_config", adapter_config::run);
}

#[test]
fn tokenizer_files_are_read_or_refused() {
    replay("tokenizer", tokenizer::run);
}

#[test]
fn chat_templates_are_rendered_or_refused() {
    replay("chat_template", chat_template::run);
}

#[test]
fn bodies_of_requests_are_answered() {
    let server = Server::start();
    replay("request_body", move |input| server.run(input));
}

#[test]
fn the_corpora_are_short() {
    let targets = fs::read_dir(corpora()).unwrap().map(|entry| entry.unwrap().file_name());
    let sizes = targets.flat_map(|target| inputs(target.to_str().unwrap())).map(|(_, input)| input.len());
    let total: usize = sizes.sum();
    assert!(total <= MAX_BYTES, "{total} bytes");
}
