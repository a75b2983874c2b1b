//! Managing adapters over HTTP: what is registered, listed, pinned, kept and removed, and who may do so.

mod controllers;
mod flags;
mod kept;

use std::time::Duration;

use config::Config;
use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    router::{MODEL, Router, content, poll, tokens},
    shard::{Gate, Script},
};

/// A router whose host memory takes `held` adapters.
async fn router(held: u64, change: impl FnOnce(&mut Config)) -> Router {
    let mut script = Script::saying(tokens("a").repeat(500));
    (script.adapter_bytes, script.host_bytes) = (1000, 1000);
    Router::start_with(script, |config| {
        config.shard.adapter_host_memory = held * 1100;
        config.router.max_adapter_size = Some(1100);
        change(config);
    })
    .await
}

fn ask(adapter: &str) -> Value {
    json!({"inputs": "x", "parameters": {"adapter_id": adapter, "max_new_tokens": 2}})
}

async fn json_of(router: &Router, method: Method, path: &str) -> (u16, Value) {
    let response = router.send_with(method, path, &[], &Value::Null).await;
    (response.status().as_u16(), response.json().await.unwrap())
}

async fn get(router: &Router, path: &str) -> Value {
    let (status, body) = json_of(router, Method::GET, path).await;
    assert_eq!(status, 200, "{path}: {body}");
    body
}

async fn delete(router: &Router, path: &str) -> (u16, Value) {
    json_of(router, Method::DELETE, path).await
}

