//! Adapters that flags name.

use serde_json::json;

use super::{ask, get, registered, router};
use crate::router::{MODEL, poll};

#[tokio::test]
async fn requests_that_name_no_adapter_have_the_default_one() {
    let router = router(8, |config| config.router.adapter_id = Some("sql".into())).await;
    let completion = |fields: serde_json::Value| {
        let mut body = json!({"prompt": "x", "max_tokens": 1});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        ("/v1/completions", body)
    };
    let generate = |adapter: serde_json::Value| {
        ("/generate", json!({"inputs": "x", "parameters": {"adapter_id": adapter, "max_new_tokens": 1}}))
    };
    for ((path, body), expected) in [
        (generate(json!(null)), Some("sql")),
        (generate(json!("")), Some("sql")),
        (("/generate", json!({"inputs": "x"})), Some("sql")),
        (generate(json!("pirate")), Some("pirate")),
        (generate(json!("__base_model__")), None),
        (completion(json!({})), Some("sql")),
        (completion(json!({"model": MODEL})), Some("sql")),
        (completion(json!({"model": ""})), Some("sql")),
        (completion(json!({"model": "pirate"})), Some("pirate")),
        (completion(json!({"model": "__base_model__"})), None),
        (completion(json!({"model": MODEL, "adapter_id": "__base_model__"})), None),
        (completion(json!({"model": "sql"})), Some("sql")),
    ] {
        router.ok(path, &body).await;
        assert_eq!(router.shard.last_adapter().await.as_deref(), expected, "{path} {body}");
    }
}

#[tokio::test]
async fn preloaded_adapters_are_there_from_the_start_and_others_come_when_they_are_named() {
    let router = router(8, |config| {
        config.router.adapter_source = Some("hub".into());
        config.router.preloaded_adapter_ids = vec!["one".into(), "two".into()];
        config.router.preloaded_adapter_source = Some("local".into());
    })
    .await;
    for id in ["one", "two"] {
        poll(async || (get(&router, &format!("/v1/adapters/{id}")).await["pins"] == 1).then_some(())).await;
        router.ok("/generate", &ask(id)).await;
    }
    for id in ["three", "sql", "pirate"] {
        let mut other = ask(id);
        other["parameters"]["adapter_source"] = "local".into();
        router.ok("/generate", &other).await;
    }
    assert_eq!(registered(&router).await, ["one", "two"]);
}

#[tokio::test]
async fn vllms_flags_mean_what_they_mean_there() {
    let router = router(8, |config| {
        config.router.lora_modules = vec![
            "assistant=sql".into(),
            r#"{"name": "parrot", "path": "pirate", "base_model_name": "x"}"#.into(),
        ];
        (config.router.enable_lora, config.router.max_cpu_loras) = (true, Some(2));
        config.router.max_lora_rank = Some(8);
    })
    .await;
    assert_eq!(registered(&router).await, ["assistant", "parrot"]);
    for (id, adapter) in [("assistant", "sql"), ("parrot", "pirate")] {
        router.ok("/v1/completions", &json!({"model": id, "prompt": "x", "max_tokens": 1})).await;
        assert_eq!(get(&router, &format!("/v1/adapters/{id}")).await["adapter_id"], adapter);
    }
}

#[tokio::test]
async fn ranks_above_the_bound_are_refused() {
    for (most, fits) in [(1, false), (7, false), (8, true), (9, true), (256, true)] {
        let router = router(8, |config| config.router.max_lora_rank = Some(most)).await;
        let (status, body) = router.post("/generate", &ask("sql")).await;
        assert_eq!(status, if fits { 200 } else { 422 }, "{most}: {body}");
        if !fits {
            let error = body["error"].as_str().unwrap();
            assert!(error.contains("rank 8") && error.contains(&format!("is {most}")), "{error}");
            router.shard.saw(|seen| (!seen.unstaged.is_empty()).then_some(())).await;
        }
    }
}

#[tokio::test]
async fn flags_that_name_no_adapter_are_errors() {
    use lifecycle::Supervisor;
    use lorax_router::{App, StartError};
    let folder = tempfile::tempdir().unwrap();
    for module in [
        "",
        "x",
        "=path",
        "name=",
        "{}",
        r#"{"name": "x"}"#,
        "{",
        r#"{"name": "", "path": "x"}"#,
        "x=../y",
        "x=s3://y",
    ] {
        let mut config = crate::router::configuration(&folder.path().join("socket"));
        config.router.lora_modules = vec![module.into()];
        let supervisor = Supervisor::reporting_to(|_| {}).unwrap();
        let error = App::start(config, &supervisor).err().unwrap();
        assert!(matches!(error, StartError::Registry(_)) && error.is_usage(), "{module:?}: {error}");
    }
}
