//! Routes that controllers of other servers call, in their words.

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::{ask, get, registered, router};
use crate::router::Router;

async fn text(router: &Router, path: &str, body: &Value) -> (StatusCode, String) {
    let response = router.send(path, body).await;
    (response.status(), response.text().await.unwrap())
}

#[tokio::test]
async fn vllms_routes_answer_as_vllm_does() {
    let router = router(8, |_| {}).await;
    let load = |name: &str, path: &str| json!({"lora_name": name, "lora_path": path});
    let adapters = crate::router::adapters().to_str().unwrap();
    for (name, path) in [
        ("sql", "sql".to_owned()),
        ("deep", format!("{adapters}/pirate")),
        ("file", format!("file://{adapters}/law")),
    ] {
        let (status, answer) = text(&router, "/v1/load_lora_adapter", &load(name, &path)).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer, format!("Success: LoRA adapter '{name}' added successfully."));
        router.ok("/generate", &ask(name)).await;
    }
    let mut replace = load("sql", "tax");
    replace["load_inplace"] = true.into();
    assert_eq!(text(&router, "/v1/load_lora_adapter", &replace).await.0, 200);
    assert_eq!(get(&router, "/v1/adapters/sql").await["adapter_id"], "tax");
    let models = get(&router, "/v1/models").await;
    let ids: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids[1..], ["deep", "file", "sql"]);
    for name in ["sql", "deep", "file"] {
        let (status, answer) = text(&router, "/v1/unload_lora_adapter", &json!({"lora_name": name})).await;
        assert_eq!(status, 200);
        assert_eq!(answer, format!("Success: LoRA adapter '{name}' removed successfully."));
    }
    assert_eq!(registered(&router).await, Vec::<String>::new());
    router.shard.saw(|seen| (seen.unstaged.len() >= 2).then_some(())).await;
}

#[tokio::test]
async fn what_vllm_refuses_is_refused_in_its_words() {
    let router = router(8, |_| {}).await;
    let load = |name: &str, path: &str| json!({"lora_name": name, "lora_path": path});
    let adapters = crate::router::adapters().to_str().unwrap();
    assert_eq!(text(&router, "/v1/load_lora_adapter", &load("sql", "sql")).await.0, 200);
    let already = "The lora adapter 'sql' has already been loaded. If you want to load the adapter in place, set \
                   'load_inplace' to True.";
    let both = "Both 'lora_name' and 'lora_path' must be provided.";
    for (path, body, status, kind, message) in [
        ("/v1/load_lora_adapter", load("sql", "pirate"), 400, "InvalidUserInput", already),
        ("/v1/load_lora_adapter", load("", "pirate"), 400, "InvalidUserInput", both),
        ("/v1/load_lora_adapter", load("x", ""), 400, "InvalidUserInput", both),
        ("/v1/load_lora_adapter", json!({"lora_name": "x"}), 400, "BadRequestError", "lora_path"),
        ("/v1/load_lora_adapter", json!({"lora_path": "x"}), 400, "BadRequestError", "lora_name"),
        (
            "/v1/load_lora_adapter",
            json!({"lora_name": 1, "lora_path": "x"}),
            400,
            "BadRequestError",
            "lora_name",
        ),
        ("/v1/load_lora_adapter", json!([]), 400, "BadRequestError", "object"),
        ("/v1/load_lora_adapter", load("x", "/nothing/here"), 400, "BadRequestError", "nothing"),
        ("/v1/load_lora_adapter", load("x", "../sql"), 400, "BadRequestError", "sql"),
        ("/v1/load_lora_adapter", load("x", &format!("{adapters}/nothing")), 404, "NotFoundError", "nothing"),
        ("/v1/load_lora_adapter", load("__base_model__", "sql"), 400, "BadRequestError", "base"),
        ("/v1/unload_lora_adapter", json!({}), 400, "BadRequestError", "lora_name"),
        (
            "/v1/unload_lora_adapter",
            json!({"lora_name": ""}),
            400,
            "InvalidUserInput",
            "'lora_name' needs to be provided to unload a LoRA adapter.",
        ),
        (
            "/v1/unload_lora_adapter",
            json!({"lora_name": "nobody", "lora_int_id": 3}),
            404,
            "NotFoundError",
            "The lora adapter 'nobody' cannot be found.",
        ),
    ] {
        let (found, answer) = router.post(path, &body).await;
        let error = &answer["error"];
        let expected = (status, &json!(kind), &json!(status));
        assert_eq!((found.as_u16(), &error["type"], &error["code"]), expected, "{body}: {answer}");
        assert!(error["message"].as_str().unwrap().contains(message), "{body}: {answer}");
    }
    assert_eq!(registered(&router).await, ["sql"]);
}

