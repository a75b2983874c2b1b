//! Models in buckets, and where models may come from.

use std::{fs, net::TcpListener, path::Path};

use serde_json::{Value, json};

use crate::{launcher::Launcher, s3::S3};

fn launcher(server: &S3, id: &str) -> Launcher {
    Launcher::new()
        .env("S3_ENDPOINT_URL", &server.url)
        .env("AWS_ACCESS_KEY_ID", "secret-id")
        .env("AWS_SECRET_ACCESS_KEY", "secret-key")
        .env("MODEL_ID", id)
}

/// A server with models of all kinds.
fn filled() -> S3 {
    let mut server = S3::start();
    let index = json!({"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}).to_string();
    for (key, text) in [
        ("whole/config.json", "{}"),
        ("whole/tokenizer.json", "tokenizer"),
        ("whole/model.safetensors", "weights"),
        ("whole/README.md", "not needed"),
        ("whole/additional_chat_templates/a.jinja", "template"),
        ("whole2/config.json", "{}"),
        ("sharded/config.json", "{}"),
        ("sharded/model.safetensors.index.json", &index),
        ("sharded/x-1.safetensors", "1"),
        ("sharded/x-2.safetensors", "2"),
        ("broken/config.json", "{}"),
        ("broken/model.safetensors.index.json", &index),
        ("broken/x-1.safetensors", "1"),
        ("unconfigured/model.safetensors", "weights"),
        ("one/m.gguf", "one"),
        ("several/m-Q8_0.gguf", "several"),
        ("several/m-Q4_0.gguf", "other"),
        ("split/m-00001-of-00002.gguf", "1"),
        ("split/m-00002-of-00002.gguf", "2"),
        ("nothing/README.md", "no model"),
    ] {
        server.put("models", &[(key, text.as_bytes())]);
    }
    server
}

fn read(model: &Value, file: &str) -> Option<String> {
    fs::read_to_string(Path::new(model["path"].as_str().unwrap()).join(file)).ok()
}

#[test]
fn models_are_fetched_from_buckets_once() {
    let mut server = filled();
    let gone = TcpListener::bind("127.0.0.1:0").unwrap();
    gone.set_nonblocking(true).unwrap();
    let nobody = format!("http://{}", gone.local_addr().unwrap());
    for (id, files) in [
        (
            "s3://models/whole",
            &[
                ("config.json", "{}"),
                ("model.safetensors", "weights"),
                ("additional_chat_templates/a.jinja", "template"),
            ][..],
        ),
        ("s3://models/whole/", &[("tokenizer.json", "tokenizer")]),
        ("s3://models/sharded", &[("x-1.safetensors", "1"), ("x-2.safetensors", "2")]),
        ("s3://models/one", &[("../m.gguf", "one")]),
        ("s3://models/one/m.gguf", &[("../m.gguf", "one")]),
        ("s3://models/several/m-Q8_0.gguf", &[("../m-Q8_0.gguf", "several")]),
        ("s3://models/split", &[("../m-00001-of-00002.gguf", "1"), ("../m-00002-of-00002.gguf", "2")]),
        ("s3://models/split/m-00001-of-00002.gguf", &[("../m-00002-of-00002.gguf", "2")]),
    ] {
        let mut launcher = launcher(&server, id);
        let model = launcher.configuration()["model"].clone();
        assert_eq!(model["id"], id);
        for (file, text) in files {
            let path = Path::new(model["path"].as_str().unwrap());
            let path = file.strip_prefix("../").map_or(path.join(file), |file| path.with_file_name(file));
            assert_eq!(fs::read_to_string(&path).unwrap(), *text, "{id} {file}");
        }
        assert_eq!(read(&model, "README.md"), None, "{id}");
        assert_eq!(launcher.configuration()["model"], model, "{id}");
        let mut offline = launcher.env("HF_HUB_OFFLINE", "1").env("S3_ENDPOINT_URL", &server.url);
        assert_eq!(offline.configuration()["model"], model, "{id}");
    }
    // What is not there any more, or cannot be reached, is served from the cache.
    let mut launcher = launcher(&server, "s3://models/whole");
    let before = launcher.configuration()["model"].clone();
    server.put("models", &[("whole/model.safetensors", b"WEIGHTS")]);
    let after = launcher.configuration()["model"].clone();
    assert_ne!(after["path"], before["path"]);
    assert_eq!(read(&after, "model.safetensors").as_deref(), Some("WEIGHTS"));
    assert_eq!(read(&before, "model.safetensors").as_deref(), Some("weights"), "whoever reads it goes on");
    let url = server.url.clone();
    drop(server);
    let mut running = launcher.start();
    let lines = running.until("router up");
    assert!(lines.iter().any(|line| line.contains("using what is in the cache")), "{lines:#?}");
    running.signal("-TERM");
    running.ended();
    let (status, log) = launcher.env("MODEL_ID", "s3://models/one").fails();
    assert!(status == 1 && log.contains("its bucket cannot be reached"), "{url} {log}");
    let offline = Launcher::new().env("S3_ENDPOINT_URL", &nobody).env("HF_HUB_OFFLINE", "1");
    let (status, log) = offline.env("MODEL_ID", "s3://models/one").fails();
    assert!(status == 64 && log.contains("is not in the cache, and HF_HUB_OFFLINE is set"), "{log}");
    assert!(gone.accept().is_err(), "a connection was made");
}

#[test]
fn what_is_no_model_in_a_bucket_is_refused() {
    let server = filled();
    for (id, cause) in [
        ("s3://models/nothing", "has neither safetensors"),
        ("s3://models/absent", "there is nothing by this name in its bucket"),
        ("s3://models/whol", "there is nothing by this name in its bucket"),
        ("s3://no-such-bucket/whole", "there is nothing by this name in its bucket"),
        ("s3://models/unconfigured", "has no file \"config.json\""),
        ("s3://models/broken", "has no file \"x-2.safetensors\""),
        ("s3://models/several", "has several GGUF files"),
        ("s3://models/several/m-Q5_0.gguf", "has 0 GGUF files that \"m-Q5_0.gguf\" names"),
        ("s3://models", "neither a path that exists nor a hub id"),
        ("s3://models/../models/whole", "neither a path that exists nor a hub id"),
        ("s3://", "neither a path that exists nor a hub id"),
    ] {
        let (status, log) = launcher(&server, id).fails();
        assert!(status == 64 && log.contains(cause), "{id}: {log}");
        assert!(!log.contains("secret-"), "{id}: {log}");
    }
}

#[test]
fn a_source_is_named() {
    let server = filled();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    let path = folder.path().to_str().unwrap();
    for (source, id, expected) in [
        ("local", path, Ok(())),
        ("hub", path, Ok(())),
        ("s3", "s3://models/whole", Ok(())),
        ("hub", "s3://models/whole", Ok(())),
        ("local", "s3://models/whole", Ok(())),
        ("s3", "whole", Ok(())),
        ("local", "org/name", Err("neither a path that exists nor a hub id")),
        ("local", "/no/such/path", Err("neither a path that exists nor a hub id")),
        ("s3", path, Err("neither a path that exists nor a hub id")),
        ("pbase", "repo/3", Err("models do not come from the source \"pbase\"")),
        ("ftp", "whole", Err("adapter source \"ftp\" is not supported")),
        ("", "whole", Err("is not supported")),
    ] {
        let launcher = launcher(&server, id).env("PREDIBASE_MODEL_BUCKET", "models");
        let mut launcher = launcher.args(&["--source", source]);
        match expected {
            Ok(()) => drop(launcher.configuration()),
            Err(cause) => {
                let (status, log) = launcher.failure();
                assert!(status == 64 && log.contains(cause), "{source} {id}: {log}");
            }
        }
    }
}
