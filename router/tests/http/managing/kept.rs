//! What survives a restart.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use lifecycle::Supervisor;
use lorax_router::{App, StartError};
use reqwest::Method;
use serde_json::{Value, json};

use super::{ask, delete, get, json_of, registered, router};
use crate::router::{Router, configuration, poll};

/// Ends a router, and starts another with the same manifest.
async fn restart(old: Router, manifest: &Path) -> Router {
    drop(old);
    // The old one keeps the manifest until its last connection has ended.
    let lock = manifest.with_file_name("manifest.json.lock");
    poll(async || File::open(&lock).unwrap().try_lock().ok()).await;
    start(manifest).await
}

async fn start(manifest: &Path) -> Router {
    router(8, |config| config.router.adapter_manifest = Some(manifest.into())).await
}

#[tokio::test]
async fn registrations_and_pins_survive_and_credentials_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let manifest = folder.path().join("deep/manifest.json");
    let first = start(&manifest).await;
    assert!(!manifest.exists(), "nothing was registered");
    for body in [
        json!({"id": "plain", "adapter_id": "sql"}),
        json!({"id": "pinned", "adapter_id": "pirate", "pin": true}),
        json!({"id": "alias", "adapter_id": "pirate"}),
        json!({"id": "private", "adapter_id": "law", "api_token": "hush-hush"}),
        json!({"id": "both", "adapter_id": "tax", "api_token": "hush-hush", "pin": true}),
        json!({"id": "gone", "adapter_id": "tax"}),
    ] {
        let made = first.ok("/v1/adapters", &body).await;
        assert!(!made.to_string().contains("hush"), "{made}");
    }
    assert_eq!(delete(&first, "/v1/adapters/gone").await.0, 200);
    first.ok("/generate", &ask("private")).await;
    let text = fs::read_to_string(&manifest).unwrap();
    assert!(!text.contains("hush"), "{text}");
    assert_eq!(fs::metadata(&manifest).unwrap().permissions().mode() & 0o777, 0o600);
    let names = ["alias", "both", "pinned", "plain", "private"];
    let second = restart(first, &manifest).await;
    assert_eq!(registered(&second).await, names);
    poll(async || (get(&second, "/v1/adapters/pinned").await["pins"] == 1).then_some(())).await;
    for id in ["plain", "alias", "pinned"] {
        second.ok("/generate", &ask(id)).await;
        assert_eq!(get(&second, &format!("/v1/adapters/{id}")).await["last_error"], Value::Null);
    }
    for id in ["private", "both"] {
        let shown = get(&second, &format!("/v1/adapters/{id}")).await;
        assert!(shown["last_error"]["message"].as_str().unwrap().contains("register it again"), "{shown}");
        assert_eq!(shown["pins"], 0, "{shown}");
        let (status, body) = second.post("/generate", &ask(id)).await;
        assert_eq!(status, 424, "{body}");
        assert!(body["error"].as_str().unwrap().contains("register it again"), "{body}");
        let mut own = ask(id);
        own["parameters"]["api_token"] = "mine".into();
        second.ok("/generate", &own).await;
    }
    let again = json!({"id": "private", "adapter_id": "law", "api_token": "hush-hush", "replace": true});
    assert_eq!(second.ok("/v1/adapters", &again).await["last_error"], Value::Null);
    second.ok("/generate", &ask("private")).await;
    let third = restart(second, &manifest).await;
    assert_eq!(registered(&third).await, names);
    assert_eq!(third.post("/generate", &ask("private")).await.0, 424);
}

#[tokio::test]
async fn a_broken_manifest_is_an_error_that_names_it_and_stays_as_it_is() {
    let entry = r#"{"id":"a","adapter_id":"sql","adapter_source":"local","pinned":false,"needs_credential":false,"created":1}"#;
    let cases = [
        String::new(),
        "{".into(),
        "[]".into(),
        "null".into(),
        r#"{"version":1}"#.into(),
        r#"{"version":2,"adapters":[]}"#.into(),
        r#"{"version":1,"adapters":[],"more":1}"#.into(),
        r#"{"version":1,"adapters":[{}]}"#.into(),
        format!(r#"{{"version":1,"adapters":[{entry}"#),
        format!(r#"{{"version":1,"adapters":[{entry}]}} x"#),
        format!(r#"{{"version":1,"adapters":[{}]}}"#, entry.replace("\"local\"", "\"ftp\"")),
        format!(r#"{{"version":1,"adapters":[{}]}}"#, entry.replace("\"sql\"", "\"../sql\"")),
        format!(r#"{{"version":1,"adapters":[{}]}}"#, entry.replace("\"a\"", "1")),
        "\u{0}\u{0}\u{0}".into(),
    ];
    for text in cases {
        let folder = tempfile::tempdir().unwrap();
        let manifest = folder.path().join("manifest.json");
        fs::write(&manifest, &text).unwrap();
        let mut config = configuration(&folder.path().join("socket"));
        config.router.adapter_manifest = Some(manifest.clone());
        let supervisor = Supervisor::reporting_to(|_| {}).unwrap();
        let error = App::start(config, &supervisor).err().unwrap();
        assert!(matches!(error, StartError::Registry(_)) && error.is_usage(), "{text}: {error}");
        assert!(error.to_string().contains("manifest"), "{text}: {error}");
        assert_eq!(fs::read_to_string(&manifest).unwrap(), text);
    }
}

#[tokio::test]
async fn a_manifest_that_cannot_be_written_undoes_the_change() {
    let folder = tempfile::tempdir().unwrap();
    let manifest = folder.path().join("manifest.json");
    let router = start(&manifest).await;
    router.ok("/v1/adapters", &json!({"id": "before", "adapter_id": "sql"})).await;
    // A folder in the place of the new file: whoever runs the tests may write everywhere.
    fs::create_dir(folder.path().join("manifest.json.new")).unwrap();
    for (id, replace) in [("new", false), ("before", true)] {
        let body = json!({"id": id, "adapter_id": "pirate", "replace": replace});
        let (status, body) = router.post("/v1/adapters", &body).await;
        assert_eq!((status.as_u16(), &body["error"]["code"]), (500, &json!("not_kept")), "{body}");
    }
    let (status, _) = json_of(&router, Method::DELETE, "/v1/adapters/before").await;
    assert_eq!(status, 500);
    assert_eq!(registered(&router).await, ["before"]);
    assert_eq!(get(&router, "/v1/adapters/before").await["adapter_id"], "sql");
    router.ok("/generate", &ask("before")).await;
}

#[tokio::test]
async fn a_manifest_has_one_server() {
    let folder = tempfile::tempdir().unwrap();
    let manifest = folder.path().join("manifest.json");
    let _router = start(&manifest).await;
    let mut config = configuration(&folder.path().join("socket"));
    config.router.adapter_manifest = Some(manifest);
    let supervisor = Supervisor::reporting_to(|_| {}).unwrap();
    let error = App::start(config, &supervisor).err().unwrap().to_string();
    assert!(error.contains("another server"), "{error}");
}

/// Beside the sockets of the shards, where no flag names a file.
#[tokio::test]
async fn a_router_that_is_started_again_has_what_the_one_before_had() {
    let first = router(8, |_| {}).await;
    first.ok("/v1/adapters", &json!({"id": "one", "adapter_id": "sql"})).await;
    let lock = first.run_folder().join("adapters.json.lock");
    let second =
        first.restart_when(async || poll(async || File::open(&lock).unwrap().try_lock().ok()).await).await;
    assert_eq!(registered(&second).await, ["one"]);
}
