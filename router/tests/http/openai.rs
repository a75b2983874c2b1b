//! OpenAI's interface: the four forms of a prompt, chats, streams, log-probabilities, echo.

use serde_json::{Value, json};

use crate::{
    router::{MODEL, Router, model, text, tokens, with_bos},
    shard::{Script, logprob},
};

async fn saying(answer: &str) -> Router {
    Router::start(Script::saying(tokens(answer))).await
}

/// Answers each prompt with itself.
async fn echoing() -> Router {
    Router::start(Script::answering(<[u32]>::to_vec)).await
}

fn texts(body: &Value) -> Vec<&str> {
    body["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_prompt_has_four_forms() {
    let router = echoing().await;
    for (prompt, expected) in [
        (json!("Hello"), vec!["Hello"]),
        (json!(["Hello", "You", "Work"]), vec!["Hello", "You", "Work"]),
        (json!(tokens("Hello")), vec!["Hello"]),
        (json!([tokens("Hello"), tokens("You")]), vec!["Hello", "You"]),
    ] {
        let body = json!({"model": MODEL, "prompt": prompt});
        let answer = router.ok("/v1/completions", &body).await;
        assert_eq!(texts(&answer), expected);
        assert_eq!((&answer["object"], &answer["model"]), (&json!("text_completion"), &json!(MODEL)));
        assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
        let mut streamed = vec![String::new(); expected.len()];
        let mut reasons = 0;
        let body = json!({"model": MODEL, "prompt": prompt, "stream": true});
        let events = router.events("/v1/completions", &body).await;
        let (last, chunks) = events.split_last().unwrap();
        assert_eq!(last, "[DONE]");
        for choice in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()) {
            streamed[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
            reasons += usize::from(choice["finish_reason"] == "stop");
        }
        assert_eq!((streamed, reasons), (expected.iter().map(ToString::to_string).collect(), expected.len()));
    }
}

#[tokio::test]
async fn usage_counts_all_choices() {
    let router = echoing().await;
    let (prompts, options) = (json!(["Hello", "Work"]), json!({"include_usage": true}));
    let input = tokens("Hello").len() + tokens("Work").len();
    let usage = json!({"prompt_tokens": input, "completion_tokens": input + 2, "total_tokens": 2 * input + 2,
        "prompt_tokens_details": {"cached_tokens": 0}});
    let answer = router.ok("/v1/completions", &json!({"prompt": prompts})).await;
    assert_eq!(answer["usage"], usage);
    let body = json!({"prompt": prompts, "stream": true, "stream_options": options});
    let events = router.events("/v1/completions", &body).await;
    let [chunks @ .., last, done] = &events[..] else { panic!("{events:?}") };
    assert!(chunks.iter().all(|chunk| chunk["usage"].is_null()));
    assert_eq!((&last["choices"], &last["usage"], done), (&json!([]), &usage, &json!("[DONE]")));
}

#[tokio::test]
async fn log_probabilities_are_reported_as_lists() {
    let router = saying("ab").await;
    let [a, b] = tokens("ab")[..] else { panic!("a token a letter") };
    let body = json!({"prompt": "Hi", "echo": true, "logprobs": 1, "max_tokens": 2});
    let answer = router.ok("/v1/completions", &body).await;
    assert_eq!(answer["choices"][0]["text"], "Hiab");
    let [h, i] = tokens("Hi")[..] else { panic!("a token a letter") };
    let logprobs = json!({
        "tokens": ["H", "i", "a", "b"],
        "token_logprobs": [null, logprob(i), logprob(a), logprob(b)],
        "top_logprobs": [null, {"i": logprob(i)}, {"a": logprob(a)}, {"b": logprob(b)}],
        "text_offset": [0, 1, 2, 3],
    });
    assert_eq!(answer["choices"][0]["logprobs"], logprobs, "{h}");
    let body = json!({"prompt": "Hi", "logprobs": 0, "max_tokens": 2, "stream": true});
    let events = router.events("/v1/completions", &body).await;
    let first = json!({"tokens": ["a"], "token_logprobs": [logprob(a)], "top_logprobs": [{"a": logprob(a)}],
        "text_offset": [0]});
    assert_eq!(events[0]["choices"][0]["logprobs"], first);
    assert_eq!(events[1]["choices"][0]["logprobs"]["text_offset"], json!([1]));
}

#[tokio::test]
async fn an_echo_comes_first_in_a_stream() {
    let router = saying("ab").await;
    let body = json!({"prompt": "Hi", "echo": true, "max_tokens": 2, "logprobs": 1, "stream": true});
    let events = router.events("/v1/completions", &body).await;
    let chunks = &events[..events.len() - 1];
    let parts: Vec<_> = chunks.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(parts, ["Hi", "a", "b"]);
    let tokens: Vec<_> =
        chunks.iter().map(|event| event["choices"][0]["logprobs"]["tokens"].clone()).collect();
    assert_eq!(tokens, [json!(["H", "i"]), json!(["a"]), json!(["b"])]);
    assert_eq!(chunks[1]["choices"][0]["logprobs"]["text_offset"], json!([2]));
}

#[tokio::test]
async fn an_echo_is_the_prompt_as_it_was_written() {
    let folder = with_bos();
    let path = folder.path().to_owned();
    let router = Router::start_with(Script::saying(tokens("b")), |config| config.model.path = path).await;
    let given = [vec![0], tokens("a")].concat();
    for (prompt, echo) in [(json!("a"), "ab"), (json!(given), "<s>ab")] {
        let body = json!({"prompt": prompt, "echo": true});
        assert_eq!(texts(&router.ok("/v1/completions", &body).await), [echo]);
        router.shard.sequence_of(&given).await;
    }
}

#[tokio::test]
async fn a_chat_goes_through_the_models_template() {
    let router = saying("Work").await;
    let messages = json!([
        {"role": "user", "content": [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]},
        {"role": "assistant", "content": "You"},
        {"role": "user", "content": "Work"},
    ]);
    let answer = router.ok("/v1/chat/completions", &json!({"model": MODEL, "messages": messages})).await;
    let message = json!({"role": "assistant", "content": "Work"});
    let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": "stop"});
    assert_eq!(answer["choices"], json!([choice]));
    assert_eq!(answer["object"], "chat.completion");
    let prompt = tokens("<|user|>Hello</s><|assistant|>You</s><|user|>Work</s><|assistant|>");
    assert_eq!(answer["usage"]["prompt_tokens"], prompt.len());
    router.shard.sequence_of(&prompt).await;
}

#[tokio::test]
async fn a_chat_streams_with_log_probabilities() {
    let router = saying("ab").await;
    let [a, b] = tokens("ab")[..] else { panic!("a token a letter") };
    let body = json!({"messages": [{"role": "user", "content": "Hi"}], "stream": true, "logprobs": true,
        "top_logprobs": 1, "max_completion_tokens": 5});
    let events = router.events("/v1/chat/completions", &body).await;
    let content = |id: u32| {
        let name = text(&[id]);
        let entry = json!({"token": name, "logprob": logprob(id), "bytes": name.as_bytes()});
        let mut outer = entry.clone();
        outer["top_logprobs"] = json!([entry]);
        json!({"content": [outer]})
    };
    let choice = |delta: Value, logprobs: Value, reason: Value| json!({"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason});
    let expected = [
        choice(json!({"role": "assistant", "content": ""}), Value::Null, Value::Null),
        choice(json!({"content": "a"}), content(a), Value::Null),
        choice(json!({"content": "b"}), content(b), Value::Null),
        choice(json!({}), Value::Null, json!("stop")),
    ];
    let chunks = &events[..events.len() - 1];
    let choices: Vec<_> = chunks.iter().map(|event| event["choices"][0].clone()).collect();
    assert_eq!(choices, expected);
    let id = &events[0]["id"];
    assert!(chunks.iter().all(|event| event["object"] == "chat.completion.chunk" && event["id"] == *id));
    assert_eq!(events.last().unwrap(), "[DONE]");
}

#[tokio::test]
async fn the_model_names_the_adapter() {
    let router = saying("a").await;
    for (fields, adapter) in [
        (json!({"model": MODEL}), None),
        (json!({}), None),
        (json!({"model": ""}), None),
        (json!({"model": "sql"}), Some("sql")),
        (json!({"model": MODEL, "adapter_id": "pirate"}), Some("pirate")),
        (json!({"model": "sql", "adapter_id": "pirate"}), Some("pirate")),
        (json!({"model": format!("{MODEL}|sql")}), Some("sql")),
        (json!({"model": format!("{MODEL}|sql"), "adapter_id": "pirate"}), Some("pirate")),
        (json!({"model": format!("{MODEL}|")}), None),
    ] {
        let mut body = json!({"prompt": "Hi"});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        router.ok("/v1/completions", &body).await;
        assert_eq!(router.shard.last_adapter().await.as_deref(), adapter, "{fields}");
    }
}

#[tokio::test]
async fn what_is_asked_for_reaches_the_shard() {
    let router = saying("a").await;
    let body = json!({"prompt": "Hi", "temperature": 0.5, "top_p": 0.25, "frequency_penalty": 0.5,
        "presence_penalty": -0.5, "seed": -1, "logit_bias": {"7": 2.5}, "logprobs": 2, "top_k": 9, "min_p": 0.125,
        "typical_p": 0.75, "repetition_penalty": 1.5});
    router.ok("/v1/completions", &body).await;
    let sampling = proto::Sampling {
        bans: Vec::new(),
        temperature: 0.5,
        top_k: 9,
        top_p: 0.25,
        min_p: 0.125,
        typical_p: 0.75,
        repetition_penalty: 1.5,
        frequency_penalty: 0.5,
        presence_penalty: -0.5,
        seed: u64::MAX,
        num_top: 2,
        logit_bias: vec![proto::LogitBias { token: 7, bias: 2.5 }],
    };
    assert_eq!(router.shard.saw(|seen| seen.added().next()?.sampling.clone()).await, sampling);
}

/// A router whose model has this template and no other.
async fn with_template(source: &str) -> Router {
    let folder = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(model().join(file), folder.path().join(file)).unwrap();
    }
    std::fs::write(folder.path().join("chat_template.jinja"), source).unwrap();
    Router::start_with(Script::saying(tokens("a")), |config| config.model.path = folder.path().to_owned())
        .await
}

#[tokio::test]
async fn a_template_that_fails_fails_chats_alone() {
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}]});
    for (source, cause) in [
        ("{% if %}", "does not compile"),
        ("{% for m in messages %}", "does not compile"),
        ("{% unknown %}", "does not compile"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages.missing.deeper }}", "undefined"),
        ("{{ unknown_function() }}", "unknown_function"),
        ("{{ messages[0].content + 1 }}", "string"),
        ("{{ 1 / 0 }}", "1 / 0"),
        ("{% for x in none %}{% endfor %}", "None"),
        ("{{ messages | unknown_filter }}", "unknown_filter"),
    ] {
        let router = with_template(source).await;
        assert_eq!(router.get("/health").await.status(), 200);
        let (status, body) = router.post("/v1/chat/completions", &chat).await;
        assert_eq!(
            (status.as_u16(), &body["error"]["code"]),
            (400, &json!("template_error")),
            "{source} {body}"
        );
        assert!(body["error"]["message"].as_str().unwrap().contains(cause), "{source} {body}");
        assert_eq!(router.ok("/generate", &json!({"inputs": "x"})).await["generated_text"], "a");
        assert_eq!(router.ok("/v1/completions", &json!({"prompt": "x"})).await["choices"][0]["text"], "a");
    }
    let router = with_template("{% generation %}{{ messages[0].content }}{% endgeneration %}").await;
    assert_eq!(router.ok("/v1/chat/completions", &chat).await["choices"][0]["message"]["content"], "a");
}
