//! A server that must not ask anybody.

use std::{fs, net::TcpListener};

use serde_json::json;
use sources::{HubSettings, SourceError};

use crate::{
    fake::{Repository, Server},
    official::client,
    world::{CONFIG, ID, reference, repository, secret, settings, sources, weights},
};

/// An address at which somebody listens who was never called.
struct Nobody(TcpListener);

impl Nobody {
    fn new() -> Nobody {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        Nobody(listener)
    }

    fn url(&self) -> String {
        format!("http://{}", self.0.local_addr().unwrap())
    }
}

impl Drop for Nobody {
    fn drop(&mut self) {
        assert!(self.0.accept().is_err(), "a connection was made");
    }
}

#[tokio::test]
async fn what_the_official_client_has_fetched_is_read_in_place() {
    let server = Server::with(
        ID,
        repository().with("v2", &[("adapter_config.json", b"{}"), ("adapter_model.bin", b"2")]),
    );
    server.put(
        "org/ludwig",
        Repository::new(&[
            ("model_weights/adapter_config.json", CONFIG),
            ("model_weights/adapter_model.safetensors", b"l"),
        ]),
    );
    server.put("org/config", Repository::new(&[("adapter_config.json", CONFIG)]));
    let home = tempfile::tempdir().unwrap();
    let calls = json!([
        ["snapshot", ID],
        ["snapshot", ID, "v2"],
        ["snapshot", "org/ludwig"],
        ["snapshot", "org/config"],
    ]);
    let folders = client(&server, home.path(), &calls);
    let folder = |number: usize| fs::canonicalize(folders[number].as_str().unwrap()).unwrap();
    server.asked();
    let nobody = Nobody::new();
    let hub = HubSettings { offline: true, cache: Some(home.path().join("hub")), ..settings(&nobody.url()) };
    let sources = sources(hub, true);
    let main = server.commit(ID, "main");
    let at_main = format!("{ID}@{main}");
    for (id, expected, bytes) in [
        (ID, folder(0), CONFIG.len() + weights().len()),
        ("org/name@main", folder(0), CONFIG.len() + weights().len()),
        (&at_main, folder(0), CONFIG.len() + weights().len()),
        ("org/name@v2", folder(1), 3),
        ("org/ludwig", folder(2).join("model_weights"), CONFIG.len() + 1),
    ] {
        let found = sources.lookup(&reference(id), secret("any").as_ref()).await.unwrap();
        assert_eq!(found.in_place, Some(expected), "{id}");
        assert_eq!(found.bytes, bytes as u64, "{id}");
        assert!(found.is_free && found.files.iter().all(|file| file.stamp.is_some()), "{id}");
        assert_eq!(sources.lookup(&reference(id), None).await.unwrap(), found, "{id}");
    }
    for id in ["org/nothing", "org/config", "org/name@v3", "name", "org/name@refs/pr/1", "org/nam"] {
        let found = sources.lookup(&reference(id), None).await;
        assert!(matches!(found, Err(SourceError::Offline { .. })), "{id}: {found:?}");
    }
    let before = sources.lookup(&reference(ID), None).await.unwrap();
    let weights = folder(0).join("adapter_model.safetensors").canonicalize().unwrap();
    fs::write(weights, "somebody wrote to the cache").unwrap();
    assert_ne!(sources.lookup(&reference(ID), None).await.unwrap().version, before.version);
    drop(nobody);
    assert!(server.asked().is_empty());
}
