//! A whole body is what the events of the same stream add up to, in every dialect.

use std::sync::{Arc, Mutex};

use proptest::{
    collection::vec,
    prelude::{Just, Strategy, any, prop_oneof},
    sample::{select, subsequence},
    test_runner::{Config, TestRunner},
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::{
    router::{Router, text, tokens},
    shard::Script,
};

/// A request, and the model's answer to it.
#[derive(Debug, Clone)]
struct Case {
    answer: Vec<u32>,
    stop: Vec<&'static str>,
    ignore_eos: bool,
    max_tokens: u32,
    logprobs: Option<u32>,
    echo: bool,
}

/// Pieces of answers: words, parts of stop strings, characters of several tokens, parts of them, special tokens.
fn pieces() -> Vec<Vec<u32>> {
    let smile = tokens("🙂");
    let parts = [vec![smile[0]], smile[..2].to_vec(), vec![smile[3]]];
    let words = ["a", "b", "E", "N", "D", "END", " the", "é", "🙂", "<|user|>", "</s>", "<|user|>a"];
    words.iter().map(|word| tokens(word)).chain(parts).collect()
}

fn case() -> impl Strategy<Value = Case> {
    let stops = vec!["END", "b", "🙂", "<|user|>", "a<|user|>", "NDa", "é🙂", "<"];
    let answer = vec(select(pieces()), 0..8).prop_map(|pieces| pieces.concat());
    let logprobs = prop_oneof![Just(None), (0..3u32).prop_map(Some)];
    (answer, subsequence(stops, 0..4), any::<bool>(), 0..12u32, logprobs, any::<bool>()).prop_map(
        |(answer, stop, ignore_eos, max_tokens, logprobs, echo)| Case {
            answer,
            stop,
            ignore_eos,
            max_tokens,
            logprobs,
            echo,
        },
    )
}

/// Adds up the texts and lists in the choices of a stream.
fn fold_choices(events: &[Value], text: impl Fn(&Value) -> &Value, lists: &[&str]) -> (String, Value, Value) {
    let (mut content, mut logprobs, mut reason) = (String::new(), json!({}), Value::Null);
    for list in lists {
        logprobs[list] = json!([]);
    }
    for choice in events.iter().filter_map(|event| event["choices"].get(0)) {
        assert!(reason.is_null(), "something follows the end: {events:?}");
        content += text(choice).as_str().unwrap_or_default();
        for list in lists {
            let more = choice["logprobs"][list].as_array().cloned().unwrap_or_default();
            logprobs[list].as_array_mut().unwrap().extend(more);
        }
        reason = choice["finish_reason"].clone();
    }
    (content, logprobs, reason)
}

fn with(body: &Value, fields: Value) -> Value {
    let mut body = body.clone();
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

async fn check_completion(router: &Router, case: &Case) {
    let body = json!({"prompt": "0", "stop": case.stop, "ignore_eos": case.ignore_eos, "echo": case.echo,
        "max_tokens": case.max_tokens, "logprobs": case.logprobs});
    let whole = router.ok("/v1/completions", &body).await;
    let streamed = with(&body, json!({"stream": true, "stream_options": {"include_usage": true}}));
    let events = router.events("/v1/completions", &streamed).await;
    let lists = ["tokens", "token_logprobs", "top_logprobs", "text_offset"];
    let (content, logprobs, reason) = fold_choices(&events, |choice| &choice["text"], &lists);
    let choice = &whole["choices"][0];
    assert_eq!(choice["text"], content);
    assert_eq!(choice["finish_reason"], reason);
    assert_eq!(choice["logprobs"], if case.logprobs.is_some() { logprobs } else { Value::Null });
    assert_eq!(events[events.len() - 2]["usage"], whole["usage"]);
    check_offsets(choice, &content);
}

/// Visible tokens stand where their offsets say, one behind the other; their texts are the choice's text.
fn check_offsets(choice: &Value, content: &str) {
    let list = |name: &str| choice["logprobs"][name].as_array().cloned().unwrap_or_default();
    let (tokens, offsets) = (list("tokens"), list("text_offset"));
    let mut end = 0;
    for (token, offset) in tokens.iter().zip(&offsets) {
        assert_eq!(*offset, json!(end), "{choice}");
        let rest: String = content.chars().skip(end).collect();
        if rest.starts_with(token.as_str().unwrap()) {
            end += token.as_str().unwrap().chars().count();
        }
    }
    assert!(tokens.is_empty() || end == content.chars().count(), "{choice}");
}

async fn check_chat(router: &Router, case: &Case) {
    let body = json!({"messages": [{"role": "user", "content": "0"}], "stop": case.stop,
        "ignore_eos": case.ignore_eos, "max_tokens": case.max_tokens.max(1), "logprobs": case.logprobs.is_some(),
        "top_logprobs": case.logprobs});
    let whole = router.ok("/v1/chat/completions", &body).await;
    let events = router.events("/v1/chat/completions", &with(&body, json!({"stream": true}))).await;
    let (content, logprobs, reason) =
        fold_choices(&events, |choice| &choice["delta"]["content"], &["content"]);
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": content}));
    assert_eq!(choice["finish_reason"], reason);
    assert_eq!(choice["logprobs"], if case.logprobs.is_some() { logprobs } else { Value::Null });
    if let Some(tokens) = choice["logprobs"]["content"].as_array() {
        let joined: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
        assert_eq!(joined, content, "the tokens are the content");
        let bytes = tokens.iter().flat_map(|token| token["bytes"].as_array().unwrap());
        let bytes: Vec<u8> = bytes.map(|byte| byte.as_u64().unwrap() as u8).collect();
        if !content.contains('\u{fffd}') {
            assert_eq!(bytes, content.as_bytes(), "and so are their bytes");
        }
    }
}

async fn check_native(router: &Router, case: &Case) {
    let parameters = json!({"stop": case.stop, "ignore_eos_token": case.ignore_eos, "details": true,
        "max_new_tokens": case.max_tokens.max(1), "return_k_alternatives": case.logprobs});
    let body = json!({"inputs": "0", "parameters": parameters});
    let whole = router.ok("/generate", &body).await;
    let events = router.events("/generate_stream", &body).await;
    let tokens: Vec<Value> = events.iter().map(|event| event["token"].clone()).collect();
    assert_eq!(whole["details"]["tokens"], json!(tokens));
    let last = events.last().unwrap();
    assert_eq!(whole["generated_text"], last["generated_text"]);
    for field in ["finish_reason", "prompt_tokens", "generated_tokens", "seed"] {
        assert_eq!(whole["details"][field], last["details"][field], "{field}");
    }
    let visible = tokens.iter().filter(|token| token["special"] == false);
    let joined: String = visible.map(|token| token["text"].as_str().unwrap()).collect();
    assert_eq!(whole["generated_text"], joined, "the tokens are the text");
}

#[test]
fn a_whole_body_is_the_fold_of_its_stream() {
    let runtime = Runtime::new().unwrap();
    let said: Arc<Mutex<Vec<u32>>> = Arc::default();
    let answer = said.clone();
    let script = Script::answering(move |_| answer.lock().unwrap().clone());
    let router = runtime.block_on(Router::start(script));
    let mut runner = TestRunner::new(Config { cases: 150, failure_persistence: None, ..Config::default() });
    let check = |case: Case| {
        said.lock().unwrap().clone_from(&case.answer);
        println!("{:?} {:?}", text(&case.answer), case);
        runtime.block_on(async {
            check_completion(&router, &case).await;
            check_chat(&router, &case).await;
            check_native(&router, &case).await;
        });
        Ok(())
    };
    runner.run(&case(), check).unwrap();
}
