//! The bytes of bodies, and what of a request decides them.

use std::time::Instant;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    router::{MODEL, Router, tokens, with_bos},
    shard::{Gate, IMPROBABLE, Script},
};

async fn saying(answer: &str) -> Router {
    Router::start(Script::saying(tokens(answer))).await
}

/// A body's bytes, without what differs every time.
async fn bytes(router: &Router, path: &str, body: &Value) -> String {
    let text = router.send(path, body).await.text().await.unwrap();
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some(at) = [r#""id":"c"#, r#""created":1"#, r#""system_fingerprint":"fp_"#]
        .iter()
        .filter_map(|key| rest.find(key))
        .min()
    {
        let (before, from) = rest.split_at(at);
        let (key, value) = from.split_once(':').unwrap();
        let end = value.find(',').unwrap();
        out += &format!("{before}{key}:_");
        rest = &value[end..];
    }
    out + rest
}

/// Routes of LoRAX's, bodies, and the bytes of the answers.
fn native() -> Vec<(&'static str, Value, &'static str)> {
    vec![
        ("/generate", json!({"inputs": "x"}), r#"{"generated_text":"ab"}"#),
        ("/", json!({"inputs": "x"}), r#"[{"generated_text":"ab"}]"#),
        (
            "/generate",
            json!({"inputs": "Hi", "parameters": {"decoder_input_details": true, "return_k_alternatives": 1, "max_new_tokens": 1}}),
            r#"{"generated_text":"a","details":{"finish_reason":"length","prompt_tokens":2,"generated_tokens":1,"skipped_tokens":0,"seed":null,"prefill":[{"id":43,"text":"H","logprob":null},{"id":76,"text":"i","logprob":-1.1875}],"tokens":[{"id":68,"text":"a","logprob":-1.0625,"special":false,"alternative_tokens":[{"id":68,"text":"a","logprob":-1.0625}],"skipped":false}]}}"#,
        ),
        (
            "/generate_stream",
            json!({"inputs": "x", "parameters": {"details": true, "max_new_tokens": 2, "do_sample": true, "seed": 7}}),
            "data: {\"token\":{\"id\":68,\"text\":\"a\",\"logprob\":-1.0625,\"special\":false,\"skipped\":false},\"generated_text\":null,\"details\":null}\n\n\
             data: {\"token\":{\"id\":69,\"text\":\"b\",\"logprob\":-1.078125,\"special\":false,\"skipped\":false},\"generated_text\":\"ab\",\"details\":{\"finish_reason\":\"length\",\"prompt_tokens\":1,\"generated_tokens\":2,\"seed\":7}}\n\n",
        ),
        (
            "/generate",
            json!({"inputs": "x", "parameters": {"top_p": 2}}),
            r#"{"error":"Input validation error: `top_p` must be > 0.0 and <= 1.0","error_type":"validation"}"#,
        ),
    ]
}

/// The same of OpenAI's.
fn openai() -> Vec<(&'static str, Value, &'static str)> {
    let chat = |fields: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 2});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    };
    vec![
        (
            "/v1/completions",
            json!({"prompt": "Hi", "logprobs": 1, "echo": true, "max_tokens": 1}),
            r#"{"id":_,"object":"text_completion","created":_,"model":"the/base-model","system_fingerprint":_,"choices":[{"index":0,"text":"Hia","logprobs":{"tokens":["H","i","a"],"token_logprobs":[null,-1.1875,-1.0625],"top_logprobs":[null,{"i":-1.1875},{"a":-1.0625}],"text_offset":[0,1,2]},"finish_reason":"length"}],"usage":{"prompt_tokens":2,"completion_tokens":1,"total_tokens":3,"prompt_tokens_details":{"cached_tokens":0}}}"#,
        ),
        (
            "/v1/completions",
            json!({"prompt": "x", "max_tokens": 1, "stream": true, "stream_options": {"include_usage": true}}),
            "data: {\"id\":_,\"object\":\"text_completion\",\"created\":_,\"model\":\"the/base-model\",\"system_fingerprint\":_,\"choices\":[{\"index\":0,\"text\":\"a\",\"logprobs\":null,\"finish_reason\":\"length\"}],\"usage\":null}\n\n\
             data: {\"id\":_,\"object\":\"text_completion\",\"created\":_,\"model\":\"the/base-model\",\"system_fingerprint\":_,\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1,\"total_tokens\":2,\"prompt_tokens_details\":{\"cached_tokens\":0}}}\n\n\
             data: [DONE]\n\n",
        ),
        (
            "/v1/chat/completions",
            chat(json!({"logprobs": true, "top_logprobs": 1, "max_tokens": 1})),
            r#"{"id":_,"object":"chat.completion","created":_,"model":"the/base-model","system_fingerprint":_,"choices":[{"index":0,"message":{"role":"assistant","content":"a"},"logprobs":{"content":[{"token":"a","logprob":-1.0625,"bytes":[97],"top_logprobs":[{"token":"a","logprob":-1.0625,"bytes":[97]}]}]},"finish_reason":"length"}],"usage":{"prompt_tokens":4,"completion_tokens":1,"total_tokens":5,"prompt_tokens_details":{"cached_tokens":0}}}"#,
        ),
        (
            "/v1/chat/completions",
            chat(json!({"stream": true, "max_tokens": 1})),
            "data: {\"id\":_,\"object\":\"chat.completion.chunk\",\"created\":_,\"model\":\"the/base-model\",\"system_fingerprint\":_,\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n\
             data: {\"id\":_,\"object\":\"chat.completion.chunk\",\"created\":_,\"model\":\"the/base-model\",\"system_fingerprint\":_,\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n\
             data: {\"id\":_,\"object\":\"chat.completion.chunk\",\"created\":_,\"model\":\"the/base-model\",\"system_fingerprint\":_,\"choices\":[{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"length\"}]}\n\n\
             data: [DONE]\n\n",
        ),
        (
            "/v1/completions",
            json!({"prompt": "x", "top_p": 2}),
            r#"{"error":{"message":"`top_p` must be > 0.0 and <= 1.0","type":"invalid_request_error","param":"top_p","code":"invalid_value"}}"#,
        ),
    ]
}

