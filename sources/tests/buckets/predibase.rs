//! Adapters that Predibase's gateway leads to.

use futures::future::join_all;
use secrecy::SecretString;
use sources::{Denial, Found, Reference, SourceError, Sources};

use crate::{
    fake::{Fault, On, Server},
    world::{CONFIG, S3, sources_with},
};

/// Puts an adapter into a bucket at some prefixes.
fn filled(prefixes: &[&str]) -> String {
    let mut server = S3::server();
    for bucket in ["predibase", "elsewhere"] {
        for prefix in prefixes {
            server.put(bucket, &[(&format!("{prefix}/adapter_config.json"), CONFIG)]);
            server.put(bucket, &[(&format!("{prefix}/adapter_model.safetensors"), prefix.as_bytes())]);
        }
    }
    server.url.clone()
}

/// A gateway that knows one token.
fn gateway() -> Server {
    let gateway = Server::start();
    gateway.know("mine");
    gateway.know("servers");
    gateway
}

async fn find(sources: &Sources, id: &str, token: &str) -> Result<Found, SourceError> {
    let token = (!token.is_empty()).then(|| SecretString::from(token.to_owned()));
    sources.lookup(&Reference::parse("pbase", id).unwrap(), token.as_ref()).await
}

#[tokio::test]
async fn the_gateway_says_where_an_adapter_is() {
    let url = filled(&["a/3", "u1/r1/artifacts/model/model_weights", "u2/r2/artifacts/model/model_weights"]);
    let gateway = gateway();
    for (target, text) in [
        ("/v2/repos/sql/version/3", r#"{"adapterPath": "a/3"}"#),
        ("/v2/repos/slash/version/3", r#"{"adapterPath": "a/3/"}"#),
        ("/v2/repos/whole/version/3", r#"{"adapterPath": "s3://predibase/a/3", "more": 1}"#),
        ("/v2/repos/other/version/3", r#"{"adapterPath": "s3://elsewhere/a/3"}"#),
        ("/v2/repos/cloud/version/3", r#"{"adapterPath": "gs://predibase/a/3"}"#),
        ("/v2/repos/early/version/3", r#"{"adapterPath": null}"#),
        ("/v2/repos/gone/version/3", r#"{"adapterPath": "a/4"}"#),
        ("/v2/repos/out/version/3", r#"{"adapterPath": "a/../../b"}"#),
        ("/v2/repos/empty/version/3", r#"{"adapterPath": ""}"#),
        ("/v2/repos/text/version/3", "nonsense"),
        ("/v1/models/version/name/old", r#"{"uuid": "u1", "bestRunID": "r1"}"#),
        ("/v1/models/version/name/old?version=2", r#"{"uuid": "u2", "bestRunID": "r2"}"#),
        ("/v1/models/version/name/bad", r#"{"uuid": "../..", "bestRunID": "r1"}"#),
    ] {
        gateway.page(target, text);
    }
    let more = [("PREDIBASE_GATEWAY_ENDPOINT", &*gateway.url)];
    let sources = sources_with(&url, &[], &more);
    for (id, expected) in [
        ("sql/3", Ok("a/3")),
        ("slash/3", Ok("a/3")),
        ("whole/3", Ok("a/3")),
        ("old", Ok("u1/r1/artifacts/model/model_weights")),
        ("old/2", Ok("u2/r2/artifacts/model/model_weights")),
        ("other/3", Err("is outside of the buckets")),
        ("cloud/3", Err("is outside of the buckets")),
        ("early/3", Err("does not exist: it has no files yet")),
        ("gone/3", Err("does not exist")),
        ("sql/4", Err("does not exist")),
        ("sql", Err("does not exist")),
        ("out/3", Err("does not answer with a path")),
        ("empty/3", Err("does not answer with a path")),
        ("text/3", Err("answers what it should not")),
        ("bad", Err("does not answer with a path")),
    ] {
        match (find(&sources, id, "mine").await, expected) {
            (Ok(found), Ok(prefix)) => assert_eq!(found.files[1].bytes, prefix.len() as u64, "{id}"),
            (Err(error), Err(cause)) => assert!(error.to_string().contains(cause), "{id}: {error}"),
            (found, _) => panic!("{id}: {found:?}"),
        }
    }
    // What the operator allows may be named by Predibase, too.
    let sources = sources_with(&url, &["s3://elsewhere/a"], &more);
    assert!(find(&sources, "other/3", "mine").await.is_ok());
    let folder = tempfile::tempdir().unwrap();
    let into = sources::Destination { folder: folder.path(), max_bytes: 1000, progress: &|_| () };
    let (name, token) = (Reference::parse("pbase", "sql/3").unwrap(), SecretString::from("mine".to_owned()));
    let found = sources.lookup(&name, Some(&token)).await.unwrap();
    sources.fetch(&name, &found, Some(&token), into).await.unwrap();
    assert_eq!(std::fs::read(folder.path().join("adapter_model.safetensors")).unwrap(), b"a/3");
}

#[tokio::test]
async fn the_gateway_decides_who_may_read() {
    let url = filled(&["b/1"]);
    let gateway = gateway();
    gateway.page("/v2/repos/sql/version/1", r#"{"adapterPath": "b/1"}"#);
    for (token, servers, bucket, expected) in [
        ("mine", "", "predibase", ""),
        ("mine", "servers", "predibase", ""),
        ("", "servers", "predibase", ""),
        ("unknown", "servers", "predibase", "Predibase refuses it"),
        ("unknown", "", "predibase", "Predibase refuses it"),
        ("", "unknown", "predibase", "Predibase refuses it"),
        ("", "", "predibase", "needs an api_token, or PREDIBASE_API_TOKEN"),
        ("no\ntoken", "", "predibase", "it is not a token of Predibase"),
        ("n\u{f6}", "servers", "predibase", "it is not a token of Predibase"),
        ("mine", "", "", "needs PREDIBASE_MODEL_BUCKET"),
    ] {
        let more = [
            ("PREDIBASE_GATEWAY_ENDPOINT", &*gateway.url),
            ("PREDIBASE_API_TOKEN", servers),
            ("PREDIBASE_MODEL_BUCKET", bucket),
        ];
        gateway.asked();
        let found = find(&sources_with(&url, &[], &more), "sql/1", token).await;
        let asked = gateway.asked();
        let sent = if token.is_empty() { servers } else { token };
        assert!(asked.iter().all(|asked| asked.token() == Some(sent)), "{token} {servers}: {asked:?}");
        match found {
            Ok(_) => assert!(expected.is_empty(), "{token} {servers}"),
            Err(error) => {
                let text = error.to_string();
                assert!(!expected.is_empty() && text.contains(expected), "{token} {servers}: {text}");
            }
        }
    }
}

#[tokio::test]
async fn a_gateway_in_trouble_is_told_and_nothing_secret_with_it() {
    let url = filled(&["c/1"]);
    let elsewhere = Server::start();
    let cases = [
        (Fault::Status(500), 1000, "answers with status code 500"),
        (Fault::Status(429), 1000, "answers with status code 429"),
        (Fault::Status(403), 1000, "Predibase refuses it"),
        (Fault::Status(400), 1000, "answers with status code 400"),
        (Fault::Echo(401), 1000, "Predibase refuses it"),
        (Fault::Echo(502), 1000, "answers with status code 502"),
        (Fault::Close, 1000, "cannot be reached"),
        (Fault::Cut(0.5), 1000, "cannot be reached"),
        (Fault::Text("{}".into()), 1000, "does not exist"),
        (Fault::Text("[".repeat(100_000)), 1000, "answers what it should not"),
        (Fault::Text("x".repeat(2 << 20)), 1000, "answers what it should not"),
        (Fault::RedirectTo(elsewhere.url.clone()), 1000, "answers with status code 302"),
        (Fault::Redirect, 1000, "answers with status code 302"),
        (Fault::Status(503), 2, ""),
        (Fault::Close, 3, ""),
    ];
    let cases = cases.map(|(fault, times, expected)| {
        let gateway = Server::start();
        gateway.know("secret-token");
        gateway.page("/v2/repos/sql/version/1", r#"{"adapterPath": "c/1"}"#);
        gateway.fail(On::File, fault.clone(), times);
        let more = [("PREDIBASE_GATEWAY_ENDPOINT", &*gateway.url)];
        (sources_with(&url, &[], &more), fault, expected)
    });
    join_all(cases.map(
        async |(sources, fault, expected)| match find(&sources, "sql/1", "secret-token").await {
            Ok(_) => assert!(expected.is_empty(), "{fault:?}"),
            Err(error) => {
                let text = format!("{error} {error:?}");
                assert!(!expected.is_empty() && text.contains(expected), "{fault:?}: {error}");
                assert!(!text.contains("secret-"), "{text}");
                let is_denied = matches!(error, SourceError::Denied { reason: Denial::Credential(_), .. });
                assert_eq!(is_denied, expected.contains("refuses"), "{text}");
            }
        },
    ))
    .await;
    assert!(elsewhere.asked().is_empty(), "a redirect is not followed with a token");
}
