//! Adapters of buckets, and of Predibase, whose gateway leads to one: requests name them, and who may not read them is
//! refused.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use config::Config;
use futures::future::join_all;
use serde_json::{Value, json};
use sources::{BucketSettings, SourceSettings};
use tokio::{task::spawn_blocking, time::timeout};

use crate::{
    exchange::at_rest,
    fake::{Fault, On, Server},
    router::{FILES, PATIENCE, Router, tokens},
    s3::S3,
    shard::Script,
};

/// What requests may name: a bucket, and a prefix in another one.
const ALLOWED: [&str; 2] = ["s3://open", "s3://team/a"];

/// Puts an adapter below a prefix of a bucket.
fn put(server: &mut S3, bucket: &str, prefix: &str, weights: &[u8]) {
    let [config, file] = FILES.map(|file| format!("{prefix}/{file}"));
    server.put(bucket, &[(&config, b"{\"r\": 8}"), (&file, weights)]);
}

/// Starts an S3 server, away from the threads that serve.
async fn server(fill: impl FnOnce(&mut S3) + Send + 'static) -> S3 {
    let started = spawn_blocking(|| {
        let mut server = S3::start();
        fill(&mut server);
        server
    });
    started.await.unwrap()
}

/// A router that reads buckets at an address, and asks a gateway of Predibase's.
async fn router(url: &str, gateway: &str, change: impl FnOnce(&mut Config)) -> Router {
    let variables = [
        ("S3_ENDPOINT_URL", url),
        ("AWS_ACCESS_KEY_ID", "secret-id"),
        ("AWS_SECRET_ACCESS_KEY", "secret-key"),
        ("PREDIBASE_GATEWAY_ENDPOINT", gateway),
        ("PREDIBASE_MODEL_BUCKET", "predibase"),
    ];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let (answer, bytes) = (PATIENCE, PATIENCE);
    let buckets =
        BucketSettings { allowed: Vec::new(), variables: variables.into_iter().collect(), answer, bytes };
    let sources = SourceSettings { buckets, ..SourceSettings::from_env(None, Vec::new()) };
    let sources = sources.with_buckets(&ALLOWED.map(str::to_owned)).unwrap();
    let folder = Arc::new(tempfile::tempdir().unwrap());
    Router::start_at(Script::saying(tokens("a").repeat(20)), sources, folder, change).await
}

fn generate(id: &str, source: Option<&str>, token: Option<&str>) -> Value {
    json!({"inputs": "x", "parameters":
        {"adapter_id": id, "adapter_source": source, "api_token": token, "max_new_tokens": 1}})
}

fn complete(id: &str, source: Option<&str>, token: Option<&str>) -> Value {
    json!({"model": id, "adapter_source": source, "api_token": token, "prompt": "x", "max_tokens": 1})
}

/// The different contents that have been staged.
async fn contents(router: &Router) -> usize {
    let contents = |seen: &crate::shard::Seen| {
        seen.staged.iter().map(|asked| asked.content.clone()).collect::<BTreeSet<_>>()
    };
    router.shard.saw(|seen| Some(contents(seen).len())).await
}

/// Sends a request on LoRAX's and on OpenAI's route, and returns the statuses, the latter's code, and both bodies.
async fn refused(
    router: &Router,
    id: &str,
    source: Option<&str>,
    token: Option<&str>,
) -> (u16, u16, String, String) {
    let lorax = timeout(PATIENCE, router.post("/generate", &generate(id, source, token))).await.unwrap();
    let openai =
        timeout(PATIENCE, router.post("/v1/completions", &complete(id, source, token))).await.unwrap();
    let code = openai.1["error"]["code"].as_str().unwrap_or_default().to_owned();
    (lorax.0.as_u16(), openai.0.as_u16(), code, format!("{} {}", lorax.1, openai.1))
}

