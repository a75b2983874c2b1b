//! Requests that are refused: status, kind, and the shape of each dialect.

use config::Config;
use lifecycle::Supervisor;
use lorax_router::App;
use serde_json::{Value, json};
use tonic::Status;

use crate::{
    router::{Router, configuration, tokens},
    shard::{Gate, Script},
};

const NATIVE: [&str; 3] = ["/generate", "/generate_stream", "/"];
const OPENAI: [&str; 2] = ["/v1/completions", "/v1/chat/completions"];

pub(crate) fn assert_native(body: &Value, kind: &str, cause: &str) {
    let fields: Vec<_> = body.as_object().unwrap().keys().collect();
    assert_eq!(fields, ["error", "error_type"]);
    assert_eq!(body["error_type"], kind, "{body}");
    assert!(body["error"].as_str().unwrap().contains(cause), "{cause:?} in {body}");
}

pub(crate) fn assert_openai(body: &Value, code: &str, cause: &str) {
    let fields: Vec<_> = body["error"].as_object().unwrap().keys().collect();
    assert_eq!(fields, ["message", "type", "param", "code"], "{body}");
    assert_eq!(body["error"]["code"], code, "{body}");
    assert!(body["error"]["message"].as_str().unwrap().contains(cause), "{cause:?} in {body}");
}

/// The fields that each route needs for an answer.
fn good(path: &str) -> Value {
    match path {
        "/v1/completions" => json!({"prompt": "Hi"}),
        "/v1/chat/completions" => json!({"messages": [{"role": "user", "content": "Hi"}]}),
        _ => json!({"inputs": "Hi", "parameters": {}}),
    }
}

/// A good body with one field more, where the dialect has its parameters.
fn with(path: &str, name: &str, value: &Value) -> Value {
    let mut body = good(path);
    let fields = if NATIVE.contains(&path) { &mut body["parameters"] } else { &mut body };
    fields[name] = value.clone();
    body
}

/// Sends good bodies with one field more, and checks how they are refused.
async fn field_refused(router: &Router, paths: &[&str], name: &str, value: &Value, cause: &str) {
    for path in paths {
        let (status, answer) = router.post(path, &with(path, name, value)).await;
        if NATIVE.contains(path) {
            assert_eq!(status, 422, "{path} {name} {answer}");
            assert_native(&answer, "validation", cause);
        } else {
            assert_eq!(status, 400, "{path} {name} {answer}");
            let code = answer["error"]["code"].as_str().unwrap();
            let codes = ["invalid_value", "invalid_type", "unsupported_parameter", "context_length_exceeded"];
            assert!(codes.contains(&code), "{answer}");
            assert_openai(&answer, code, cause);
            // The part of the field that is at fault, if not all of it.
            let param = answer["error"]["param"].as_str().unwrap();
            assert!(
                param == name
                    || code == "context_length_exceeded"
                    || param.starts_with(&format!("{name}."))
                    || param.starts_with(&format!("{name}[")),
                "{answer}"
            );
        }
    }
}

#[tokio::test]
async fn bodies_that_are_no_json() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let nested = [&b"{\"x\":"[..], &[b'['; 5000]].concat();
    let cases: [&[u8]; 6] =
        [b"", b"{\"inputs\": \"x", b"\xff\xfe", b"{\"inputs\": \"\xff\"}", b"nonsense", &nested];
    for body in cases {
        for path in NATIVE {
            let (status, answer) = router.post_bytes(path, body.to_vec()).await;
            assert_eq!(status, 400, "{path}: {answer}");
            assert_native(&answer, "malformed", "not valid JSON");
        }
        for path in OPENAI {
            let (status, answer) = router.post_bytes(path, body.to_vec()).await;
            assert_eq!(status, 400, "{path}: {answer}");
            assert_openai(&answer, "malformed", "not valid JSON");
        }
    }
}

#[tokio::test]
async fn parameters_out_of_range() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let both = [
        ("temperature", json!(-0.5), "`temperature`"),
        ("temperature", json!("hot"), "invalid type"),
        ("temperature", json!(1e39), "`temperature`"),
        ("top_p", json!(0.0), "`top_p`"),
        ("top_p", json!(1.5), "`top_p`"),
        ("top_k", json!(-1), "invalid value"),
        ("min_p", json!(2), "`min_p`"),
        ("typical_p", json!(0), "`typical_p`"),
        ("repetition_penalty", json!(0), "`repetition_penalty`"),
        ("repetition_penalty", json!(1e-39), "`repetition_penalty`"),
        ("repetition_penalty", json!(101), "`repetition_penalty`"),
        ("frequency_penalty", json!(3), "`frequency_penalty`"),
        ("presence_penalty", json!(-3), "`presence_penalty`"),
        ("stop", json!(vec!["x"; 5]), "up to 4"),
        ("stop", json!([""]), "must not be empty"),
    ];
    let native = [
        ("max_new_tokens", json!(-1), "invalid value"),
        ("max_new_tokens", json!(0), "`max_new_tokens`"),
        ("max_new_tokens", json!(5000), "must be <= 4096"),
        ("truncate", json!(0), "`truncate`"),
        ("seed", json!(-1), "invalid value"),
        ("return_k_alternatives", json!(21), "at most 20"),
        ("decoder_input_details", json!(7), "invalid type"),
    ];
    let openai = [
        ("max_tokens", json!(-1), "invalid value"),
        ("logit_bias", json!({"no": 1}), "no token id"),
        ("max_tokens", json!(5000), "maximum context length is 4096 tokens"),
        ("logit_bias", json!({"320": 1}), "`logit_bias`"),
        ("logit_bias", json!({"7": 101}), "`logit_bias`"),
    ];
    for (name, value, cause) in both.iter().chain(&native) {
        field_refused(&router, &NATIVE, name, value, cause).await;
    }
    for (name, value, cause) in both.iter().chain(&openai) {
        field_refused(&router, &OPENAI, name, value, cause).await;
    }
    router.ok("/generate", &good("/generate")).await;
}

