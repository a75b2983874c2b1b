//! Several answers to one prompt: `n` and `best_of`.

use std::collections::BTreeSet;

use futures::future::join_all;
use serde_json::{Value, json};

use crate::{
    refusals::assert_openai,
    router::{Router, text, tokens},
    shard::{Gate, Script, logprob},
};

/// A token that depends on the seed, three times.
fn drawn(seed: u64) -> Vec<u32> {
    vec![68 + (seed % 26) as u32; 3]
}

fn script() -> Script {
    Script { drawing: Some(drawn), ..Script::saying(tokens("ab")) }
}

fn texts(body: &Value) -> Vec<String> {
    let choices = body["choices"].as_array().unwrap().iter().enumerate();
    let text = |(index, choice): (usize, &Value)| {
        assert_eq!(choice["index"], index, "{body}");
        let text = choice.get("text").unwrap_or(&choice["message"]["content"]);
        text.as_str().unwrap().to_owned()
    };
    choices.map(text).collect()
}

/// The texts of a stream's choices.
fn streamed(events: &[Value], choices: usize) -> Vec<String> {
    let mut texts = vec![String::new(); choices];
    for choice in events.iter().filter_map(|event| event["choices"].get(0)) {
        let text = choice.get("text").unwrap_or(&choice["delta"]["content"]);
        texts[choice["index"].as_u64().unwrap() as usize] += text.as_str().unwrap_or_default();
    }
    texts
}

/// The seeds that the shard was sent, in the order of sequences.
async fn seeds(router: &Router, sequences: usize) -> Vec<u64> {
    let seen = |seen: &crate::shard::Seen| {
        let mut added: Vec<_> = seen.added().collect();
        added.sort_by_key(|new| new.sequence);
        let seeds = added.iter().map(|new| new.sampling.as_ref().unwrap().seed).collect::<Vec<_>>();
        (seeds.len() >= sequences).then_some(seeds)
    };
    router.shard.saw(seen).await
}

#[tokio::test]
async fn choices_are_drawn_with_seeds_of_their_own() {
    let chat = json!([{"role": "user", "content": "x"}]);
    for (path, prompt, value) in
        [("/v1/completions", "prompt", json!("Hello")), ("/v1/chat/completions", "messages", chat)]
    {
        for (n, seed) in [(1, 1_i64), (2, 1), (3, 2), (8, -5), (5, 0), (2, i64::MAX)] {
            let router = Router::start(script()).await;
            let body = json!({prompt: value, "n": n, "seed": seed, "max_tokens": 3});
            let answer = router.ok(path, &body).await;
            let seeds = seeds(&router, n).await;
            assert_eq!(seeds.iter().collect::<BTreeSet<_>>().len(), n, "{seeds:?}");
            assert_eq!(seeds[0], seed.cast_unsigned(), "the first choice is that of a request for one");
            let expected: Vec<_> = seeds.iter().map(|seed| text(&drawn(*seed))).collect();
            assert_eq!(texts(&answer), expected, "{body}");
            assert_eq!(texts(&router.ok(path, &body).await), expected, "the same seed draws the same");
            let mut body = body;
            body["stream"] = json!(true);
            assert_eq!(streamed(&router.events(path, &body).await, n), expected);
        }
    }
    // Neighbouring seeds, and those that the server chooses, have no choices in common.
    let router = Router::start(script()).await;
    for seed in [json!(1), json!(2), json!(3), json!(null), json!(null)] {
        router.ok("/v1/completions", &json!({"prompt": "x", "n": 8, "seed": seed})).await;
    }
    assert_eq!(seeds(&router, 40).await.into_iter().collect::<BTreeSet<_>>().len(), 40);
}