#[tokio::test]
async fn an_adapter_of_a_bucket_is_served_by_its_address_and_others_are_refused() {
    let server = server(|server| {
        put(server, "open", "sql", b"weights of sql");
        put(server, "open", "deep/er/law", b"weights of law");
        put(server, "team", "a/tax", b"weights of tax");
        put(server, "team", "ab/tax", b"not for you");
        put(server, "team", "b", b"not for you");
        put(server, "open", "large", &[7; 3000]);
        server
            .put("open", &[("bare/adapter_config.json", b"{}"), ("weights/adapter_model.safetensors", b"x")]);
        put(server, "predibase", "own", b"of predibase");
    })
    .await;
    let small = |config: &mut Config| config.router.max_adapter_size = Some(2000);
    let router = router(&server.url, "http://127.0.0.1:9", small).await;
    for id in ["s3://open/sql", "s3://open/deep/er/law", "s3://team/a/tax"] {
        for _ in 0..2 {
            assert_eq!(
                router.ok("/generate", &generate(id, None, None)).await["generated_text"],
                "a",
                "{id}"
            );
            router.ok("/generate", &generate(id, Some("s3"), None)).await;
            router.ok("/v1/completions", &complete(id, None, None)).await;
            let chat = json!({"model": id, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1});
            router.ok("/v1/chat/completions", &chat).await;
        }
    }
    assert_eq!(contents(&router).await, 3);
    let staged = router.shard.saw(|seen| Some(seen.staged.len())).await;
    let cases = [
        ("s3://open/none", 404, 404, "model_not_found"),
        ("s3://open/sq", 404, 404, "model_not_found"),
        ("s3://open/bare", 422, 400, "adapter_invalid"),
        ("s3://open/weights", 422, 400, "adapter_invalid"),
        ("s3://team/a/none", 404, 404, "model_not_found"),
        ("s3://team/ab/tax", 424, 403, "adapter_forbidden"),
        ("s3://team/b", 424, 403, "adapter_forbidden"),
        ("s3://none/sql", 424, 403, "adapter_forbidden"),
        ("s3://predibase/own", 424, 403, "adapter_forbidden"),
        ("gs://open/sql", 424, 403, "adapter_forbidden"),
        ("s3://open/large", 424, 424, "adapter_unavailable"),
        ("s3://", 422, 400, "adapter_invalid"),
        ("s3://open/../team/b", 422, 400, "adapter_invalid"),
        ("s3://open//sql", 422, 400, "adapter_invalid"),
    ];
    let answers = join_all(cases.map(async |(id, ..)| refused(&router, id, None, None).await)).await;
    for ((id, lorax, openai, code), answer) in cases.into_iter().zip(answers) {
        assert_eq!((answer.0, answer.1, &*answer.2), (lorax, openai, code), "{id}: {}", answer.3);
        assert!(!answer.3.contains("secret-"), "{}", answer.3);
    }
    assert_eq!(router.shard.saw(|seen| Some(seen.staged.len())).await, staged, "nothing of them is read");
    at_rest(&router).await;
}

#[tokio::test]
async fn a_bucket_that_refuses_the_servers_credentials_is_told_and_delays_nobody() {
    let s3 = server(|server| {
        ["one", "two", "good"].iter().for_each(|name| put(server, "open", name, name.as_bytes()));
    })
    .await;
    for (fault, lorax, openai, code) in [
        (Fault::Status(403), 424, 403, "adapter_forbidden"),
        (Fault::Status(401), 424, 403, "adapter_forbidden"),
        (Fault::Echo(403), 424, 403, "adapter_forbidden"),
        (Fault::Status(404), 404, 404, "model_not_found"),
        (Fault::Status(400), 424, 424, "adapter_unavailable"),
    ] {
        let front = Server::before(&s3.url);
        let router = router(&front.url, "http://127.0.0.1:9", |_| {}).await;
        front.fail(On::File, fault.clone(), 1000);
        let answer = refused(&router, "s3://open/one", None, None).await;
        assert_eq!((answer.0, answer.1, &*answer.2), (lorax, openai, code), "{fault:?}: {}", answer.3);
        assert!(!answer.3.contains("secret-"), "{fault:?}: {}", answer.3);
        router.ok("/generate", &generate("sql", Some("local"), None)).await;
        front.recover();
        router.ok("/generate", &generate("s3://open/two", None, None)).await;
        assert_eq!(contents(&router).await, 2, "{fault:?}");
        at_rest(&router).await;
    }
}

