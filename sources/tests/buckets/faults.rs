//! A bucket that is slow, broken, or refuses.

use futures::future::join_all;
use sources::{Denial, SourceError};

use crate::{
    fake::{Fault, On, Server},
    world::{CONFIG, S3, get, impatient, sources, weights},
};

const ID: &str = "s3://faults/a";
/// More often than anybody tries.
const ALWAYS: usize = 1000;

fn filled() -> String {
    let mut server = S3::server();
    server.put("faults", &[("a/adapter_config.json", CONFIG), ("a/adapter_model.safetensors", &weights())]);
    server.url.clone()
}

#[tokio::test]
async fn what_passes_is_tried_again() {
    let url = filled();
    let cases = [
        (On::Api, Fault::Status(500), 1),
        (On::Api, Fault::Status(503), 2),
        (On::Api, Fault::Status(429), 1),
        (On::Api, Fault::Close, 2),
        (On::File, Fault::Status(500), 2),
        (On::File, Fault::Status(503), 1),
        (On::File, Fault::Close, 1),
        (On::File, Fault::Cut(0.5), 1),
        (On::File, Fault::Cut(0.9), 2),
        (On::File, Fault::Cut(0.0), 2),
    ];
    let cases = cases.map(|(on, fault, times)| {
        let server = Server::before(&url);
        server.fail(on, fault.clone(), times);
        (sources(&server.url, &["s3://faults"]), on, fault)
    });
    join_all(cases.map(async |(sources, on, fault)| {
        let fetched = get(&sources, ID).await.unwrap_or_else(|error| panic!("{on:?} {fault:?}: {error}"));
        assert!(fetched.read("adapter_model.safetensors") == weights(), "{on:?} {fault:?}");
        assert_eq!(fetched.read("adapter_config.json"), CONFIG, "{on:?} {fault:?}");
    }))
    .await;
}

#[derive(Debug, PartialEq)]
enum End {
    Unavailable,
    Denied,
    NotFound,
    Changed,
}

#[tokio::test]
async fn what_does_not_pass_is_told_and_nothing_secret_with_it() {
    let url = filled();
    let mut cases = Vec::new();
    for on in [On::Api, On::File] {
        for (fault, expected) in [
            (Fault::Status(500), End::Unavailable),
            (Fault::Status(503), End::Unavailable),
            (Fault::Status(401), End::Denied),
            (Fault::Status(403), End::Denied),
            (Fault::Status(404), End::NotFound),
            (Fault::Status(412), End::Changed),
            (Fault::Status(400), End::Unavailable),
            (Fault::Echo(500), End::Unavailable),
            (Fault::Echo(400), End::Unavailable),
            (Fault::Echo(403), End::Denied),
            (Fault::Silence, End::Unavailable),
            (Fault::Close, End::Unavailable),
            (Fault::Redirect, End::Unavailable),
        ] {
            cases.push((on, fault, expected));
        }
    }
    cases.extend([
        (On::File, Fault::Cut(0.0), End::Unavailable),
        (On::File, Fault::Stall(0.5), End::Unavailable),
        (On::File, Fault::Length(5), End::Changed),
        (On::File, Fault::Length(1 << 62), End::Changed),
    ]);
    let cases: Vec<_> = cases
        .into_iter()
        .map(|(on, fault, expected)| {
            let server = Server::before(&url);
            server.fail(on, fault.clone(), ALWAYS);
            let is_silent = matches!(fault, Fault::Silence | Fault::Stall(_));
            let sources = if is_silent { impatient } else { sources };
            (sources(&server.url, &["s3://faults"]), on, fault, expected)
        })
        .collect();
    join_all(cases.into_iter().map(async |(sources, on, fault, expected)| {
        let error = get(&sources, ID).await.expect_err(&format!("{on:?} {fault:?}"));
        let end = match &error {
            SourceError::Unavailable { .. } => End::Unavailable,
            SourceError::Denied { reason: Denial::Store(_), .. } => End::Denied,
            SourceError::NotFound { .. } => End::NotFound,
            SourceError::Changed { .. } => End::Changed,
            error => panic!("{on:?} {fault:?}: {error}"),
        };
        assert_eq!(end, expected, "{on:?} {fault:?}: {error}");
        for text in [error.to_string(), format!("{error:?}")] {
            let is_clean =
                ["secret-", "AWS4", "Signature", "127.0.0.1"].iter().all(|word| !text.contains(word));
            assert!(is_clean && text.len() < 1000, "{on:?} {fault:?}: {text}");
        }
    }))
    .await;
}

#[tokio::test]
async fn a_bucket_that_is_not_there_is_told() {
    let url = filled();
    for (id, url, cause) in [
        ("s3://no-such-bucket/a", &*url, "does not exist"),
        ("s3://faults/b", &*url, "does not exist"),
        ("s3://faults/a/adapter_config.json", &*url, "does not exist"),
        ("s3://faults/a", "http://127.0.0.1:1", "its bucket cannot be reached"),
        ("s3://faults/a", "nonsense", "the server's settings of its bucket cannot be used"),
    ] {
        let sources = sources(url, &["s3://no-such-bucket", "s3://faults"]);
        let error = get(&sources, id).await.unwrap_err().to_string();
        assert!(error.contains(cause), "{id} {url}: {error}");
    }
}
