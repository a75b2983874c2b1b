//! What is found in buckets, by whom, and in which version.

use std::fs;

use serde_json::json;
use sources::{Denial, SourceError};

use crate::{
    fake::Server,
    world::{CONFIG, S3, fetch, find, get, hex, sources, weights},
};

/// The server is one because AWS's client gets along with it, and so is what passes questions on to it.
#[test]
fn the_official_client_takes_it_for_s3() {
    let mut server = S3::server();
    server.put("official", &[("a/b", CONFIG), ("a/large", &weights())]);
    let before = Server::before(&server.url);
    for endpoint in [server.url.clone(), before.url] {
        for (key, bytes) in [("a/b", CONFIG), ("a/large", &*weights())] {
            let found = server.call(&json!(["get", "official", key, endpoint]));
            assert_eq!((&found[0], &found[2]), (&json!(bytes.len()), &json!(hex(bytes))));
        }
    }
}

#[tokio::test]
async fn adapters_are_found_by_whole_names() {
    let (config, st, bin) = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin");
    let tools = "additional_chat_templates/tool_use.jinja";
    let cases: [(&str, &[&str], Result<&str, &str>); 13] = [
        ("plain", &[config, st], Ok(st)),
        ("torch", &[config, bin], Ok(bin)),
        ("both", &[config, bin, st, "optimizer.pt", "checkpoint-1/adapter_model.safetensors"], Ok(st)),
        ("ludwig", &["model_weights/adapter_config.json", "model_weights/adapter_model.safetensors"], Ok(st)),
        ("text", &[config, st, "vocab.json", tools, "tokenizer_config.json"], Ok(st)),
        ("inner", &["model_weights/adapter_config.json", "model_weights/adapter_model.bin", tools], Ok(bin)),
        ("deep/er", &[config, st], Ok(st)),
        ("deep", &["readme"], Err("does not exist")),
        ("plai", &[], Err("does not exist")),
        ("plain2", &[config], Err("has neither")),
        ("weights", &[st], Err("has no adapter_config.json")),
        ("nothing", &[], Err("does not exist")),
        ("sp ace+%@&=", &[config, st], Ok(st)),
    ];
    let url = {
        let mut server = S3::server();
        for (prefix, files, _) in &cases {
            for file in *files {
                let content = if file.ends_with(".json") { CONFIG } else { file.as_bytes() };
                server.put("layouts", &[(&format!("{prefix}/{file}"), content)]);
            }
        }
        server.url.clone()
    };
    let sources = sources(&url, &["s3://layouts", "gs://layouts", "az://layouts"]);
    for kind in ["s3", "gs", "az"] {
        for (prefix, files, expected) in &cases {
            let id = format!("{kind}://layouts/{prefix}");
            match (get(&sources, &id).await, expected) {
                (Ok(fetched), Ok(weights)) => {
                    assert_eq!(fetched.read(config), CONFIG, "{id}");
                    let from = files.iter().find(|file| file.ends_with(weights)).unwrap();
                    assert_eq!(fetched.read(weights), from.as_bytes(), "{id}");
                    let text = if *prefix == "text" { vec![tools, "tokenizer_config.json"] } else { vec![] };
                    for name in &text {
                        assert!(!fetched.read(name).is_empty(), "{id}: {name}");
                    }
                    assert_eq!(fetched.count(), 2 + text.len(), "{id}");
                }
                (Err(error), Err(cause)) => assert!(error.to_string().contains(cause), "{id}: {error}"),
                (fetched, _) => panic!("{id}: {fetched:?}"),
            }
        }
    }
}

