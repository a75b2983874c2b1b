//! Whole servers with small models: answers, and the ends of processes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use futures::{StreamExt, future::join_all};
use integration_tests::server::Server;
use reqwest::StatusCode;
use serde_json::json;

const ADAPTERS: [Option<&str>; 4] = [None, Some("sentiment"), Some("sql"), Some("pirate")];

/// The metric that counts sequences which have given up their blocks.
const PREEMPTIONS: &str = "lorax_preemptions_total";

#[tokio::test]
async fn a_folder_is_served_with_adapters_of_all_ranks_in_one_batch() {
    let tiny = integration_tests::server::fixtures().join("tiny");
    let server = Server::start_with(&tiny.join("model"), &tiny.join("adapters"), &[]).unwrap();
    let names = [None, Some("r1"), Some("r3"), Some("r8"), Some("r16"), Some("r64")];
    let ask = async |i: usize| {
        let prompt = format!("{i} The Licensor and its affiliates");
        server.tokens(names[i % names.len()], &prompt, 24).await.unwrap()
    };
    let mut alone = Vec::new();
    for i in 0..32 {
        alone.push(ask(i).await);
    }
    let together = join_all((0..32).map(ask)).await;
    assert_eq!(together, alone);
    let prompt =
        json!({"model": "r64", "messages": [{"role": "user", "content": "Licensor"}], "max_tokens": 4});
    let chat = server.post("/v1/chat/completions", &prompt).await.unwrap();
    assert_eq!(chat.status(), StatusCode::OK, "the folder's own chat template is used");
}

#[tokio::test]
async fn preemption_and_small_chunks_change_no_token() {
    let plain = Server::start(&["--prefix-caching", "false"]).unwrap();
    // 6 MiB are 17 blocks of 16 positions. A sequence is admitted with one block, if a second one is free, and grows
    // to six.
    let tight = Server::start(&["--kv-memory", "6MiB", "--max-batch-prefill-tokens", "7"]).unwrap();
    let prompts: Vec<String> = (0..8).map(|i| format!("Story {i}. Once upon a time")).collect();
    let answers = async |server: &Server| {
        let all = prompts.iter().enumerate().map(|(i, prompt)| server.tokens(ADAPTERS[i % 4], prompt, 80));
        join_all(all).await.into_iter().map(Result::unwrap).collect::<Vec<_>>()
    };
    let expected = answers(&plain).await;
    assert_eq!(answers(&tight).await, expected);
    let preemptions = tight.until_metric(PREEMPTIONS, |count| count > 0.0).await.unwrap();
    assert_eq!(answers(&tight).await, expected, "with the prefixes in the cache");
    tight.until_metric(PREEMPTIONS, |count| count > preemptions).await.unwrap();
    assert_eq!(plain.metric(PREEMPTIONS).await.unwrap(), 0.0);
}

#[tokio::test]
async fn a_dead_shard_is_replaced_and_the_port_stays_open() {
    let mut server = Server::start(&["--max-concurrent-requests", "3"]).unwrap();
    let body = json!({"inputs": "Count:", "parameters": {"max_new_tokens": 2000, "ignore_eos_token": true}});
    let mut streams = Vec::new();
    for _ in 0..3 {
        let response = server.post("/generate_stream", &body).await.unwrap();
        let mut events = response.bytes_stream();
        assert!(events.next().await.unwrap().unwrap().starts_with(b"data:"));
        streams.push(events);
    }
    let refused = server.post("/generate", &body).await.unwrap();
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    Server::signal(server.children("lorax-shard").unwrap()[0], "-KILL").unwrap();
    for events in streams {
        let all: Vec<_> = events.map(Result::unwrap).collect().await;
        let text = String::from_utf8(all.concat()).unwrap();
        assert!(
            text.contains("\"error_type\":\"unavailable\""),
            "{}",
            &text[text.len().saturating_sub(300)..]
        );
    }
    let short = json!({"inputs": "Hi", "parameters": {"max_new_tokens": 2}});
    let meanwhile = server.post("/generate", &short).await.unwrap();
    assert_eq!(meanwhile.status(), StatusCode::SERVICE_UNAVAILABLE);
    server.until("lost the model").unwrap();
    server.until("connected to the model").unwrap();
    assert_eq!(server.post("/generate", &short).await.unwrap().status(), StatusCode::OK);
    assert_eq!(server.terminate().unwrap().code(), Some(0));
}