#[tokio::test]
async fn fields_that_are_not_supported() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let both = [("guided_jsom", json!({})), ("temprature", json!(0)), ("functions", json!([{"name": "f"}]))];
    let native = [("max_new_token", json!(5)), ("watermark", json!(true))];
    let openai = [
        ("suffix", json!("b")),
        ("modalities", json!(["audio"])),
        ("modalities", json!(["text", "audio"])),
        ("verbosity", json!({"a": 1})),
    ];
    for (name, value) in both.iter().chain(&native) {
        field_refused(&router, &NATIVE, name, value, &format!("`{name}` is not supported")).await;
    }
    for (name, value) in both.iter().chain(&openai) {
        field_refused(&router, &OPENAI, name, value, &format!("`{name}` is not supported")).await;
    }
    let options = json!({"continuous": true});
    field_refused(
        &router,
        &OPENAI,
        "stream_options",
        &options,
        "`stream_options.continuous` is not supported",
    )
    .await;
    let beside = json!({"inputs": "x", "max_new_tokens": 5});
    for path in NATIVE {
        let (status, answer) = router.post(path, &beside).await;
        assert_eq!(status, 422, "{path}");
        assert_native(&answer, "validation", "`max_new_tokens` is not supported");
    }
}

#[tokio::test]
async fn fields_that_ask_for_nothing_are_taken() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let parameters = json!({"best_of": 1, "watermark": false, "apply_chat_template": false, "merged_adapters": null,
        "response_format": null, "grammar": null, "stop": []});
    for path in ["/generate", "/"] {
        router.ok(path, &json!({"inputs": "x", "parameters": parameters, "stream": false})).await;
    }
    for (name, value) in [
        ("user", json!("somebody")),
        ("metadata", json!({"a": "b"})),
        ("store", json!(true)),
        ("service_tier", json!("auto")),
        ("safety_identifier", json!("x")),
        ("prompt_cache_key", json!("x")),
        ("parallel_tool_calls", json!(false)),
        ("modalities", json!(["text"])),
        ("prediction", json!({"type": "content", "content": "a"})),
        ("request_id", json!("x")),
        ("use_beam_search", json!(false)),
        ("priority", json!(0)),
        ("length_penalty", json!(1.0)),
        ("spaces_between_special_tokens", json!(false)),
        ("verbosity", json!("low")),
        ("prompt_cache_retention", json!("24h")),
        ("n", json!(1)),
        ("best_of", json!(1)),
        ("suffix", json!("")),
        ("tools", json!([])),
        ("tools", json!(null)),
        ("tool_choice", json!("auto")),
        ("tool_choice", json!("none")),
        ("response_format", json!({"type": "text"})),
        ("stream_options", json!({"include_obfuscation": false})),
        ("ignore_eos_token", json!(false)),
        ("whatever", json!(null)),
    ] {
        for path in OPENAI {
            router.ok(path, &with(path, name, &value)).await;
        }
    }
    // As OpenAI's clients give an answer back.
    let answer = json!({"role": "assistant", "content": "a", "refusal": null, "annotations": [], "audio": null,
        "function_call": null, "tool_calls": null});
    let user = json!({"role": "user", "content": "x", "name": "somebody"});
    router.ok("/v1/chat/completions", &json!({"messages": [user, answer, user]})).await;
}

#[tokio::test]
async fn prompts_that_cannot_be_run() {
    let limits = |config: &mut Config| config.router.max_total_tokens = Some(8);
    let router = Router::start_with(Script::saying(tokens("a")), limits).await;
    for (body, cause) in [
        (json!({"inputs": ""}), "cannot be empty"),
        (json!({"inputs": "a b c d e f g h"}), "at most 7 tokens"),
        (json!({"inputs": 7}), "invalid type"),
        (json!({}), "missing field `inputs`"),
    ] {
        for path in NATIVE {
            let (status, answer) = router.post(path, &body).await;
            assert_eq!(status, 422);
            assert_native(&answer, "validation", cause);
        }
    }
    let streamed = json!({"inputs": "x", "parameters": {"decoder_input_details": true}});
    let (status, answer) = router.post("/generate_stream", &streamed).await;
    assert_eq!(status, 422);
    assert_native(&answer, "validation", "not supported when streaming");
}