#[tokio::test]
async fn aibrix_hands_over_addresses_and_credentials() {
    let router = router(8, |_| {}).await;
    let adapters = crate::router::adapters().to_str().unwrap();
    let load = json!({
        "lora_name": "sql",
        "artifact_url": format!("{adapters}/sql"),
        "credentials": {"HF_TOKEN": "hush-hush"},
        "additional_config": {"api-key": "other"},
        "local_dir": "/tmp/aibrix/adapters",
    });
    let answer = router.ok("/v1/lora_adapter/load", &load).await;
    assert_eq!((&answer["status"], &answer["local_path"]), (&json!("success"), &Value::Null), "{answer}");
    assert!(answer["message"].is_string() && !answer.to_string().contains("hush"), "{answer}");
    router.ok("/generate", &ask("sql")).await;
    let minimal = json!({"lora_name": "law", "artifact_url": "law"});
    router.ok("/v1/lora_adapter/load", &minimal).await;
    for (path, body, status, words) in [
        ("/v1/lora_adapter/load", load.clone(), 400, "already been loaded"),
        ("/v1/lora_adapter/load", json!({"lora_name": "x"}), 400, "artifact_url"),
        ("/v1/lora_adapter/load", json!({"artifact_url": "x"}), 400, "lora_name"),
        ("/v1/lora_adapter/load", json!({"lora_name": "", "artifact_url": "x"}), 400, "must be provided"),
        ("/v1/lora_adapter/load", json!({"lora_name": "x", "artifact_url": "ftp://x/y"}), 400, "ftp"),
        ("/v1/lora_adapter/load", json!({"lora_name": "x", "artifact_url": "s3://x"}), 400, "s3"),
        (
            "/v1/lora_adapter/load",
            json!({"lora_name": "x", "artifact_url": "sql", "credentials_secret": "s"}),
            400,
            "Kubernetes",
        ),
        (
            "/v1/lora_adapter/load",
            json!({"lora_name": "x", "artifact_url": "sql", "credentials": {"other": "hush"}}),
            400,
            "hf_token",
        ),
        ("/v1/lora_adapter/load", json!({"lora_name": "x", "artifact_url": "sql", "more": 1}), 400, "more"),
        (
            "/v1/lora_adapter/load",
            json!({"lora_name": "x", "artifact_url": format!("{adapters}/nothing")}),
            404,
            "nothing",
        ),
        ("/v1/lora_adapter/unload", json!({"lora_name": "nobody"}), 404, "cannot be found"),
        ("/v1/lora_adapter/unload", json!({}), 400, "lora_name"),
    ] {
        let (found, answer) = router.post(path, &body).await;
        assert_eq!((found.as_u16(), &answer["object"]), (status, &json!("error")), "{body}: {answer}");
        assert_eq!(answer["code"], status, "{answer}");
        let message = answer["message"].as_str().unwrap();
        assert!(message.contains(words) && !message.contains("hush"), "{body}: {answer}");
    }
    for (name, cleanup) in [("sql", json!(true)), ("law", json!(null))] {
        let unload = json!({"lora_name": name, "cleanup_local": cleanup});
        assert_eq!(router.ok("/v1/lora_adapter/unload", &unload).await["status"], "success");
    }
    assert_eq!(registered(&router).await, Vec::<String>::new());
}
