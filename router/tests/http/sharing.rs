//! Tenants, told apart by their keys, share the server and nothing that tells one about the other.

use std::fs;

use config::{Config, PrefixCacheScope};
use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    metrics::scrape,
    router::{PATIENCE, Router, tokens},
    shard::{Gate, Script},
};

/// A router with two tenants. The first has the keys "abc" and "abd", the second "xyz".
async fn start(script: Script, change: impl FnOnce(&mut Config)) -> Router {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.json");
    let keys = json!({"keys": [
        {"key": "abc", "tenant": "first"},
        {"key": "abd", "tenant": "first"},
        {"key": "xyz", "tenant": "second"},
    ]});
    fs::write(&file, keys.to_string()).unwrap();
    // The file is read before the router starts, and one that is gone later changes nothing.
    Router::start_with(script, |config| {
        config.router.api_key_file = Some(file);
        change(config);
    })
    .await
}

async fn ask(router: &Router, key: &str, body: &Value, token: Option<&str>) -> u16 {
    let key = format!("Bearer {key}");
    let mut headers = vec![("authorization", key.as_str())];
    headers.extend(token.map(|token| ("x-adapter-token", token)));
    let answer = timeout(PATIENCE, router.send_with(Method::POST, "/generate", &headers, body)).await;
    let response = answer.unwrap();
    let status = response.status().as_u16();
    response.text().await.unwrap();
    status
}

#[tokio::test]
async fn the_prefix_cache_is_shared_as_far_as_its_scope_says() {
    // Who asks, with which adapter and token, and whether the prompt is in the cache already.
    type Ask = (&'static str, Option<&'static str>, Option<&'static str>, bool);
    let by_tenant: &[Ask] = &[
        ("abc", None, None, false),
        ("abc", None, None, true),
        ("abd", None, None, true),
        ("xyz", None, None, false),
        ("xyz", None, None, true),
        ("abc", Some("sql"), None, false),
        ("xyz", Some("sql"), None, false),
        ("abd", Some("sql"), None, true),
        ("xyz", Some("sql"), None, true),
    ];
    let by_all: &[Ask] = &[
        ("abc", None, None, false),
        ("xyz", None, None, true),
        ("abc", Some("sql"), None, false),
        ("xyz", Some("sql"), None, true),
        // Whoever needs a token shares with others of the tenant.
        ("abc", Some("sql"), Some("token"), false),
        ("xyz", Some("sql"), Some("token"), false),
        ("abd", Some("sql"), Some("other"), true),
        ("xyz", Some("law"), None, false),
    ];
    for (scope, asks) in [(PrefixCacheScope::Tenant, by_tenant), (PrefixCacheScope::All, by_all)] {
        let change = |config: &mut Config| {
            config.router.prefix_caching = true;
            config.router.prefix_cache_scope = scope;
        };
        let router = start(Script::saying(tokens("a")), change).await;
        let mut known = 0.0;
        for (index, (key, adapter, token, cached)) in asks.iter().enumerate() {
            let body = json!({"inputs": "x".repeat(40), "parameters": {"adapter_id": adapter}});
            assert_eq!(ask(&router, key, &body, *token).await, 200);
            let count = scrape(&router).await["lorax_cached_prompt_tokens_total"];
            assert_eq!(count > known, *cached, "{scope:?}, request {index}: {count} after {known}");
            known = count;
        }
    }
}

#[tokio::test]
async fn one_tenant_that_fills_the_queue_does_not_delay_another() {
    let mut script = Script::saying(tokens("a").repeat(20));
    script.info.max_sequences = 2;
    let router = start(script, |config| config.router.max_concurrent_requests = 100).await;
    router.shard.hold(Gate::Steps);
    let many: Vec<Value> = (0..60).map(|i| json!({"inputs": format!("{i}")})).collect();
    let crowd = join_all(many.iter().map(|body| ask(&router, "abc", body, None)));
    let newcomer = async {
        let mut held = router.app.permits_held();
        timeout(PATIENCE, held.wait_for(|held| *held == 60)).await.unwrap().unwrap();
        let body = json!({"inputs": "newcomer"});
        let comes = ask(&router, "xyz", &body, None);
        let release = async {
            timeout(PATIENCE, held.clone().wait_for(|held| *held == 61)).await.unwrap().unwrap();
            let begun = router.shard.saw(|seen| Some(seen.added().count())).await;
            router.shard.release(&Gate::Steps);
            begun
        };
        tokio::join!(comes, release)
    };
    let (statuses, (status, begun)) = tokio::join!(crowd, newcomer);
    assert_eq!((status, statuses), (200, vec![200; 60]));
    let newcomer = tokens("newcomer");
    let place = router.shard.saw(|seen| seen.added().position(|new| new.tokens == newcomer)).await;
    // It is the next to be admitted, or the one after if its handler was slower than the first free seat.
    assert!(place <= begun + 2, "{place} were admitted before it, {begun} of them before it came");
}