/// Ids of the registered adapters.
async fn registered(router: &Router) -> Vec<String> {
    let list = get(router, "/v1/adapters").await;
    let all = list["data"].as_array().unwrap().iter().filter(|adapter| adapter["registered"] == true);
    all.map(|adapter| adapter["id"].as_str().unwrap().to_owned()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn one_that_is_registered_is_listed_used_by_its_name_and_removed() {
    let router = router(8, |_| {}).await;
    let body = json!({"id": "assistant", "adapter_id": "sql"});
    let made = router.ok("/v1/adapters", &body).await;
    for (field, value) in [
        ("id", json!("assistant")),
        ("object", json!("adapter")),
        ("adapter_id", json!("sql")),
        ("adapter_source", json!("local")),
        ("registered", json!(true)),
        ("content", json!(hex(&content("sql")))),
        ("tier", json!("host")),
        ("lora_rank", json!(8)),
        ("pinned", json!(false)),
        ("requests", json!(0)),
        ("tokens", json!(0)),
        ("last_error", json!(null)),
    ] {
        assert_eq!(made[field], value, "{field}: {made}");
    }
    assert!(made["bytes"]["files"].as_u64().unwrap() > 1000, "{made}");
    assert_eq!((&made["bytes"]["host"], &made["bytes"]["slot"]), (&json!(1000), &json!(1000)), "{made}");
    assert!(made["load_seconds"]["stage"].as_f64().unwrap() > 0.0, "{made}");
    for (path, body) in [
        ("/generate", ask("assistant")),
        ("/v1/completions", json!({"model": "assistant", "prompt": "x", "max_tokens": 2})),
        ("/v1/completions", json!({"model": format!("{MODEL}|assistant"), "prompt": "x", "max_tokens": 2})),
        ("/v1/completions", json!({"adapter_id": "assistant", "prompt": "x", "max_tokens": 2})),
        ("/generate", ask("sql")),
    ] {
        router.ok(path, &body).await;
    }
    assert_eq!(router.shard.saw(|seen| Some(seen.staged.len())).await, 1, "they are one content");
    let shown = get(&router, "/v1/adapters/assistant").await;
    assert_eq!(
        (&shown["requests"], &shown["tokens"], &shown["tier"]),
        (&json!(5), &json!(10), &json!("device"))
    );
    assert_eq!(get(&router, "/v1/adapters").await, json!({"object": "list", "data": [shown]}));
    let models = get(&router, "/v1/models").await;
    let model = &models["data"][1];
    assert_eq!(
        (&model["id"], &model["root"], &model["parent"]),
        (&json!("assistant"), &json!("sql"), &json!(MODEL))
    );
    let (status, gone) = delete(&router, "/v1/adapters/assistant").await;
    let expected = json!({"id": "assistant", "object": "adapter.deleted", "deleted": true, "unloaded": true, "running": 0});
    assert_eq!((status, gone), (200, expected));
    router.shard.saw(|seen| (!seen.unstaged.is_empty()).then_some(())).await;
    assert_eq!(get(&router, "/v1/models").await["data"].as_array().unwrap().len(), 1);
    let (status, _) = router.post("/generate", &ask("assistant")).await;
    assert_eq!(status, 404);
    for (method, path) in
        [(Method::GET, "/v1/adapters/assistant"), (Method::DELETE, "/v1/adapters/assistant")]
    {
        let (status, body) = json_of(&router, method, path).await;
        assert_eq!((status, &body["error"]["code"]), (404, &json!("adapter_not_registered")), "{body}");
    }
    // What nobody has registered may still be named.
    router.ok("/generate", &ask("sql")).await;
    assert_eq!(*router.failures.lock().unwrap(), []);
}

#[tokio::test]
async fn names_may_have_slashes_and_any_letters() {
    let router = router(8, |_| {}).await;
    for (name, path) in [
        ("org/sql", "org/sql"),
        ("org/sql", "org%2Fsql"),
        ("ünïcödé", "%C3%BCn%C3%AFc%C3%B6d%C3%A9"),
        ("with space", "with%20space"),
        ("a@b", "a@b"),
        ("100%", "100%25"),
        ("sql", "sql"),
        ("capacities", "capacities"),
        ("x?y", "x%3Fy"),
    ] {
        router.ok("/v1/adapters", &json!({"id": name, "adapter_id": "sql"})).await;
        assert_eq!(get(&router, &format!("/v1/adapters/{path}")).await["id"], name);
        router.ok("/v1/completions", &json!({"model": name, "prompt": "x", "max_tokens": 1})).await;
        let (status, body) = delete(&router, &format!("/v1/adapters/{path}")).await;
        assert_eq!((status, &body["id"]), (200, &json!(name)));
    }
}

#[tokio::test]
async fn registrations_that_make_no_sense_are_refused_and_change_nothing() {
    let router = router(8, |config| config.router.prepare_timeout = Duration::from_millis(300)).await;
    router.ok("/v1/adapters", &json!({"id": "taken", "adapter_id": "sql"})).await;
    router.shard.hold(Gate::Stage("cold".into()));
    let long = "x".repeat(257);
    for (body, status, code) in [
        (json!({}), 400, "missing_required_parameter"),
        (json!([]), 400, "invalid_type"),
        (json!({"adapter_id": 1}), 400, "invalid_type"),
        (json!({"adapter_id": "sql", "pin": "yes"}), 400, "invalid_type"),
        (json!({"adapter_id": "sql", "lora_path": "x"}), 400, "invalid_type"),
        (json!({"adapter_id": ""}), 400, "adapter_invalid"),
        (json!({"adapter_id": "../sql"}), 400, "adapter_invalid"),
        (json!({"adapter_id": "sql", "adapter_source": "ftp"}), 400, "adapter_invalid"),
        (json!({"adapter_id": "sql", "id": ""}), 400, "validation"),
        (json!({"adapter_id": "sql", "id": long}), 400, "validation"),
        (json!({"adapter_id": "sql", "id": "a\nb"}), 400, "validation"),
        (json!({"adapter_id": "sql", "id": MODEL}), 400, "validation"),
        (json!({"adapter_id": "sql", "id": "__base_model__"}), 400, "validation"),
        (json!({"adapter_id": "sql", "id": "capacity"}), 400, "validation"),
        (json!({"adapter_id": "taken", "id": "n"}), 404, "model_not_found"),
        (json!({"adapter_id": "nothing", "id": "n"}), 404, "model_not_found"),
        (json!({"adapter_id": "secret/etc", "id": "n"}), 403, "adapter_forbidden"),
        (json!({"adapter_id": "pirate", "id": "taken"}), 409, "adapter_exists"),
        (json!({"adapter_id": "cold", "id": "n"}), 424, "adapter_unavailable"),
    ] {
        let (found, answer) = router.post("/v1/adapters", &body).await;
        assert_eq!((found.as_u16(), &answer["error"]["code"]), (status, &json!(code)), "{body}: {answer}");
        assert_eq!(registered(&router).await, ["taken"], "{body}");
    }
    let (status, _) = router.post_bytes("/v1/adapters", b"{".to_vec()).await;
    assert_eq!(status, 400);
    for query in ["timeout_s=-1", "timeout_s=NaN", "timeout_s=1e9", "timeout_s=x", "timeout_s="] {
        let response =
            router.send_with(Method::DELETE, &format!("/v1/adapters/taken?{query}"), &[], &Value::Null).await;
        assert_eq!(response.status(), 400, "{query}");
    }
    assert_eq!(registered(&router).await, ["taken"]);
    router.shard.release(&Gate::Stage("cold".into()));
    // A failure is told with the adapter that it is of.
    let list = get(&router, "/v1/adapters").await;
    let failed =
        list["data"].as_array().unwrap().iter().find(|adapter| adapter["adapter_id"] == "nothing").unwrap();
    assert!(failed["last_error"]["message"].as_str().unwrap().contains("nothing"), "{failed}");
    let replaced = json!({"adapter_id": "pirate", "id": "taken", "replace": true});
    assert_eq!(router.ok("/v1/adapters", &replaced).await["content"], hex(&content("pirate")));
}

/// Fields are known by their names, and never by their places.
#[tokio::test]
async fn lists_are_no_bodies() {
    let router = router(8, |_| {}).await;
    router.ok("/v1/adapters", &json!({"id": "taken", "adapter_id": "sql"})).await;
    for (path, body) in [
        ("/v1/adapters", json!([])),
        ("/v1/adapters", json!(["sql"])),
        ("/v1/adapters", json!(["sql", "local", "n", null, false, false])),
        ("/v1/adapters", json!(["sql", "local", "taken", null, true, true])),
        ("/v1/load_lora_adapter", json!(["n", "sql"])),
        ("/v1/load_lora_adapter", json!(["n", "sql", false])),
        ("/v1/unload_lora_adapter", json!(["taken"])),
        ("/v1/lora_adapter/load", json!(["n", "sql", null, null, null, null])),
        ("/v1/lora_adapter/unload", json!(["taken", null])),
        ("/generate", json!(["x"])),
        ("/v1/completions", json!([MODEL, "x"])),
        ("/v1/chat/completions", json!([MODEL, []])),
        ("/tokenize", json!(["x"])),
        ("/detokenize", json!([[1]])),
    ] {
        for text in [body.to_string(), format!(" \n\t{body}")] {
            let (status, answer) = router.post_bytes(path, text.into_bytes()).await;
            assert!([400, 422].contains(&status.as_u16()), "{path} {body}: {status}, {answer}");
            assert!(answer.to_string().contains("expected an object"), "{path} {body}: {answer}");
        }
        assert_eq!(registered(&router).await, ["taken"], "{path} {body}");
    }
}

#[tokio::test]
async fn what_is_pinned_stays_and_others_are_loaded_all_the_same() {
    let router = router(4, |_| {}).await;
    for id in ["one", "two"] {
        let made = router.ok("/v1/adapters", &json!({"adapter_id": id, "pin": true})).await;
        assert_eq!((&made["pinned"], &made["pins"]), (&json!(true), &json!(1)), "{made}");
    }
    // Pins may take half of host memory.
    let (status, body) = router.post("/v1/adapters", &json!({"adapter_id": "three", "pin": true})).await;
    assert_eq!((status.as_u16(), &body["error"]["code"]), (400, &json!("validation")), "{body}");
    assert!(body["error"]["message"].as_str().unwrap().contains("pinned"), "{body}");
    for id in ["a", "b", "c", "d", "e", "f", "x", "y", "z"] {
        router.ok("/generate", &ask(id)).await;
    }
    let pinned = [content("one"), content("two")];
    let unstaged = router.shard.saw(|seen| Some(seen.unstaged.clone())).await;
    assert!(unstaged.len() >= 5, "{}", unstaged.len());
    assert!(unstaged.iter().all(|gone| !pinned.contains(&gone.content)));
    let capacity = get(&router, "/v1/adapters/capacity").await;
    assert_eq!(capacity["host"]["pinned_bytes"], 2000, "{capacity}");
    assert_eq!(capacity["host"]["limit_bytes"], 4400, "{capacity}");
    assert_eq!(capacity["device"]["slots"], 4, "{capacity}");
    for (id, content) in ["one", "two"].into_iter().zip(pinned) {
        assert_eq!(delete(&router, &format!("/v1/adapters/{id}")).await.0, 200);
        router.shard.saw(|seen| seen.unstaged.iter().any(|gone| gone.content == content).then_some(())).await;
    }
    let (capacity, router) = (&get(&router, "/v1/adapters/capacity").await, router);
    assert_eq!(capacity["host"]["pinned_bytes"], 0, "{capacity}");
    router.ok("/v1/adapters", &json!({"adapter_id": "three", "pin": true})).await;
}

#[tokio::test]
async fn one_that_is_removed_goes_when_its_requests_have_ended() {
    let router = router(8, |_| {}).await;
    router.ok("/v1/adapters", &json!({"id": "busy", "adapter_id": "sql", "pin": true})).await;
    router.shard.hold(Gate::Steps);
    let running: Vec<_> = (0..3).map(|_| router.begin("/generate", &ask("busy"))).collect();
    poll(async || (get(&router, "/v1/adapters/busy").await["running"] == 3).then_some(())).await;
    let (status, body) = delete(&router, "/v1/adapters/busy?timeout_s=0.05").await;
    assert_eq!((status, &body["unloaded"], &body["running"]), (200, &json!(false), &json!(3)), "{body}");
    assert_eq!(router.shard.saw(|seen| Some(seen.unstaged.len())).await, 0);
    router.ok("/v1/adapters", &json!({"id": "again", "adapter_id": "sql"})).await;
    let removed = delete(&router, "/v1/adapters/again");
    let release = async { router.shard.release(&Gate::Steps) };
    let ((status, body), ()) = tokio::join!(removed, release);
    assert_eq!((status, &body["unloaded"]), (200, &json!(true)), "{body}");
    for answer in join_all(running).await {
        assert_eq!(answer.unwrap().status(), 200);
    }
    router.shard.saw(|seen| (!seen.unstaged.is_empty()).then_some(())).await;
}

/// Who may not know of others' adapters does not learn of them here.
#[tokio::test]
async fn the_administrators_key_opens_these_routes_and_nothing_else_does() {
    let router = router(8, |config| {
        config.router.api_keys = vec!["tenant".into()];
        config.router.admin_token = Some("root".into());
    })
    .await;
    let load = json!({"lora_name": "n", "lora_path": "sql"});
    let artifact = json!({"lora_name": "m", "artifact_url": "sql"});
    let routes: [(Method, &str, Value); 9] = [
        (Method::POST, "/v1/adapters", json!({"adapter_id": "sql"})),
        (Method::GET, "/v1/adapters", Value::Null),
        (Method::GET, "/v1/adapters/sql", Value::Null),
        (Method::GET, "/v1/adapters/capacity", Value::Null),
        (Method::DELETE, "/v1/adapters/sql", Value::Null),
        (Method::POST, "/v1/load_lora_adapter", load.clone()),
        (Method::POST, "/v1/unload_lora_adapter", load),
        (Method::POST, "/v1/lora_adapter/load", artifact),
        (Method::POST, "/v1/lora_adapter/unload", json!({"lora_name": "m"})),
    ];
    for token in [
        None,
        Some("Bearer tenant"),
        Some("Bearer ROOT"),
        Some("Bearer root2"),
        Some("root"),
        Some("Bearer "),
    ] {
        for (method, path, body) in &routes {
            let headers: Vec<(&str, &str)> =
                token.map(|token| ("authorization", token)).into_iter().collect();
            let response = router.send_with(method.clone(), path, &headers, body).await;
            assert_eq!(response.status(), 401, "{token:?} {method} {path}");
            let body: Value = response.json().await.unwrap();
            assert!(body.to_string().contains("administrator"), "{path}: {body}");
        }
    }
    for (method, path, body) in &routes {
        let response =
            router.send_with(method.clone(), path, &[("authorization", "bearer root")], body).await;
        assert_eq!(response.status(), 200, "{method} {path}: {}", response.text().await.unwrap());
    }
    let generate = json!({"inputs": "x", "parameters": {"max_new_tokens": 1}});
    for (token, path, method, body, status) in [
        ("Bearer root", "/v1/models", Method::GET, Value::Null, 200),
        ("Bearer tenant", "/v1/models", Method::GET, Value::Null, 200),
        ("Bearer tenant", "/generate", Method::POST, generate.clone(), 200),
        ("Bearer root", "/generate", Method::POST, generate.clone(), 401),
        ("Bearer root", "/info", Method::GET, Value::Null, 401),
        ("Bearer root", "/v1/adaptersx", Method::GET, Value::Null, 401),
    ] {
        let response = router.send_with(method, path, &[("authorization", token)], &body).await;
        assert_eq!(response.status(), status, "{token} {path}");
    }
}

#[tokio::test]
async fn without_an_administrator_tenants_do_not_see_what_others_name() {
    for (keys, seen) in [(vec!["one".into(), "two".into()], 0), (Vec::new(), 1)] {
        let router = router(8, |config| config.router.api_keys = keys).await;
        let headers = [("authorization", "Bearer one")];
        assert_eq!(router.send_with(Method::POST, "/generate", &headers, &ask("sql")).await.status(), 200);
        let headers = [("authorization", "Bearer two")];
        let list = router.send_with(Method::GET, "/v1/adapters", &headers, &Value::Null).await;
        let list: Value = list.json().await.unwrap();
        assert_eq!(list["data"].as_array().unwrap().len(), seen, "{list}");
    }
}
