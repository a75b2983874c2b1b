//! Fields of the wrong type: errors name the field, down to the element, and never speak of Rust or of columns.

use config::Config;
use serde_json::{Value, json};
use tonic::Status;

use crate::{
    refusals::{assert_native, assert_openai},
    router::{Router, tokens},
    shard::Script,
};

#[tokio::test]
async fn prompts_of_the_wrong_type_or_length() {
    let limits = |config: &mut Config| config.router.max_total_tokens = Some(8);
    let router = Router::start_with(Script::saying(tokens("a")), limits).await;
    for (prompt, code, param, cause) in [
        (json!(""), "invalid_value", "prompt", "cannot be empty"),
        (json!([]), "invalid_value", "prompt", "cannot be empty"),
        (json!([[]]), "invalid_value", "prompt", "cannot be empty"),
        (json!(["a", ""]), "invalid_value", "prompt", "cannot be empty"),
        (json!([320]), "invalid_value", "prompt", "less than 320"),
        (json!([-1]), "invalid_type", "prompt[0]", "integer `-1`, expected a string, a token id, or a list"),
        (json!([5, -1]), "invalid_type", "prompt[1]", "integer `-1`, expected an integer from 0"),
        (json!([5, 4294967296_u64]), "invalid_type", "prompt[1]", "expected an integer from 0 to 4294967295"),
        (json!([5, "a"]), "invalid_type", "prompt[1]", "string \"a\", expected an integer"),
        (json!(["a", 5]), "invalid_type", "prompt[1]", "integer `5`, expected a string"),
        (json!([[5], [5, 1.5]]), "invalid_type", "prompt[1][1]", "floating point `1.5`"),
        (json!([[5], 5]), "invalid_type", "prompt[1]", "integer `5`, expected a list"),
        (json!(null), "invalid_type", "prompt", "null, expected a string, a list of strings"),
        (json!(7), "invalid_type", "prompt", "integer `7`, expected a string, a list of strings"),
        (json!({"text": "a"}), "invalid_type", "prompt", "object, expected a string, a list of strings"),
        (json!(vec!["a"; 129]), "invalid_value", "prompt", "1 to 128"),
        (json!(vec![5; 8]), "context_length_exceeded", "prompt", "at most 7 tokens"),
        (json!(vec![5; 8]), "context_length_exceeded", "prompt", "maximum context length is 8 tokens"),
    ] {
        let (status, answer) =
            router.post("/v1/completions", &json!({"prompt": prompt, "max_tokens": 1})).await;
        assert_eq!(status, 400, "{answer}");
        assert_openai(&answer, code, cause);
        assert_eq!(answer["error"]["param"], param, "{answer}");
    }
}

#[tokio::test]
async fn messages_that_make_no_chat() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let user = json!({"role": "user", "content": "x"});
    for (messages, code, param, cause) in [bad_messages(&user), unserved_messages()].concat() {
        let (status, answer) = router.post("/v1/chat/completions", &json!({"messages": messages})).await;
        assert_eq!(status, 400, "{answer}");
        assert_openai(&answer, code, cause);
        assert_eq!(answer["error"]["param"], param, "{answer}");
    }
    let none = json!({"messages": [user], "max_tokens": 0});
    let (status, answer) = router.post("/v1/chat/completions", &none).await;
    assert_eq!(status, 400, "{answer}");
    assert_openai(&answer, "invalid_value", "`max_tokens` must be strictly positive");
}

/// Messages, and the code, the parameter and the words with which they are refused.
fn bad_messages(user: &Value) -> Vec<(Value, &'static str, &'static str, &'static str)> {
    vec![
        (json!([]), "invalid_value", "messages", "cannot be empty"),
        (json!("x"), "invalid_type", "messages", "string \"x\", expected a list"),
        (json!([{"content": "x"}]), "missing_required_parameter", "messages[0].role", "missing field"),
        (json!([{"role": "user"}]), "missing_required_parameter", "messages[0].content", "missing field"),
        (
            json!([user, {"role": "user", "content": null}]),
            "missing_required_parameter",
            "messages[1].content",
            "missing",
        ),
        (
            json!([{"role": "developer"}, user]),
            "missing_required_parameter",
            "messages[0].content",
            "missing",
        ),
        (json!([{"role": "system"}, user]), "missing_required_parameter", "messages[0].content", "missing"),
        (
            json!([user, user, user, {"role": "user", "content": 7}]),
            "invalid_type",
            "messages[3].content",
            "integer `7`",
        ),
        (json!([user, 5]), "invalid_type", "messages[1]", "integer `5`, expected an object"),
        (
            json!([{"role": 5, "content": "x"}]),
            "invalid_type",
            "messages[0].role",
            "integer `5`, expected a string",
        ),
    ]
}

