//! Many adapters in a whole server: mixed in one batch, loaded while streams run, and evicted from memory.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use futures::{
    StreamExt,
    future::join_all,
    stream::{self, FuturesUnordered, select},
};
use integration_tests::{
    adapters::{ALL_SITES, DEMO, TINY},
    server::{Server, demo_model, fixtures},
};
use serde_json::json;

/// Random adapters of the demo model: rank and sites.
const RANDOM: [(usize, &[&str]); 5] = [
    (1, &ALL_SITES),
    (3, &["q_proj", "k_proj", "v_proj", "o_proj"]),
    (8, &["gate_proj", "up_proj", "down_proj"]),
    (16, &["q_proj", "down_proj"]),
    (64, &["v_proj"]),
];

#[tokio::test]
async fn a_mixed_batch_gives_everyone_the_tokens_they_get_alone() {
    let folder = tempfile::tempdir().unwrap();
    for (rank, sites) in RANDOM {
        let name = folder.path().join(format!("r{rank}"));
        DEMO.write_adapter(&name, rank, sites, rank as u64).unwrap();
    }
    let trained = fixtures().join("adapters").canonicalize().unwrap();
    let root = trained.to_str().unwrap();
    let server =
        &Server::start_with(&demo_model().unwrap(), folder.path(), &["--adapter-roots", root]).unwrap();
    let mut adapters = vec![None];
    adapters.extend(["sentiment", "sql", "pirate"].map(|name| Some(format!("{root}/{name}"))));
    adapters.extend(RANDOM.map(|(rank, _)| Some(format!("r{rank}"))));
    let ask = async |adapter: &Option<String>, prompt: &str, count| {
        server.tokens(adapter.as_deref(), prompt, count).await.unwrap()
    };
    let asks: Vec<_> = (0..32)
        .map(|i| (&adapters[i % 9], format!("Number {i}: {}", "Tell me about the sea. ".repeat(1 + i % 5))))
        .collect();
    let mut alone = Vec::new();
    for (adapter, prompt) in &asks {
        alone.push(ask(adapter, prompt, 12).await);
    }
    let (steps, tokens) = ("lorax_step_duration_seconds_count", "lorax_generated_tokens_total");
    let before = (server.metric(steps).await.unwrap(), server.metric(tokens).await.unwrap());
    let together = join_all(asks.iter().map(|(adapter, prompt)| ask(adapter, prompt, 12))).await;
    let steps = server.metric(steps).await.unwrap() - before.0;
    let tokens = server.metric(tokens).await.unwrap() - before.1;
    assert_eq!(tokens, 32.0 * 12.0);
    assert!(tokens / steps > 9.0, "{tokens} tokens in {steps} steps: they did not run together");
    for (i, (alone, together)) in alone.iter().zip(together).enumerate() {
        assert_eq!(*alone, together, "request {i}, adapter {:?}", asks[i].0);
    }
    let prompt = "<|im_start|>user\nShow the name of all ships.<|im_end|>\n<|im_start|>assistant\n";
    let distinct: BTreeSet<_> =
        join_all(adapters.iter().map(|adapter| ask(adapter, prompt, 8))).await.into_iter().collect();
    assert_eq!(distinct.len(), 9, "every adapter has its own answer");
}

/// An event that the test sees.
#[derive(Debug, PartialEq)]
enum Seen {
    /// A token of the stream that ran before.
    Token,
    /// The first answer of an adapter.
    Answer,
}

#[tokio::test]
async fn adapters_that_are_being_loaded_stall_no_stream() {
    let folder = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..8).map(|i| format!("cold-{i}")).collect();
    for (seed, name) in names.iter().enumerate() {
        DEMO.write_adapter(&folder.path().join(name), 16, &ALL_SITES, seed as u64).unwrap();
    }
    let server = &Server::start_with(&demo_model().unwrap(), folder.path(), &[]).unwrap();
    let body = json!({"inputs": "Count:", "parameters": {"max_new_tokens": 4000, "ignore_eos_token": true}});
    let mut events = server.post("/generate_stream", &body).await.unwrap().bytes_stream();
    events.next().await.unwrap().unwrap();
    let tokens = events.flat_map(|chunk| {
        let tokens = chunk.unwrap().windows(5).filter(|bytes| bytes == b"data:").count();
        stream::iter((0..tokens).map(|_| Seen::Token))
    });
    let cold: FuturesUnordered<_> = names.iter().map(|name| server.tokens(Some(name), "Hello", 1)).collect();
    let mut answers = 0;
    let cold = cold.map(|answer| {
        assert_eq!(answer.unwrap().len(), 1);
        Seen::Answer
    });
    let seen: Vec<Seen> = select(tokens, cold)
        .take_while(|seen| {
            answers += usize::from(*seen == Seen::Answer);
            std::future::ready(answers < names.len())
        })
        .collect()
        .await;
    // Each adapter has 20 MB to be read, checked and copied. If steps waited for that, there would be a long pause.
    let before = seen.iter().take_while(|seen| **seen == Seen::Token).count();
    assert!(before >= 3, "{before} tokens before the first adapter's answer");
    assert!(seen.len() >= 5 * names.len(), "{} tokens while {} adapters came", seen.len(), names.len());
}

#[tokio::test]
async fn adapters_that_memory_has_no_room_for_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..12).map(|i| format!("a{i}")).collect();
    for (seed, name) in names.iter().enumerate() {
        TINY.write_adapter(&folder.path().join(name), 16, &ALL_SITES, seed as u64).unwrap();
    }
    let model = fixtures().join("tiny/model");
    let plenty = Server::start_with(&model, folder.path(), &[]).unwrap();
    // Host memory for two of them, or for one that has not been read before; slots for two.
    let flags =
        ["--adapter-host-memory", "160KiB", "--max-adapter-size", "160KiB", "--max-active-adapters", "2"];
    let scarce = Server::start_with(&model, folder.path(), &flags).unwrap();
    let prompt = "The Licensor and its affiliates";
    let all = async |server: &Server| {
        let asks = names.iter().chain(names.iter().rev()).map(|name| server.tokens(Some(name), prompt, 8));
        join_all(asks).await.into_iter().map(Result::unwrap).collect::<Vec<_>>()
    };
    let expected = all(&plenty).await;
    assert_eq!(
        expected.iter().collect::<BTreeSet<_>>().len(),
        names.len(),
        "every adapter has its own answer"
    );
    for _ in 0..3 {
        assert_eq!(all(&scarce).await, expected);
    }
    assert_eq!(plenty.said("adapter ready in host memory"), names.len());
    let read = scarce.said("adapter ready in host memory");
    assert!(read > 2 * names.len(), "{read} times an adapter was read");
}
