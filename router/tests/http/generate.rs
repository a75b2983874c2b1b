//! LoRAX's interface: whole and streamed, with all that it can report.

use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    router::{MODEL, Router, text, tokens},
    shard::{EOS, Script, logprob},
};

async fn saying(answer: &str) -> Router {
    Router::start(Script::saying(tokens(answer))).await
}

#[tokio::test]
async fn a_text_comes_whole() {
    let router = saying(" the License").await;
    let body = json!({"inputs": "Hello"});
    assert_eq!(router.ok("/generate", &body).await, json!({"generated_text": " the License"}));
    assert_eq!(router.ok("/", &body).await, json!([{"generated_text": " the License"}]));
    let full = json!({"inputs": "Hello", "parameters": {"return_full_text": true}});
    assert_eq!(router.ok("/generate", &full).await["generated_text"], "Hello the License");
}

#[tokio::test]
async fn a_text_comes_as_events() {
    let answer = tokens(" the License");
    let router = saying(" the License").await;
    let body = json!({"inputs": "Hello", "parameters": {"details": true, "seed": 7}, "stream": true});
    for path in ["/generate_stream", "/"] {
        let events = router.events(path, &body).await;
        let (last, before) = events.split_last().unwrap();
        let ids: Vec<_> = before.iter().map(|event| event["token"]["id"].as_u64().unwrap() as u32).collect();
        assert_eq!(ids, answer);
        for (event, id) in before.iter().zip(&answer) {
            let token = json!({"id": id, "text": text(&[*id]), "logprob": logprob(*id), "special": false, "skipped": false});
            assert_eq!(*event, json!({"token": token, "generated_text": null, "details": null}));
        }
        let token =
            json!({"id": EOS, "text": "</s>", "logprob": logprob(EOS), "special": true, "skipped": false});
        let details = json!({"finish_reason": "eos_token", "prompt_tokens": tokens("Hello").len(),
            "generated_tokens": answer.len() + 1, "seed": null});
        assert_eq!(*last, json!({"token": token, "generated_text": " the License", "details": details}));
    }
}

#[tokio::test]
async fn details_have_every_token() {
    let (prompt, answer) = (tokens("Hello or not"), tokens(" the"));
    let router = saying(" the").await;
    let parameters =
        json!({"decoder_input_details": true, "return_k_alternatives": 2, "max_new_tokens": 1, "seed": 3});
    let body = router.ok("/generate", &json!({"inputs": "Hello or not", "parameters": parameters})).await;
    let scored = |id: u32, logprob: Value| json!({"id": id, "text": text(&[id]), "logprob": logprob});
    let mut prefill: Vec<Value> = prompt.iter().map(|id| scored(*id, logprob(*id).into())).collect();
    prefill[0]["logprob"] = Value::Null;
    let alternatives: Vec<Value> =
        [answer[0], answer[0] + 1].iter().map(|id| scored(*id, logprob(*id).into())).collect();
    let token = json!({"id": answer[0], "text": " the", "logprob": logprob(answer[0]), "special": false,
        "skipped": false, "alternative_tokens": alternatives});
    let details = json!({"finish_reason": "length", "prompt_tokens": prompt.len(), "generated_tokens": 1,
        "skipped_tokens": 0, "seed": null, "prefill": prefill, "tokens": [token]});
    assert_eq!(body, json!({"generated_text": " the", "details": details}));
}

#[tokio::test]
async fn what_is_asked_for_reaches_the_shard() {
    let router = saying("x").await;
    let parameters = json!({"temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.125, "typical_p": 0.75,
        "repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": -0.5, "seed": 11,
        "return_k_alternatives": 4, "adapter_id": "sql", "api_token": "secret", "ignore_eos_token": true,
        "max_new_tokens": 3, "truncate": 2, "details": true});
    let body = json!({"inputs": "one two three", "parameters": parameters});
    let answer = router.ok("/generate", &body).await;
    assert_eq!(answer["details"]["finish_reason"], "length", "the end of the sequence was passed over");
    let new = router.shard.saw(|seen| seen.added().next().cloned()).await;
    let prompt = tokens("one two three");
    assert_eq!(new.tokens, prompt[prompt.len() - 2..]);
    assert!(new.members.len() == 1 && !new.prompt_logprobs);
    let sampling = proto::Sampling {
        bans: Vec::new(),
        temperature: 0.5,
        top_k: 7,
        top_p: 0.25,
        min_p: 0.125,
        typical_p: 0.75,
        repetition_penalty: 1.5,
        frequency_penalty: 0.5,
        presence_penalty: -0.5,
        seed: 11,
        num_top: 4,
        logit_bias: Vec::new(),
    };
    assert_eq!(new.sampling, Some(sampling));
    assert_eq!(router.shard.last_adapter().await.as_deref(), Some("sql"));
}

#[tokio::test]
async fn without_parameters_the_most_probable_token_is_taken() {
    let router = saying("x").await;
    router.ok("/generate", &json!({"inputs": "Hello", "parameters": null})).await;
    let sampling = router.shard.saw(|seen| seen.added().next()?.sampling.clone()).await;
    let neutral = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty);
    assert_eq!(neutral, (0.0, 0, 1.0, 1.0));
}