/// The same for fields that only the server itself knows to be wrong.
fn unserved_messages() -> Vec<(Value, &'static str, &'static str, &'static str)> {
    vec![
        (
            json!([{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]),
            "invalid_value",
            "messages[0].content[1].type",
            "\"image_url\" is not supported",
        ),
        (
            json!([{"role": "user", "content": [{"type": "text"}]}]),
            "missing_required_parameter",
            "messages[0].content[0].text",
            "missing field",
        ),
        (
            json!([{"role": "user", "content": [{"text": "x"}]}]),
            "missing_required_parameter",
            "messages[0].content[0].type",
            "missing field",
        ),
        (
            json!([{"role": "assistant", "tool_calls": [{"id": "a"}]}]),
            "missing_required_parameter",
            "messages[0].tool_calls[0].function",
            "missing field",
        ),
        (
            json!([{"role": "user", "content": "x", "tool_call_id": "a"}]),
            "invalid_value",
            "messages[0].tool_call_id",
            "`tool`",
        ),
        (json!([{"role": "function", "content": "x"}]), "invalid_value", "messages[0].role", "\"function\""),
    ]
}

#[tokio::test]
async fn types_are_told_in_words() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    for (parameters, message) in [
        (json!({"temperature": "hot"}), "`temperature`: invalid type: string \"hot\", expected a number"),
        (
            json!({"top_k": -1}),
            "`top_k`: invalid value: integer `-1`, expected an integer from 0 to 4294967295",
        ),
        (
            json!({"top_k": 1.5}),
            "`top_k`: invalid type: floating point `1.5`, expected an integer from 0 to 4294967295",
        ),
        (json!({"details": 7}), "`details`: invalid type: integer `7`, expected a boolean"),
        (json!({"stop": "x"}), "`stop`: invalid type: string \"x\", expected a list"),
        (json!({"stop": ["x", 5]}), "`stop[1]`: invalid type: integer `5`, expected a string"),
        (json!({"adapter_id": {"a": 1}}), "`adapter_id`: invalid type: object, expected a string"),
        (
            json!({"seed": -1}),
            "`seed`: invalid value: integer `-1`, expected an integer from 0 to 18446744073709551615",
        ),
        (json!({"truncate": []}), "`truncate`: invalid type: list, expected a non-negative integer"),
        (json!("x"), "`parameters`: invalid type: string \"x\", expected an object"),
        (json!([]), "`parameters`: invalid type: list, expected an object"),
    ] {
        let (status, answer) =
            router.post("/generate", &json!({"inputs": "x", "parameters": parameters})).await;
        assert_eq!(status, 422, "{answer}");
        assert_native(&answer, "validation", message);
    }
    for (body, message) in [
        (json!([]), "the body: invalid type: list, expected an object"),
        (json!("x"), "the body: invalid type: string \"x\", expected an object"),
        (
            json!({"prompt": "x", "stop": 5}),
            "`stop`: invalid type: integer `5`, expected a string or a list of strings",
        ),
        (json!({"prompt": "x", "stop": ["a", null]}), "`stop[1]`: invalid type: null, expected a string"),
        (
            json!({"prompt": "x", "logit_bias": {"7": "a"}}),
            "`logit_bias.7`: invalid type: string \"a\", expected a number",
        ),
        (json!({"prompt": "x", "logit_bias": [7]}), "`logit_bias`: invalid type: list, expected an object"),
        (
            json!({"prompt": "x", "stream_options": {"include_usage": "a"}}),
            "`stream_options.include_usage`: invalid type",
        ),
        (
            json!({"prompt": "x", "logprobs": true}),
            "`logprobs`: invalid type: boolean `true`, expected an integer from 0",
        ),
        (json!({"model": 5, "prompt": "x"}), "`model`: invalid type: integer `5`, expected a string"),
        (json!({"model": "x"}), "missing field `prompt`"),
    ] {
        let (status, answer) = router.post("/v1/completions", &body).await;
        assert_eq!(status, 400, "{answer}");
        let code = if message.starts_with("missing") { "missing_required_parameter" } else { "invalid_type" };
        assert_openai(&answer, code, message);
    }
}

