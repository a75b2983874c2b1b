//! API keys, and the credentials of adapters.

use std::{fs, time::Duration};

use config::RouterConfig;
use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::time::timeout;

use crate::{
    process::Program,
    router::{Router, tokens},
    shard::Script,
};

/// Deadline of a wait; everything here takes milliseconds.
const LONG: Duration = Duration::from_secs(30);

async fn guarded() -> Router {
    let keys = ["sk-first", "sk-second"];
    let script = Script::saying(tokens("a"));
    Router::start_with(script, |config| config.router.api_keys = keys.map(Into::into).into()).await
}

fn generate(parameters: Value) -> Value {
    json!({"inputs": "x", "parameters": parameters})
}

async fn status(router: &Router, headers: &[(&str, &str)]) -> u16 {
    let body = generate(json!({"max_new_tokens": 1}));
    timeout(LONG, router.send_with(Method::POST, "/generate", headers, &body))
        .await
        .unwrap()
        .status()
        .as_u16()
}

#[tokio::test]
async fn with_keys_only_who_has_one_is_let_in() {
    let router = guarded().await;
    for header in
        ["Bearer sk-first", "Bearer sk-second", "bearer sk-first", "BEARER   sk-second", "Bearer sk-first "]
    {
        assert_eq!(status(&router, &[("authorization", header)]).await, 200, "{header:?}");
    }
    for header in [
        "",
        "sk-first",
        "Bearer",
        "Bearer ",
        "Bearer sk-firs",
        "Bearer sk-firstt",
        "Bearer SK-FIRST",
        "Basic sk-first",
        "Bearersk-first",
        "Bearer sk-first,sk-second",
        "Token Bearer sk-first",
    ] {
        assert_eq!(status(&router, &[("authorization", header)]).await, 401, "{header:?}");
    }
    assert_eq!(status(&router, &[]).await, 401);
    assert_eq!(status(&router, &[("x-api-key", "sk-first")]).await, 401);
}

#[tokio::test]
async fn who_is_not_let_in_is_told_so_in_the_dialect_of_the_route() {
    let router = guarded().await;
    let message = "the request has no valid API key: send one as `Authorization: Bearer KEY`";
    for (method, path, openai) in [
        (Method::POST, "/", false),
        (Method::POST, "/generate", false),
        (Method::POST, "/generate_stream", false),
        (Method::GET, "/info", false),
        (Method::GET, "/metrics", false),
        (Method::GET, "/no/such/route", false),
        (Method::GET, "/v1/models", true),
        (Method::GET, "/v1/models/the/base-model", true),
        (Method::POST, "/v1/completions", true),
        (Method::POST, "/v1/chat/completions", true),
        (Method::DELETE, "/v1/no/such/route", true),
    ] {
        let answer = router.send_with(method, path, &[], &json!({})).await;
        assert_eq!(answer.status(), 401, "{path}");
        assert_eq!(answer.headers()["www-authenticate"], "Bearer", "{path}");
        let body: Value = answer.json().await.unwrap();
        let expected = if openai {
            json!({"error": {"message": message, "type": "invalid_request_error", "param": null,
                "code": "invalid_api_key"}})
        } else {
            json!({"error": message, "error_type": "invalid_api_key"})
        };
        assert_eq!(body, expected, "{path}");
    }
    for path in ["/health", "/"] {
        assert_eq!(router.get(path).await.status(), 200, "{path}");
    }
}

