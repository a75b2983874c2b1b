//! The names of the base model, and what is told about the models that there are.

use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    router::{MODEL, Router, tokens},
    shard::Script,
};

async fn called(names: &[&str]) -> Router {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    Router::start_with(Script::saying(tokens("a")), |config| config.router.served_model_name = names).await
}

async fn get(router: &Router, path: &str) -> (u16, Value) {
    let response = router.get(path).await;
    (response.status().as_u16(), response.json().await.unwrap())
}

/// Registers the adapter `id` as `name`.
async fn register(router: &Router, name: &str, id: &str) -> u16 {
    let body = json!({"id": name, "adapter_id": id});
    router.send_with(Method::POST, "/v1/adapters", &[], &body).await.status().as_u16()
}

#[tokio::test]
async fn every_name_of_the_base_model_leads_to_it_and_no_other_does() {
    let router = called(&["gpt-4o", "my model"]).await;
    for (model, adapter, reported) in [
        (json!("gpt-4o"), None, "gpt-4o"),
        (json!("my model"), None, "my model"),
        (json!(MODEL), None, MODEL),
        (json!("__base_model__"), None, "__base_model__"),
        (json!(""), None, "gpt-4o"),
        (json!(null), None, "gpt-4o"),
        (json!("dummy"), None, "gpt-4o"),
        (json!("tgi"), None, "gpt-4o"),
        (json!("sql"), Some("sql"), "sql"),
        (json!("gpt-4o|sql"), Some("sql"), "gpt-4o|sql"),
        (json!("my model|pirate"), Some("pirate"), "my model|pirate"),
        (json!(format!("{MODEL}|sql")), Some("sql"), "the/base-model|sql"),
    ] {
        for (path, prompt, value) in [
            ("/v1/completions", "prompt", json!("Hi")),
            ("/v1/chat/completions", "messages", json!([{"role": "user", "content": "Hi"}])),
        ] {
            let answer = router.ok(path, &json!({"model": model, prompt: value})).await;
            assert_eq!(answer["model"], reported, "{model}");
            assert_eq!(router.shard.last_adapter().await.as_deref(), adapter, "{model}");
        }
    }
    for model in ["gpt-4", "GPT-4o", "my", "dummy2"] {
        let (status, answer) = router.post("/v1/completions", &json!({"model": model, "prompt": "x"})).await;
        assert!(status == 404 || status == 400, "{model}: {answer}");
        assert_eq!(answer["error"]["param"], "model", "{answer}");
    }
}

#[tokio::test]
async fn models_are_listed_and_found_by_their_names() {
    for names in [&[][..], &["one"], &["one", "two/three"]] {
        let router = called(names).await;
        let names = if names.is_empty() { &[MODEL] } else { names };
        assert_eq!(register(&router, "queries", "sql").await, 200);
        assert_eq!(register(&router, names[0], "sql").await, 400, "the base model's name is taken");
        let (_, list) = get(&router, "/v1/models").await;
        let ids: Vec<_> = list["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
        assert_eq!(ids, [names, &["queries"]].concat());
        for model in list["data"].as_array().unwrap() {
            let id = model["id"].as_str().unwrap();
            // 2020, when there was no such model.
            assert!(model["created"].as_u64().unwrap() > 1_577_836_800, "{model}");
            let (parent, root) =
                if id == "queries" { (json!(names[0]), "sql") } else { (json!(null), MODEL) };
            assert_eq!((&model["parent"], &model["root"]), (&parent, &json!(root)), "{model}");
            for path in [id.to_owned(), id.replace('/', "%2F")] {
                assert_eq!(get(&router, &format!("/v1/models/{path}")).await, (200, model.clone()));
            }
        }
    }
    let router = called(&[]).await;
    for id in ["gpt-4", "the", "the/base-model/more", "queries"] {
        let (status, answer) = get(&router, &format!("/v1/models/{id}")).await;
        assert_eq!(status, 404, "{answer}");
        assert_eq!(answer["error"]["code"], "model_not_found", "{answer}");
    }
}

#[tokio::test]
async fn an_adapter_may_have_the_name_that_clients_send_of_themselves() {
    let router = called(&[]).await;
    assert_eq!(register(&router, "tgi", "sql").await, 200);
    for (model, adapter) in [("tgi", Some("sql")), ("dummy", None)] {
        router.ok("/v1/completions", &json!({"model": model, "prompt": "x"})).await;
        assert_eq!(router.shard.last_adapter().await.as_deref(), adapter, "{model}");
    }
}