#[tokio::test]
async fn adapters_that_cannot_be_served_are_told_by_the_field_that_names_them() {
    let refused = [
        ("nowhere", "model_not_found"),
        ("secret", "adapter_forbidden"),
        ("broken", "adapter_invalid"),
        ("../law", "adapter_invalid"),
    ];
    let broken = ("broken", Status::invalid_argument("it is broken"));
    let script = Script { unstageable: [broken].into(), ..Script::saying(tokens("a")) };
    let router = Router::start(script).await;
    let bodies = [
        ("/v1/completions", json!({"prompt": "x"})),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}]})),
    ];
    for (path, body) in bodies {
        let asked = async |names: &[(&str, &str)], code: &str, param: &str| {
            let mut body = body.clone();
            names.iter().for_each(|(field, value)| body[field] = json!(value));
            let (_, answer) = router.post(path, &body).await;
            assert_openai(&answer, code, "");
            assert_eq!(answer["error"]["param"], param, "{answer}");
        };
        for (id, code) in &refused {
            asked(&[("model", id)], code, "model").await;
            asked(&[("adapter_id", id)], code, "adapter_id").await;
            asked(&[("model", "good"), ("adapter_id", id)], code, "adapter_id").await;
        }
        for field in ["model", "adapter_id"] {
            asked(&[(field, "law"), ("adapter_source", "ftp")], "adapter_invalid", "adapter_source").await;
        }
    }
}

#[tokio::test]
async fn fields_that_are_given_twice() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let native = [
        (r#"{"inputs": "a", "inputs": "b"}"#, "inputs"),
        (r#"{"inputs": "a", "stream": true, "stream": null}"#, "stream"),
        (r#"{"inputs": "a", "parameters": {}, "parameters": {"seed": 1}}"#, "parameters"),
        (r#"{"inputs": "a", "parameters": {"seed": 1, "seed": 1}}"#, "seed"),
        (r#"{"inputs": "a", "parameters": {"top_p": 0.5, "stop": [], "top_p": 0.5}}"#, "top_p"),
    ];
    for (body, field) in native {
        let (status, answer) = router.post_bytes("/generate", body.into()).await;
        assert_eq!(status, 422, "{answer}");
        assert_native(&answer, "validation", &format!("`{field}` is given twice"));
    }
    let openai = [
        ("/v1/completions", r#"{"prompt": "a", "prompt": "a"}"#, "prompt"),
        ("/v1/completions", r#"{"prompt": "a", "seed": 1, "seed": 2}"#, "seed"),
        ("/v1/completions", r#"{"prompt": "a", "ignore_eos": true, "ignore_eos_token": true}"#, "ignore_eos"),
        ("/v1/completions", r#"{"prompt": "a", "temperature": 1, "temperature": null}"#, "temperature"),
        (
            "/v1/completions",
            r#"{"prompt": "a", "stream_options": {"include_usage": true, "include_usage": true}}"#,
            "stream_options.include_usage",
        ),
        ("/v1/chat/completions", r#"{"messages": [], "messages": []}"#, "messages"),
        (
            "/v1/chat/completions",
            r#"{"messages": [{"role": "user", "content": "x"}, {"role": "user", "role": "user"}]}"#,
            "messages[1].role",
        ),
    ];
    for (path, body, field) in openai {
        let (status, answer) = router.post_bytes(path, body.into()).await;
        assert_eq!(status, 400, "{answer}");
        assert_openai(&answer, "invalid_value", &format!("`{field}` is given twice"));
        assert_eq!(answer["error"]["param"], field, "{answer}");
    }
}