#[tokio::test]
async fn only_buckets_that_are_allowed_are_read() {
    let url = {
        let mut server = S3::server();
        for prefix in ["team/a", "team2/a", "other/a"] {
            let files = [("adapter_config.json", CONFIG), ("adapter_model.bin", b"w")];
            for (name, bytes) in files {
                server.put("allowed", &[(&format!("{prefix}/{name}"), bytes)]);
                server.put("predibase", &[(&format!("{prefix}/{name}"), bytes)]);
            }
        }
        server.url.clone()
    };
    let before = Server::before(&url);
    for (allowed, id, is_allowed) in [
        (&[][..], "s3://allowed/team/a", false),
        (&["s3://allowed"], "s3://allowed/team/a", true),
        (&["s3://allowed/"], "s3://allowed/other/a", true),
        (&["s3://allowed/team"], "s3://allowed/team/a", true),
        (&["s3://allowed/team"], "s3://allowed/team2/a", false),
        (&["s3://allowed/team"], "s3://allowed/nothing", false),
        (&["s3://allowed/team", "s3://allowed/other"], "s3://allowed/other/a", true),
        (&["s3://allowed/team/a"], "s3://allowed/team/a", true),
        (&["s3://allowed"], "s3://predibase/team/a", false),
        (&["s3://allowed"], "gs://allowed/team/a", false),
        (&["gs://allowed"], "gs://allowed/team/a", true),
        (&[], "team/a", false),
        (&["s3://predibase"], "team/a", true),
        (&["s3://predibase/team"], "other/a", false),
    ] {
        let sources = sources(&before.url, allowed);
        before.asked();
        let found = find(&sources, id).await;
        if is_allowed {
            found.unwrap_or_else(|error| panic!("{allowed:?} {id}: {error}"));
        } else {
            let is_denied = matches!(found, Err(SourceError::Denied { reason: Denial::Bucket, .. }));
            assert!(is_denied, "{allowed:?} {id}: {found:?}");
            assert!(before.asked().is_empty(), "{allowed:?} {id}: the bucket was asked");
        }
    }
}

#[tokio::test]
async fn what_is_overwritten_is_another_version() {
    let put = |files: &[(&str, &[u8])]| S3::server().put("versions", files);
    put(&[("a/adapter_config.json", CONFIG), ("a/adapter_model.safetensors", b"weights")]);
    let url = S3::server().url.clone();
    let sources = sources(&url, &["s3://versions"]);
    let id = "s3://versions/a";
    let first = find(&sources, id).await.unwrap();
    assert_eq!(find(&sources, id).await.unwrap(), first);
    assert_eq!(first.bytes, CONFIG.len() as u64 + 7);
    assert!(!first.is_free && first.in_place.is_none());
    let mut versions = vec![first];
    let changes: [(&str, &[u8]); 5] = [
        ("a/adapter_model.safetensors", b"WEIGHTS"),
        ("a/adapter_model.safetensors", b"longer weights"),
        ("a/adapter_config.json", br#"{"r": 9}"#),
        ("a/adapter_model.safetensors", b"shorter"),
        ("a/adapter_config.json", b"{}"),
    ];
    for (key, bytes) in changes {
        put(&[(key, bytes)]);
        let found = find(&sources, id).await.unwrap();
        assert!(versions.iter().all(|known| known.version != found.version), "{key}");
        // What was found before is not there any more.
        let old = fetch(&sources, id, versions.last().unwrap()).await;
        assert!(matches!(old, Err(SourceError::Changed { .. })), "{key}: {old:?}");
        assert!(fetch(&sources, id, &found).await.is_ok());
        versions.push(found);
    }
    S3::server().call(&json!(["delete", "versions", "a/adapter_model.safetensors"]));
    let gone = fetch(&sources, id, versions.last().unwrap()).await;
    assert!(matches!(gone, Err(SourceError::NotFound { .. })), "{gone:?}");
}

/// Large files are uploaded in parts, and have tags of another form.
#[tokio::test]
async fn what_was_uploaded_in_parts_is_fetched() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..(6 << 20) / 4_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(file.path(), &bytes).unwrap();
    let url = {
        let mut server = S3::server();
        server.put("parts", &[("a/adapter_config.json", CONFIG)]);
        server.call(&json!(["upload", "parts", "a/adapter_model.safetensors", file.path()]));
        server.url.clone()
    };
    let sources = sources(&url, &["s3://parts"]);
    let found = find(&sources, "s3://parts/a").await.unwrap();
    let fetched = fetch(&sources, "s3://parts/a", &found).await.unwrap();
    assert!(fetched.read("adapter_model.safetensors") == bytes);
    assert!(fetched.progress.is_sorted() && fetched.progress.last() == Some(&found.bytes));
    assert!(fetched.progress.len() > 3, "told as it goes");
}