#[tokio::test]
async fn a_key_file_names_tenants_and_is_read_again_when_it_changes() {
    let folder = tempfile::tempdir().unwrap();
    let hash: String = Sha256::digest("hashed").iter().map(|byte| format!("{byte:02x}")).collect();
    let json = json!({"keys": [
        {"key": "plain", "tenant": "search", "weight": 3, "limits": {"max_concurrent_requests": 9}},
        {"sha256": hash, "tenant": "mail"},
    ]});
    let toml = format!("[[keys]]\nkey = 'plain'\ntenant = 'a'\n[[keys]]\nsha256 = '{hash}'\ntenant = 'a'\n");
    for (name, text) in [("keys.json", json.to_string()), ("keys.toml", toml)] {
        let file = folder.path().join(name);
        fs::write(&file, text).unwrap();
        let change = |router: &mut RouterConfig| router.api_key_file = Some(file.clone());
        let mut program = Program::start(Script::saying(tokens("a")), change);
        let line = program.says("waiting for the model; ").await;
        let address = line.split(' ').next().unwrap().to_owned();
        program.says("listening on ").await;
        assert_eq!(program.says("api-key-file: ").await, "2 keys are valid now");
        // In one step: a file that is half written says something else.
        let write = |text: &str| {
            let whole = folder.path().join("whole");
            fs::write(&whole, text).unwrap();
            fs::rename(whole, &file).unwrap();
        };
        let client = reqwest::Client::new();
        let status = async |key: &str| {
            let request = client.get(format!("http://{address}/info")).bearer_auth(key);
            request.send().await.unwrap().status().as_u16()
        };
        assert_eq!((status("plain").await, status("hashed").await, status(&hash).await), (200, 200, 401));
        for bad in [
            "",
            "{}",
            "[[keys]]\nkey = 3",
            r#"{"keys": [{"key": "secret", "tenant": ""}]}"#,
            r#"{"keys": []}"#,
        ] {
            write(bad);
            let line = timeout(LONG, program.says("api-key-file: ")).await.unwrap();
            assert!(line.contains("is not used") && !line.contains("secret"), "{line}");
        }
        assert_eq!(status("plain").await, 200, "what was valid stays so");
        let new = match name {
            "keys.json" => r#"{"keys": [{"key": "new", "tenant": "search"}]}"#,
            _ => "[[keys]]\nkey = 'new'\ntenant = 'search'",
        };
        write(new);
        let line = timeout(LONG, program.says("api-key-file: ")).await.unwrap();
        assert_eq!(line, "1 keys are valid now");
        assert_eq!((status("new").await, status("plain").await), (200, 401));
    }
}

#[tokio::test]
async fn a_key_file_that_cannot_be_used_is_bad_usage() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.json");
    for (text, cause) in [
        (None, "No such file"),
        (Some("secret"), "line 1, column 1: not a list of keys"),
        (Some(r#"{"keys": [{"key": "secret"}]}"#), "not a list of keys"),
        (Some(r#"{"keys": [{"key": "secret", "tenant": "a", "wait": 1}]}"#), "not a list of keys"),
        (Some(r#"{"keys": [{"tenant": "a"}]}"#), "key 1 needs one of `key` and `sha256`"),
        (Some(r#"{"keys": [{"key": "", "tenant": "a"}]}"#), "key 1 is empty"),
        (Some(r#"{"keys": [{"sha256": "secret", "tenant": "a"}]}"#), "must have 64 hexadecimal digits"),
        (Some(r#"{"keys": [{"key": "secret", "tenant": "a", "weight": 0}]}"#), "`weight` must be at least 1"),
        (
            Some(r#"{"keys": [{"key": "secret", "tenant": "a"}, {"key": "secret", "tenant": "b"}]}"#),
            "key 2 is key 1 again",
        ),
        (
            Some(r#"{"keys": [{"key": "secret", "tenant": "a"}, {"key": "b", "tenant": "a", "weight": 2}]}"#),
            "different weights or limits",
        ),
        (Some(r#"{"keys": []}"#), "no keys"),
    ] {
        match text {
            Some(text) => fs::write(&file, text).unwrap(),
            None => assert!(!file.exists()),
        }
        let change = |router: &mut RouterConfig| router.api_key_file = Some(file.clone());
        let mut program = Program::start(Script::saying(tokens("a")), change);
        let line = program.says("error: ").await;
        assert!(line.contains(cause) && !line.contains("secret"), "{cause}: {line}");
        assert_eq!(program.ended().await, Some(64), "{cause}");
    }
}
