//! `/openapi.json`: complete, and about the routes that there are.

use std::{collections::BTreeSet, fs, path::Path};

use serde_json::{Value, json};

use crate::{
    router::{Router, tokens},
    shard::Script,
};

/// The methods and paths of the table of routes.
fn served() -> BTreeSet<(String, String)> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/server/routes.rs");
    let text = fs::read_to_string(file).unwrap();
    let mut all = BTreeSet::new();
    for line in text.lines().filter_map(|line| line.trim().strip_prefix(".route(\"")) {
        let (path, handlers) = line.split_once('"').unwrap();
        for method in ["get", "post", "delete", "put", "patch"] {
            if handlers.contains(&format!("{method}(")) {
                all.insert((method.to_owned(), path.replace("{*", "{")));
            }
        }
    }
    all
}

/// Every `$ref` in a document.
fn references(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            found.extend(map.get("$ref").and_then(Value::as_str).map(str::to_owned));
            map.values().for_each(|value| references(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

#[tokio::test]
async fn every_route_is_in_the_document() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let document: Value = router.get("/openapi.json").await.json().await.unwrap();
    assert_eq!(document, router.get("/api-doc/openapi.json").await.json::<Value>().await.unwrap());
    assert_eq!(document["openapi"], "3.1.0");
    let paths = document["paths"].as_object().unwrap();
    let told: BTreeSet<_> = paths
        .iter()
        .flat_map(|(path, methods)| {
            methods.as_object().unwrap().keys().map(move |method| (method.clone(), path.clone()))
        })
        .collect();
    let served = served();
    assert!(served.len() > 30, "{served:?}");
    assert_eq!(told, served, "the table of router/src/api/openapi.rs has all routes and no others");
    let mut all = Vec::new();
    references(&document, &mut all);
    assert!(all.len() > 30, "{all:?}");
    for reference in all {
        let place = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(place).is_some(), "{reference}");
    }
    let names: BTreeSet<&str> = paths
        .values()
        .flat_map(|methods| methods.as_object().unwrap().values())
        .map(|operation| operation["operationId"].as_str().unwrap())
        .collect();
    assert_eq!(names.len(), told.len(), "operations have names of their own");
}

#[tokio::test]
async fn schemas_have_the_fields_of_bodies() {
    let router = Router::start(Script::saying(tokens("a"))).await;
    let document: Value = router.get("/openapi.json").await.json().await.unwrap();
    let schemas = &document["components"]["schemas"];
    for (schema, field, required) in [
        ("GenerateRequest", "inputs", true),
        ("GenerateRequest", "parameters", false),
        ("GenerateParameters", "best_of", false),
        ("GenerateParameters", "temperature", false),
        ("GenerateParameters", "api_token", false),
        ("MergedAdapters", "ids", true),
        ("CompletionRequest", "prompt", true),
        ("CompletionRequest", "top_k", false),
        ("ChatRequest", "messages", true),
        ("ChatRequest", "min_p", false),
        ("EmbeddingsRequest", "input", true),
        ("DetokenizeRequest", "tokens", true),
        ("RegisterRequest", "adapter_id", true),
        ("AibrixLoadRequest", "artifact_url", true),
        ("InfoResponse", "max_best_of", true),
    ] {
        assert!(schemas[schema]["properties"][field].is_object(), "{schema}.{field}: {}", schemas[schema]);
        let must = schemas[schema]["required"].as_array().is_some_and(|all| all.contains(&json!(field)));
        assert_eq!(must, required, "{schema}.{field}");
    }
    let page = router.get("/docs").await;
    assert!(page.headers()["content-type"].to_str().unwrap().starts_with("text/html"));
    assert!(page.text().await.unwrap().contains("openapi.json"));
}