#[tokio::test]
async fn an_object_that_is_overwritten_is_another_adapter() {
    let mut s3 = server(|server| put(server, "open", "sql", &[0; 500])).await;
    let always = |config: &mut Config| config.router.adapter_auth_ttl_s = Duration::ZERO;
    let router = router(&s3.url, "http://127.0.0.1:9", always).await;
    let body = generate("s3://open/sql", None, None);
    router.ok("/generate", &body).await;
    for change in 1..=10_usize {
        // The same size and others; every third time only the configuration changes.
        let weights = vec![change as u8; if change.is_multiple_of(2) { 500 } else { 500 + change }];
        s3 = spawn_blocking(move || {
            if change.is_multiple_of(3) {
                let config = format!("{{\"r\": {change}}}");
                s3.put("open", &[("sql/adapter_config.json", config.as_bytes())]);
            } else {
                put(&mut s3, "open", "sql", &weights);
            }
            s3
        })
        .await
        .unwrap();
        router.ok("/generate", &body).await;
        router.ok("/generate", &body).await;
        assert_eq!(contents(&router).await, change + 1, "change {change}");
    }
    at_rest(&router).await;
}

#[tokio::test]
async fn predibase_says_who_may_read_what() {
    let s3 = server(|server| {
        ["r/1", "r/2", "other/1"]
            .iter()
            .for_each(|prefix| put(server, "predibase", prefix, prefix.as_bytes()));
    })
    .await;
    let gateway = Server::start();
    ["hush-mine", "hush-theirs"].iter().for_each(|token| gateway.know(token));
    gateway.page("/v2/repos/sql/version/1", r#"{"adapterPath": "r/1"}"#);
    gateway.page("/v2/repos/sql/version/2", r#"{"adapterPath": "r/2"}"#);
    gateway.page("/v2/repos/early/version/1", r#"{"adapterPath": null}"#);
    gateway.page("/v2/repos/gone/version/1", r#"{"adapterPath": "r/9"}"#);
    gateway.page("/v2/repos/out/version/1", r#"{"adapterPath": "s3://elsewhere/r/1"}"#);
    gateway.page("/v2/repos/text/version/1", "nonsense");
    let router = router(&s3.url, &gateway.url, |_| {}).await;
    let pbase = Some("pbase");
    for token in ["hush-mine", "hush-theirs"] {
        for id in ["sql/1", "sql/2"] {
            router.ok("/generate", &generate(id, pbase, Some(token))).await;
            router.ok("/generate", &generate(&format!("pbase://{id}"), None, Some(token))).await;
            router.ok("/v1/completions", &complete(id, pbase, Some(token))).await;
        }
    }
    assert_eq!(contents(&router).await, 2);
    // Whatever is here already.
    for (id, token, lorax, openai, code) in [
        ("sql/1", Some("hush-wrong"), 424, 403, "adapter_forbidden"),
        ("sql/2", Some("hush-wrong"), 424, 403, "adapter_forbidden"),
        ("sql/1", None, 422, 400, "adapter_invalid"),
        ("sql/1", Some("hush\nmine"), 424, 403, "adapter_forbidden"),
        ("sql/3", Some("hush-mine"), 404, 404, "model_not_found"),
        ("none/1", Some("hush-mine"), 404, 404, "model_not_found"),
        ("early/1", Some("hush-mine"), 404, 404, "model_not_found"),
        ("gone/1", Some("hush-mine"), 404, 404, "model_not_found"),
        ("out/1", Some("hush-mine"), 424, 403, "adapter_forbidden"),
        ("text/1", Some("hush-mine"), 422, 400, "adapter_invalid"),
        ("../sql/1", Some("hush-mine"), 422, 400, "adapter_invalid"),
    ] {
        let answer = refused(&router, id, pbase, token).await;
        assert_eq!((answer.0, answer.1, &*answer.2), (lorax, openai, code), "{id} {token:?}: {}", answer.3);
        assert!(!answer.3.contains("hush") && !answer.3.contains("secret-"), "{}", answer.3);
    }
    router.ok("/generate", &generate("sql/1", pbase, Some("hush-mine"))).await;
    at_rest(&router).await;
}