/// A shard that does not react is killed, and the launcher's exit code says so.
#[tokio::test]
async fn a_process_that_had_to_be_killed_changes_the_exit_code() {
    let mut server = Server::start(&[]).unwrap();
    let shard = server.children("lorax-shard").unwrap()[0];
    Server::signal(shard, "-STOP").unwrap();
    assert_eq!(server.terminate().unwrap().code(), Some(1));
    assert!(!std::path::Path::new(&format!("/proc/{shard}")).exists());
}

#[tokio::test]
async fn streams_finish_before_the_server_stops() {
    let mut server = Server::start(&[]).unwrap();
    let body = json!({"model": "pirate", "prompt": ["Hello", "What is a dog?"], "max_tokens": 60, "stream": true,
        "temperature": 0, "ignore_eos": true, "stream_options": {"include_usage": true}});
    let response = server.post("/v1/completions", &body).await.unwrap();
    let mut events = response.bytes_stream();
    let first = events.next().await.unwrap().unwrap();
    let stopped = tokio::task::spawn_blocking(move || server.terminate().unwrap());
    let rest: Vec<_> = events.map(Result::unwrap).collect().await;
    let text = String::from_utf8([first.to_vec(), rest.concat()].concat()).unwrap();
    assert_eq!(text.matches("\"finish_reason\":\"length\"").count(), 2);
    assert!(text.contains("\"completion_tokens\":120"));
    assert!(text.trim_end().ends_with("data: [DONE]"));
    assert_eq!(stopped.await.unwrap().code(), Some(0));
}

/// Runs a script with the Python packages of the tests.
fn python(script: &str, args: &[&std::ffi::OsStr]) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = folder.join("../.venv/bin/python");
    assert!(python.exists(), "{} is missing: make venv", python.display());
    let status = std::process::Command::new(python).arg(folder.join(script)).args(args).status();
    assert!(status.unwrap().success(), "{script}");
}

#[test]
fn loraxs_own_client_is_served() {
    let server = Server::start(&[]).unwrap();
    python("python/lorax_client.py", &[server.url.as_ref()]);
}

/// lm-eval scores the endings of fifty sentences through `/v1/completions`: the numbers are those of transformers.
#[test]
fn an_evaluation_harness_gets_the_numbers_of_transformers() {
    let server = Server::start(&["--dtype", "float32"]).unwrap();
    let model = integration_tests::server::demo_model().unwrap();
    let golden = integration_tests::server::fixtures().join("goldens/lm_eval.json");
    python(
        "lm_eval/evaluate.py",
        &["server".as_ref(), server.url.as_ref(), model.as_os_str(), golden.as_os_str()],
    );
}

#[tokio::test]
async fn a_client_that_leaves_makes_room() {
    // 24 MiB are 68 blocks of 16 positions, fewer than two of the long answers fill.
    let server = Server::start(&["--kv-memory", "24MiB", "--max-total-tokens", "900"]).unwrap();
    let long = json!({"inputs": "Count:", "parameters": {"max_new_tokens": 890, "ignore_eos_token": true}});
    for _ in 0..8 {
        let mut events = server.post("/generate_stream", &long).await.unwrap().bytes_stream();
        assert!(events.next().await.unwrap().unwrap().starts_with(b"data:"));
    }
    server.until_metric("lorax_requests_total{end=\"cancelled\"}", |count| count == 8.0).await.unwrap();
    server.until_metric("lorax_kv_blocks{state=\"used\"}", |blocks| blocks == 0.0).await.unwrap();
    assert_eq!(
        server.metric("lorax_requests_total{end=\"length\"}").await.unwrap(),
        0.0,
        "none ran to its end"
    );
    assert_eq!(server.tokens(Some("pirate"), "Hello", 8).await.unwrap().len(), 8);
}