#[tokio::test]
async fn each_prompt_of_a_list_has_its_choices_and_counts_once() {
    let router = Router::start(Script::answering(<[u32]>::to_vec)).await;
    let body = json!({"prompt": ["Hello", "You"], "n": 3, "max_tokens": 9, "temperature": 0});
    let answer = router.ok("/v1/completions", &body).await;
    assert_eq!(texts(&answer), ["Hello", "Hello", "Hello", "You", "You", "You"]);
    let (hello, you) = (tokens("Hello").len(), tokens("You").len());
    let generated = 3 * (hello + 1 + you + 1);
    let usage = json!({"prompt_tokens": hello + you, "completion_tokens": generated,
        "total_tokens": hello + you + generated, "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(answer["usage"], usage);
    let mut body = body;
    (body["stream"], body["stream_options"]) = (json!(true), json!({"include_usage": true}));
    let events = router.events("/v1/completions", &body).await;
    assert_eq!(streamed(&events, 6), texts(&answer));
    assert_eq!(events[events.len() - 2]["usage"], usage);
}

#[tokio::test]
async fn many_requests_for_choices_compute_their_prompts_once() {
    for prefix_caching in [true, false] {
        let mut script = script();
        (script.info.num_blocks, script.info.max_sequences) = (16384, 256);
        (script.info.max_rows, script.info.max_logit_rows) = (2048, 2048);
        let router = Router::start_with(script, |config| {
            config.router.prefix_caching = prefix_caching;
            config.router.max_concurrent_requests = 1024;
        })
        .await;
        let asked = (0..128_usize).map(|number| {
            let prompt: Vec<_> = (0..1000).map(|at| 4 + (number * 7 + at * (number + 1)) % 300).collect();
            let body = json!({"prompt": prompt, "n": 8, "max_tokens": 3});
            let router = &router;
            async move { router.ok("/v1/completions", &body).await }
        });
        let answers = join_all(asked).await;
        assert!(answers.iter().all(|answer| texts(answer).len() == 8));
        // The prompt once, what is behind its last full block for all others, and decode rows for two tokens each.
        let rows = 128 * (1000 + 7 * 8 + 8 * 2);
        let planned = router.shard.saw(|seen| {
            let rows = seen.steps.iter().flat_map(|step| &step.rows);
            Some(rows.map(|rows| rows.rows).sum::<u32>())
        });
        assert_eq!(planned.await, rows, "prefix caching {prefix_caching}");
    }
}

#[tokio::test]
async fn the_best_answers_are_those_with_the_most_probable_tokens() {
    for (n, best_of) in [(1, 2), (1, 8), (2, 5), (3, 4), (4, 4), (7, 8)] {
        let router = Router::start(script()).await;
        let body = json!({"prompt": "Hello", "n": n, "best_of": best_of, "seed": 3, "max_tokens": 3});
        let answer = router.ok("/v1/completions", &body).await;
        let mut all: Vec<_> = seeds(&router, best_of).await.into_iter().map(drawn).collect();
        assert_eq!(all.len(), best_of);
        if n < best_of {
            all.sort_by(|a, b| logprob(b[0]).total_cmp(&logprob(a[0])));
        }
        let expected: Vec<_> = all.iter().take(n).map(|tokens| text(tokens)).collect();
        assert_eq!(texts(&answer), expected, "{body}");
        // All of them were generated.
        assert_eq!(answer["usage"]["completion_tokens"], 3 * best_of);
        assert_eq!(answer["usage"]["prompt_tokens"], tokens("Hello").len());
    }
}

#[tokio::test]
async fn an_echo_is_that_of_every_choice() {
    let router = Router::start(script()).await;
    for fields in [json!({"echo": true}), json!({"echo": true, "logprobs": 1}), json!({"logprobs": 2})] {
        let mut one = json!({"prompt": "Hello", "max_tokens": 2, "temperature": 0});
        one.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let expected = &router.ok("/v1/completions", &one).await["choices"][0];
        one["n"] = json!(3);
        for (index, choice) in
            router.ok("/v1/completions", &one).await["choices"].as_array().unwrap().iter().enumerate()
        {
            let mut expected = expected.clone();
            expected["index"] = json!(index);
            assert_eq!(*choice, expected);
        }
    }
    let scored = json!({"prompt": "Hello", "n": 2, "echo": true, "logprobs": 1, "max_tokens": 0});
    let answer = router.ok("/v1/completions", &scored).await;
    assert_eq!(texts(&answer), ["Hello", "Hello"]);
    assert_eq!(answer["choices"][0]["logprobs"], answer["choices"][1]["logprobs"]);
}

#[tokio::test]
async fn a_client_that_leaves_ends_all_choices() {
    let script = Script { held: [Gate::Steps].into(), ..script() };
    let router = Router::start(script).await;
    let asked = router.begin("/v1/completions", &json!({"prompt": "Hello", "n": 5}));
    router.holds(5).await;
    asked.abort();
    router.holds(0).await;
    router.shard.release(&Gate::Steps);
    router.ok("/v1/completions", &json!({"prompt": "Hello"})).await;
}

#[tokio::test]
async fn numbers_of_choices_that_make_no_sense() {
    let router = Router::start_with(script(), |config| config.router.max_concurrent_requests = 16).await;
    for (fields, param, cause) in [
        (json!({"n": 0}), "n", "must be from 1 to 128"),
        (json!({"n": 129}), "n", "must be from 1 to 128"),
        (json!({"n": 17}), "n", "at most 16"),
        (json!({"n": 9, "prompt": ["a", "b"]}), "n", "at most 16"),
        (json!({"n": -1}), "n", "expected a non-negative integer"),
        (json!({"n": 1.5}), "n", "expected a non-negative integer"),
        (json!({"n": "2"}), "n", "expected a non-negative integer"),
        (json!({"best_of": 0}), "best_of", "must be from 1 to 128"),
        (json!({"best_of": 200}), "best_of", "must be from 1 to 128"),
        (json!({"best_of": 17}), "best_of", "at most 16"),
        (json!({"n": 3, "best_of": 2}), "best_of", "at least `n`"),
        (json!({"best_of": 2, "stream": true}), "best_of", "in a stream"),
    ] {
        let mut body = json!({"prompt": "x"});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let (status, answer) = router.post("/v1/completions", &body).await;
        assert_eq!(status, 400, "{answer}");
        assert_openai(&answer, answer["error"]["code"].as_str().unwrap(), cause);
        assert_eq!(answer["error"]["param"], param, "{answer}");
    }
    let chat = json!({"messages": [{"role": "user", "content": "x"}], "best_of": 2});
    let (_, answer) = router.post("/v1/chat/completions", &chat).await;
    assert_openai(&answer, "unsupported_parameter", "`best_of` is not supported");
    // A list of as many answers as may run is no overload.
    let answer = router.ok("/v1/completions", &json!({"prompt": ["a", "b"], "n": 8})).await;
    assert_eq!(texts(&answer).len(), 16);
}
