//! `cache_salt`: requests share the prefix cache with those of the same salt only.

use config::{Config, PrefixCacheScope};
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    metrics::scrape,
    refusals::{assert_native, assert_openai},
    router::{Router, tokens},
    shard::Script,
};

const ROUTES: [&str; 3] = ["/generate", "/v1/completions", "/v1/chat/completions"];

/// A body with a prompt of several blocks.
fn body(route: &str, salt: &Value) -> Value {
    let text = "x".repeat(40);
    match route {
        "/generate" => json!({"inputs": text, "parameters": {"cache_salt": salt}}),
        "/v1/completions" => json!({"prompt": text, "cache_salt": salt}),
        _ => json!({"messages": [{"role": "user", "content": text}], "cache_salt": salt}),
    }
}

/// A router with the keys "abc" and "xyz", of a tenant each.
async fn router(scope: PrefixCacheScope) -> Router {
    let change = |config: &mut Config| {
        config.router.api_keys = vec!["abc".into(), "xyz".into()];
        config.router.prefix_caching = true;
        config.router.prefix_cache_scope = scope;
    };
    Router::start_with(Script::saying(tokens("a")), change).await
}

#[tokio::test]
async fn the_prefix_cache_is_shared_by_requests_of_the_same_salt() {
    // Who asks, with which salt, and whether the prompt is in the cache already by the two scopes.
    let asks = [
        ("abc", json!(null), [false, false]),
        ("abc", json!("s"), [false, false]),
        ("abc", json!("s"), [true, true]),
        ("abc", json!("S"), [false, false]),
        ("abc", json!("s "), [false, false]),
        ("abc", json!("\u{0}"), [false, false]),
        ("abc", json!("long ".repeat(1000)), [false, false]),
        ("abc", json!("long ".repeat(1000)), [true, true]),
        ("abc", json!(null), [true, true]),
        ("xyz", json!("s"), [false, true]),
        ("xyz", json!("s"), [true, true]),
        ("xyz", json!(null), [false, true]),
        ("xyz", json!("t"), [false, false]),
        ("abc", json!("t"), [false, true]),
    ];
    for (index, scope) in [PrefixCacheScope::Tenant, PrefixCacheScope::All].into_iter().enumerate() {
        for route in ROUTES {
            let router = router(scope).await;
            let mut known = 0.0;
            for (number, (key, salt, cached)) in asks.iter().enumerate() {
                let key = format!("Bearer {key}");
                let headers = [("authorization", key.as_str())];
                let response = router.send_with(Method::POST, route, &headers, &body(route, salt)).await;
                assert_eq!(response.status(), 200, "{route} {salt}");
                let answer: Value = response.json().await.unwrap();
                let count = scrape(&router).await["lorax_cached_prompt_tokens_total"];
                assert_eq!(count > known, cached[index], "{scope:?} {route}, request {number}");
                if route != "/generate" {
                    let told = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
                    assert_eq!(told.as_f64(), Some(count - known), "{scope:?} {route}, request {number}");
                }
                known = count;
            }
        }
    }
}

#[tokio::test]
async fn a_salt_is_a_string_that_is_not_empty() {
    let router = router(PrefixCacheScope::Tenant).await;
    for route in ROUTES {
        for (salt, code, problem) in [
            (json!(7), "invalid_type", "`cache_salt`: invalid type: integer `7`, expected a string"),
            (
                json!(1.5),
                "invalid_type",
                "`cache_salt`: invalid type: floating point `1.5`, expected a string",
            ),
            (json!(true), "invalid_type", "`cache_salt`: invalid type: boolean `true`, expected a string"),
            (json!([]), "invalid_type", "`cache_salt`: invalid type: list, expected a string"),
            (json!(["s"]), "invalid_type", "`cache_salt`: invalid type: list, expected a string"),
            (json!({"s": 1}), "invalid_type", "`cache_salt`: invalid type: object, expected a string"),
            (json!(""), "invalid_value", "`cache_salt` cannot be empty"),
        ] {
            let headers = [("authorization", "Bearer abc")];
            let response = router.send_with(Method::POST, route, &headers, &body(route, &salt)).await;
            let status = response.status().as_u16();
            let answer: Value = response.json().await.unwrap();
            if route == "/generate" {
                assert_eq!(status, 422, "{answer}");
                assert_native(&answer, "validation", problem);
            } else {
                assert_eq!((status, &answer["error"]["param"]), (400, &json!("cache_salt")), "{answer}");
                assert_openai(&answer, code, problem);
            }
        }
    }
}
