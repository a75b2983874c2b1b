//! Names of requests.

use std::collections::HashSet;

use config::RouterConfig;
use reqwest::Method;
use serde_json::json;

use crate::{
    process::Program,
    router::{Router, tokens},
    shard::Script,
};

#[tokio::test]
async fn a_sane_id_is_kept_and_any_other_replaced() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let long = "x".repeat(128);
    for id in ["a", "0f8fad5b-d9cb-469f-a165-70867728950e", "~!@#$%^&*(){}[]|:;'<>,.?/", &long] {
        let answer = router
            .send_with(Method::POST, "/generate", &[("x-request-id", id)], &json!({"inputs": "x"}))
            .await;
        assert_eq!(answer.headers()["x-request-id"], id);
    }
    let longer = "x".repeat(129);
    let mut made = HashSet::new();
    for ids in [
        vec![],
        vec![("x-request-id", "")],
        vec![("x-request-id", "two words")],
        vec![("x-request-id", "a\tb")],
        vec![("x-request-id", "ä")],
        vec![("x-request-id", &longer)],
        vec![("x-request-id", "one"), ("x-request-id", "two")],
    ] {
        let answer = router.send_with(Method::POST, "/generate", &ids, &json!({"inputs": "x"})).await;
        let id = answer.headers()["x-request-id"].to_str().unwrap().to_owned();
        assert_eq!(id.len(), 36, "{ids:?}: {id}");
        assert!(made.insert(id), "{ids:?}: no two requests have the same");
    }
}

#[tokio::test]
async fn every_response_has_one() {
    let script = Script::saying(tokens("a"));
    let router = Router::start_with(script, |config| {
        config.router.api_keys = vec!["sk".into()];
        config.router.cors_allow_origin = vec!["*".into()];
    })
    .await;
    let key = ("authorization", "Bearer sk");
    for (method, path, headers, status) in [
        (Method::GET, "/health", vec![], 200),
        (Method::GET, "/info", vec![key], 200),
        (Method::GET, "/info", vec![], 401),
        (Method::POST, "/generate", vec![key], 422),
        (Method::POST, "/v1/completions", vec![key], 400),
        (Method::POST, "/v1/completions", vec![], 401),
        (Method::POST, "/generate_stream", vec![key], 422),
        (Method::GET, "/generate", vec![key], 405),
        (Method::GET, "/no/such/route", vec![key], 404),
        (
            Method::OPTIONS,
            "/generate",
            vec![("origin", "http://a"), ("access-control-request-method", "POST")],
            200,
        ),
    ] {
        let headers: Vec<_> = headers.into_iter().chain([("x-request-id", "mine")]).collect();
        let answer = router.send_with(method, path, &headers, &json!({})).await;
        assert_eq!(answer.status(), status, "{path}");
        assert_eq!(answer.headers()["x-request-id"], "mine", "{path}");
    }
}

#[tokio::test]
async fn log_lines_of_a_request_name_it_and_its_tenant() {
    let change = |router: &mut RouterConfig| router.api_keys = vec!["sk-secret".into()];
    let mut program = Program::start_logging(Script::saying(tokens("a")), change, "debug");
    let line = program.says("listening on ").await;
    let client = reqwest::Client::new();
    let request = client.post(format!("http://{line}/generate")).json(&json!({"inputs": "x"}));
    let answer = request.bearer_auth("sk-secret").header("x-request-id", "the-id").send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let rest = program.says("id=\"the-id\"").await;
    let rest = if rest.contains("tenant") { rest } else { program.says("id=\"the-id\"").await };
    assert!(rest.contains("tenant=\"api-key-1\"") && !rest.contains("sk-secret"), "{rest}");
}