#[tokio::test]
async fn the_server_tells_what_it_is() {
    let router = saying("x").await;
    for path in ["/health", "/"] {
        assert_eq!(router.get(path).await.status(), 200);
    }
    let info: Value = router.get("/info").await.json().await.unwrap();
    for (field, value) in [
        ("model_id", json!(MODEL)),
        ("model_sha", json!("abc")),
        ("model_dtype", json!("torch.float32")),
        ("model_device_type", json!("cpu")),
        ("max_total_tokens", json!(4096)),
        ("max_input_length", json!(4095)),
        ("max_batch_total_tokens", json!(65536)),
        ("max_concurrent_requests", json!(64)),
        ("max_active_adapters", json!(4)),
    ] {
        assert_eq!(info[field], value, "{field}");
    }
    let models: Value = router.get("/v1/models").await.json().await.unwrap();
    let created = &models["data"][0]["created"];
    let model = json!({"id": MODEL, "object": "model", "created": created, "owned_by": "lorax", "root": MODEL, "parent": null});
    assert_eq!(models, json!({"object": "list", "data": [model]}));
}

#[tokio::test]
async fn a_request_may_fill_what_memory_holds() {
    let mut script = Script::saying(tokens("a").repeat(1000));
    (script.info.num_blocks, script.info.block_size) = (6, 16);
    let router = Router::start(script).await;
    let info: Value = router.get("/info").await.json().await.unwrap();
    assert_eq!((&info["max_total_tokens"], &info["max_input_length"]), (&json!(97), &json!(96)));
    let prompt = tokens("Hello").len();
    let body = |parameters: Value| json!({"inputs": "Hello", "parameters": parameters});
    let whole = router.ok("/generate", &body(json!({"details": true}))).await;
    assert_eq!(whole["details"]["generated_tokens"], 97 - prompt);
    assert_eq!(whole["details"]["finish_reason"], "length");
    assert_eq!(router.events("/generate_stream", &body(json!({}))).await.len(), 97 - prompt);
    for path in ["/generate", "/generate_stream"] {
        let (status, answer) = router.post(path, &body(json!({"max_new_tokens": 98 - prompt}))).await;
        assert_eq!(status, 422, "{path}");
        assert!(answer["error"].as_str().unwrap().contains("must be <= 97"), "{answer}");
    }
    let full = json!({"prompt": vec![5; 96], "max_tokens": 1});
    assert_eq!(router.ok("/v1/completions", &full).await["usage"]["total_tokens"], 97);
}

#[tokio::test]
async fn headers_say_where_the_time_went() {
    let router = saying(" the").await;
    let body = json!({"inputs": "Hello", "parameters": {"adapter_id": "sql"}});
    let answer = router.send("/generate", &body).await;
    let header = |name: &str| answer.headers()[name].to_str().unwrap().to_owned();
    assert_eq!((header("x-model-id"), header("x-adapter-id")), (MODEL.into(), "sql".into()));
    let count = |name: &str| header(name).parse::<usize>().unwrap();
    assert_eq!(count("x-total-tokens"), count("x-prompt-tokens") + 2);
    assert!(count("x-total-time") >= count("x-inference-time"));
}

#[tokio::test]
async fn browsers_are_told_who_may_ask() {
    for (allowed, answer) in [
        (&["http://here", "http://there"][..], Some("http://here")),
        (&["http://there"], None),
        (&["*"], Some("*")),
        (&[], None),
    ] {
        let origins = allowed.iter().map(ToString::to_string).collect();
        let script = Script::saying(tokens("x"));
        let router = Router::start_with(script, |config| config.router.cors_allow_origin = origins).await;
        let response = router.preflight("/generate", "http://here").await;
        let header = response.headers().get("access-control-allow-origin");
        assert_eq!(header.map(|header| header.to_str().unwrap()), answer, "{allowed:?}");
    }
    for origin in ["http://here", "https://a.here:8443", "http://[::1]:80", "chrome-extension://abc", "null"]
    {
        for allowed in [origin.to_owned(), origin.to_uppercase()] {
            if allowed == "NULL" {
                continue;
            }
            let script = Script::saying(tokens("x"));
            let router =
                Router::start_with(script, |config| config.router.cors_allow_origin = vec![allowed]).await;
            let response = router.preflight("/generate", origin).await;
            assert_eq!(response.headers()["access-control-allow-origin"], origin);
        }
    }
}

/// The headers that a page may send and read. For browsers "*" does not include `Authorization`.
#[tokio::test]
async fn pages_may_send_keys_and_read_headers() {
    let origins = vec!["http://here".to_owned()];
    let script = Script::saying(tokens("x"));
    let router = Router::start_with(script, |config| {
        config.router.cors_allow_origin = origins;
        config.router.api_keys = vec!["abc".into()];
    })
    .await;
    for asked in [
        "authorization",
        "content-type",
        "authorization,content-type",
        "x-request-id",
        "x-adapter-token,authorization",
        "x-stainless-lang,x-stainless-os",
    ] {
        let headers = [
            ("origin", "http://here"),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", asked),
        ];
        for path in ["/generate", "/v1/completions"] {
            let response = router.send_with(Method::OPTIONS, path, &headers, &Value::Null).await;
            assert_eq!(response.status(), 200);
            assert_eq!(response.headers()["access-control-allow-headers"], asked);
        }
    }
    for (path, key, status) in [
        ("/generate", "Bearer abc", 200),
        ("/v1/completions", "Bearer abc", 400),
        ("/generate", "Bearer no", 401),
        ("/nowhere", "Bearer abc", 404),
    ] {
        let headers = [("origin", "http://here"), ("authorization", key)];
        let response = router.send_with(Method::POST, path, &headers, &json!({"inputs": "x"})).await;
        assert_eq!(response.status(), status);
        assert_eq!(response.headers()["access-control-allow-origin"], "http://here");
        assert_eq!(response.headers()["access-control-expose-headers"], "*");
    }
}