#[tokio::test]
async fn bodies_that_are_too_large() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    for path in NATIVE {
        let (status, answer) = router.post(path, &with(path, "stop", &json!(["x".repeat(100_000)]))).await;
        assert_eq!(status, 413);
        assert_native(&answer, "too_large", "larger than 65536 bytes");
    }
    for path in OPENAI {
        let (status, answer) = router.post(path, &with(path, "stop", &json!(["x".repeat(100_000)]))).await;
        assert_eq!(status, 413);
        assert_openai(&answer, "too_large", "larger than 65536 bytes");
    }
}

#[tokio::test]
async fn more_requests_than_allowed() {
    let one = |config: &mut Config| config.router.max_concurrent_requests = 1;
    let router = Router::start_with(Script::saying(tokens("a")), one).await;
    router.shard.hold(Gate::Steps);
    let first = router.begin("/generate_stream", &good("/generate"));
    router.holds(1).await;
    for path in NATIVE {
        let (status, answer) = router.post(path, &good(path)).await;
        assert_eq!(status, 429);
        assert_native(&answer, "overloaded", "overloaded");
    }
    for path in OPENAI {
        let (status, answer) = router.post(path, &good(path)).await;
        assert_eq!(status, 429);
        assert_openai(&answer, "overloaded", "overloaded");
        assert_eq!(answer["error"]["type"], "rate_limit_error");
    }
    assert_eq!(router.get("/info").await.status(), 200);
    router.shard.release(&Gate::Steps);
    assert!(first.await.unwrap().text().await.unwrap().contains("\"generated_text\":\"a\""));
    router.ok("/generate", &good("/generate")).await;
}

#[tokio::test]
async fn adapters_that_cannot_be_prepared() {
    let mut script = Script::saying(tokens("a"));
    script.unstageable = [
        ("broken", Status::invalid_argument("no broken")),
        ("huge", Status::resource_exhausted("no huge")),
        ("interrupted", Status::internal("no interrupted")),
        ("gone", Status::unavailable("no gone")),
    ]
    .into();
    let invalid = ((422, "validation"), (400, "adapter_invalid"));
    let unavailable = ((503, "unavailable"), (503, "unavailable"));
    let router = Router::start(script).await;
    for (id, words, (native, openai)) in [
        ("absent", "\"absent\" does not exist", ((404, "adapter_not_found"), (404, "model_not_found"))),
        ("secret", "\"secret\" is outside of", ((424, "generation"), (403, "adapter_forbidden"))),
        ("broken", "no broken", invalid),
        ("../broken", "\"../broken\" has a parent folder in it", invalid),
        ("huge", "no huge", unavailable),
        ("interrupted", "no interrupted", unavailable),
        ("gone", "no gone", unavailable),
    ] {
        for path in NATIVE {
            let (got, answer) = router.post(path, &with(path, "adapter_id", &json!(id))).await;
            assert_eq!(got, native.0, "{answer}");
            assert_native(&answer, native.1, words);
        }
        for path in OPENAI {
            let (got, answer) = router.post(path, &with(path, "model", &json!(id))).await;
            assert_eq!(got, openai.0, "{answer}");
            assert_openai(&answer, openai.1, words);
        }
    }
    assert_eq!(router.shard.saw(|seen| Some(seen.added().count())).await, 0);
    router.ok("/generate", &with("/generate", "adapter_id", &json!("good"))).await;
}

#[tokio::test]
async fn routes_that_do_not_exist() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let (status, answer) = router.post("/no-such", &json!({})).await;
    assert_eq!(status, 404);
    assert_native(&answer, "not_found", "no such route");
    let (status, answer) = router.post("/v1/no-such", &json!({})).await;
    assert_eq!(status, 404);
    assert_openai(&answer, "not_found", "no such route");
    let wrong = router.get("/generate").await;
    assert_eq!(wrong.status(), 405);
    assert_native(&wrong.json().await.unwrap(), "method_not_allowed", "GET");
    let wrong = router.get("/v1/completions").await;
    assert_eq!(wrong.status(), 405);
    assert_openai(&wrong.json().await.unwrap(), "method_not_allowed", "GET");
}

#[tokio::test]
async fn an_origin_that_is_none() {
    for text in [
        "http://here\n",
        "here",
        "here:8080",
        "http://",
        "http://here/",
        "http://here/page",
        "http://here?a",
        "http://user@here",
        "http://here http://there",
        "*.here",
        "/here",
        "",
    ] {
        let mut config = configuration("/no/such/socket".as_ref());
        config.router.cors_allow_origin = vec!["http://there".into(), text.into()];
        let error = App::start(config, &Supervisor::reporting_to(drop).unwrap()).err().unwrap();
        assert!(error.is_usage());
        assert_eq!(error.to_string(), format!("cors-allow-origin: {text:?} is not an origin"));
    }
}