#[tokio::test]
async fn bodies_have_these_bytes() {
    let router = saying("ab").await;
    for (path, body, expected) in [native(), openai()].concat() {
        assert_eq!(bytes(&router, path, &body).await, expected, "{path} {body}");
    }
    let models = router.get("/v1/models").await.text().await.unwrap();
    let (before, after) = models.split_once(r#""created":"#).unwrap();
    assert_eq!(before, r#"{"object":"list","data":[{"id":"the/base-model","object":"model","#);
    let after = after.trim_start_matches(|digit: char| digit.is_ascii_digit());
    assert_eq!(after, r#","owned_by":"lorax","root":"the/base-model","parent":null}]}"#);
    let info = router.get("/info").await.text().await.unwrap();
    assert!(info.starts_with(r#"{"model_id":"the/base-model","model_sha":"#), "{info}");
}

#[tokio::test]
async fn an_empty_adapter_is_no_adapter_and_the_base_has_a_name() {
    let router = saying("a").await;
    for (fields, adapter) in [
        (json!({"model": "sql", "adapter_id": ""}), Some("sql")),
        (json!({"model": "sql", "adapter_id": null}), Some("sql")),
        (json!({"model": "sql", "adapter_id": "__base_model__"}), None),
        (json!({"model": "__base_model__"}), None),
        (json!({"model": MODEL, "adapter_id": ""}), None),
        (json!({"model": MODEL, "adapter_id": "__base_model__"}), None),
        (json!({"model": "", "adapter_id": ""}), None),
        (json!({"adapter_id": ""}), None),
        (json!({"adapter_id": "__base_model__"}), None),
        (json!({"adapter_id": "pirate"}), Some("pirate")),
        (json!({"model": "__base_model__", "adapter_id": "pirate"}), Some("pirate")),
    ] {
        let mut body = json!({"prompt": "Hi"});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        router.ok("/v1/completions", &body).await;
        assert_eq!(router.shard.last_adapter().await.as_deref(), adapter, "{fields}");
    }
    for id in ["", "__base_model__"] {
        router.ok("/generate", &json!({"inputs": "x", "parameters": {"adapter_id": id}})).await;
        assert_eq!(router.shard.last_adapter().await, None);
    }
}

#[tokio::test]
async fn a_truncated_prompt_keeps_the_token_that_texts_begin_with() {
    let folder = with_bos();
    let path = folder.path().to_owned();
    let router = Router::start_with(Script::saying(tokens("b")), |config| config.model.path = path).await;
    let all = [vec![0], tokens("abcdef")].concat();
    for keep in 1..=10 {
        let body = json!({"inputs": "abcdef", "parameters": {"truncate": keep, "details": true}});
        let answer = router.ok("/generate", &body).await;
        let kept = [vec![0], all[(all.len() + 1).saturating_sub(keep).max(1)..].to_vec()].concat();
        assert_eq!(answer["details"]["prompt_tokens"], kept.len(), "{keep}");
        assert_eq!(router.shard.saw(|seen| Some(seen.added().last()?.tokens.clone())).await, kept, "{keep}");
    }
    // What the text itself begins with is not kept.
    let plain = saying("b").await;
    plain.ok("/generate", &json!({"inputs": "<s>abc", "parameters": {"truncate": 2}})).await;
    plain.shard.sequence_of(&tokens("bc")).await;
}

#[tokio::test]
async fn the_total_time_counts_from_the_arrival() {
    let router = saying("a").await;
    let body = json!({"inputs": "x"}).to_string();
    let mut socket = TcpStream::connect(&router.address).await.unwrap();
    let head = format!(
        "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 25];
    socket.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 100 Continue\r\n\r\n", "the head has been read");
    let arrived = Instant::now();
    for _ in 0..30 {
        router.ok("/generate", &json!({"inputs": "y"})).await;
    }
    let late = arrived.elapsed().as_millis();
    assert!(late > 0);
    socket.write_all(body.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    let header = |name: &str| {
        let line = answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.unwrap().parse::<u128>().unwrap()
    };
    assert!(header("x-total-time") >= late, "{late} ms before its body came: {answer}");
    assert!(header("x-inference-time") <= header("x-total-time") - late + 1, "{answer}");
}

#[tokio::test]
async fn whoever_comes_too_early_is_told_when_to_try_again() {
    let mut script = Script::saying(tokens("a"));
    script.held.insert(Gate::Info);
    let router = Router::launch(script, |_| {}).await;
    let chat = json!({"messages": [{"role": "user", "content": "x"}]});
    for (path, body) in [
        ("/generate", json!({"inputs": "x"})),
        ("/generate_stream", json!({"inputs": "x"})),
        ("/", json!({"inputs": "x", "stream": true})),
        ("/v1/completions", json!({"prompt": "x"})),
        ("/v1/completions", json!({"prompt": ["x", "y"], "stream": true})),
        ("/v1/chat/completions", chat),
    ] {
        let response = router.send(path, &body).await;
        assert_eq!(response.status(), 503, "{path}");
        let after: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
        assert!(after >= 1, "{path}");
        let body: Value = response.json().await.unwrap();
        match path.starts_with("/v1/") {
            true => assert_eq!(
                (&body["error"]["type"], &body["error"]["code"]),
                (&json!("server_error"), &json!("unavailable"))
            ),
            false => assert_eq!(body["error_type"], "unavailable"),
        }
    }
}

#[tokio::test]
async fn a_developer_is_the_system() {
    let router = saying("a").await;
    let chat =
        |role: &str| json!({"messages": [{"role": role, "content": "x"}, {"role": "user", "content": "y"}]});
    let mut prompts = Vec::new();
    for role in ["system", "developer"] {
        router.ok("/v1/chat/completions", &chat(role)).await;
        prompts.push(router.shard.saw(|seen| Some(seen.added().last()?.tokens.clone())).await);
    }
    assert_eq!(prompts[0], prompts[1]);
}

#[tokio::test]
async fn an_error_is_the_last_event_of_its_choice() {
    let answer = |prompt: &[u32]| {
        let bad = if *prompt == tokens("bad") { vec![IMPROBABLE] } else { tokens("aa") };
        [tokens("aa"), bad, tokens("aaaa")].concat()
    };
    let router = Router::start(Script::answering(answer)).await;
    let body = json!({"prompt": ["bad", "good"], "max_tokens": 8, "ignore_eos": true, "stream": true});
    let events = router.events("/v1/completions", &body).await;
    let failed = events.iter().position(|event| event["error"].is_object()).unwrap();
    assert_eq!(events.iter().filter(|event| event["error"].is_object()).count(), 1);
    assert_eq!(events[failed]["error"]["code"], "generation");
    let of = |index: u64| {
        let choices =
            events.iter().enumerate().filter_map(move |(at, event)| Some((at, event["choices"].get(0)?)));
        choices.filter(move |(_, choice)| choice["index"] == index)
    };
    assert!(of(0).all(|(at, choice)| at < failed && choice["finish_reason"].is_null()), "{events:?}");
    let text: String = of(1).map(|(_, choice)| choice["text"].as_str().unwrap()).collect();
    assert_eq!(text, "a".repeat(8));
    assert_eq!(of(1).next_back().unwrap().1["finish_reason"], "length");
    assert_eq!(events.last().unwrap(), "[DONE]");
    let native = json!({"inputs": "bad", "parameters": {"max_new_tokens": 8, "ignore_eos_token": true}});
    let events = router.events("/generate_stream", &native).await;
    assert_eq!(events.last().unwrap()["error_type"], "generation");
    assert_eq!(events.len(), 3);
}
