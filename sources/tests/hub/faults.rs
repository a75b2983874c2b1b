//! A hub that is slow, broken, or somebody else's.

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::future::join_all;
use sources::{Destination, SourceError};
use tokio::time::{Instant, timeout};
use tracing_subscriber::fmt::MakeWriter;

use crate::{
    fake::{Fault, On, Server},
    world::{CONFIG, ID, get, impatient, names, of, reference, repository, secret, weights},
};

/// More often than anybody tries.
const ALWAYS: usize = 1000;

#[tokio::test]
async fn what_passes_is_tried_again() {
    let half = weights().len() / 2;
    let cases = [
        (On::Api, Fault::Status(500), 1, vec![]),
        (On::Api, Fault::Status(503), 2, vec![]),
        (On::Api, Fault::Status(429), 1, vec![]),
        (On::Api, Fault::Close, 2, vec![]),
        (On::Api, Fault::Cut(0.5), 1, vec![]),
        (On::File, Fault::Status(502), 2, vec![]),
        (On::File, Fault::Close, 1, vec![]),
        (On::File, Fault::Cut(0.5), 1, vec![]),
        (On::Storage, Fault::Status(503), 2, vec![]),
        (On::Storage, Fault::Close, 3, vec![]),
        (On::Storage, Fault::Cut(0.5), 1, vec![half]),
        (On::Storage, Fault::Cut(0.5), 2, vec![half, half + (weights().len() - half) / 2]),
        (On::Storage, Fault::Cut(0.0), 2, vec![]),
        (On::Storage, Fault::Length(200_000), 1, vec![]),
        (On::Storage, Fault::NoLength(0.5), 1, vec![]),
        (On::Storage, Fault::NoLength(1.0), 1, vec![]),
        (On::Storage, Fault::Twice, 1, vec![]),
        (On::Storage, Fault::Length(10), 2, vec![]),
    ];
    let cases = cases.map(|(on, fault, times, resumed)| {
        let server = Server::with(ID, repository());
        server.fail(on, fault.clone(), times);
        (of(&server), server, (on, fault, resumed))
    });
    join_all(cases.map(async |(sources, server, (on, fault, resumed))| {
        let fetched = get(&sources, ID, "").await;
        let fetched = fetched.unwrap_or_else(|error| panic!("{on:?} {fault:?}: {error}"));
        assert_eq!(fetched.read("adapter_model.safetensors"), weights(), "{on:?} {fault:?}");
        assert_eq!(fetched.read("adapter_config.json"), CONFIG, "{on:?} {fault:?}");
        assert_eq!(fetched.names().len(), 2, "{on:?} {fault:?}");
        let asked = server.asked();
        let from: Vec<_> = asked
            .iter()
            .filter(|asked| asked.query.contains("Sig"))
            .filter_map(|asked| asked.from())
            .collect();
        assert!(from == resumed || resumed.is_empty(), "{on:?} {fault:?}: {from:?}");
    }))
    .await;
}

/// The storage sends the whole file when the rest of it is asked for.
#[tokio::test]
async fn a_storage_without_ranges_starts_again() {
    let server = Server::with(ID, repository());
    server.fail(On::Storage, Fault::Cut(0.3), 1);
    server.fail(On::Storage, Fault::NoRanges, 1);
    assert_eq!(get(&of(&server), ID, "").await.unwrap().read("adapter_model.safetensors"), weights());
    // Nor does it help if it has forgotten that there was more.
    server.fail(On::Storage, Fault::Cut(0.3), 1);
    server.fail(On::Storage, Fault::Status(416), 1);
    assert_eq!(get(&of(&server), ID, "").await.unwrap().read("adapter_model.safetensors"), weights());
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Unavailable,
    Invalid,
    Changed,
    NotFound,
    Denied,
    TooLarge,
}

fn end(error: &SourceError) -> End {
    match error {
        SourceError::Unavailable { .. } => End::Unavailable,
        SourceError::Invalid { .. } => End::Invalid,
        SourceError::Changed { .. } => End::Changed,
        SourceError::NotFound { .. } => End::NotFound,
        SourceError::Denied { .. } => End::Denied,
        SourceError::TooLarge { .. } => End::TooLarge,
        error => panic!("{error}"),
    }
}

/// What is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(text)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Log;

    fn make_writer(&self) -> Log {
        self.clone()
    }
}

/// Each kind of fault on each kind of question, for good, with an error that names no secret.
fn lasting() -> Vec<(On, Fault, End)> {
    let elsewhere = |to: &str| Fault::RedirectTo(to.into());
    let text = |text: &str| Fault::Text(text.into());
    let mut cases = Vec::new();
    for on in [On::Api, On::File, On::Storage] {
        cases.extend([
            (on, Fault::Status(500), End::Unavailable),
            (on, Fault::Status(503), End::Unavailable),
            (on, Fault::Status(429), End::Unavailable),
            (on, Fault::Status(403), End::Denied),
            (on, Fault::Status(401), End::NotFound),
            (on, Fault::Status(404), End::NotFound),
            (on, Fault::Status(400), End::Invalid),
            (on, Fault::Status(302), End::Invalid),
            (on, Fault::Echo(500), End::Unavailable),
            (on, Fault::Echo(403), End::Denied),
            (on, Fault::Echo(418), End::Invalid),
            (on, Fault::Silence, End::Unavailable),
            (on, Fault::Close, End::Unavailable),
            (on, Fault::Stall(0.5), End::Unavailable),
            (on, Fault::Cut(0.0), End::Unavailable),
            (on, Fault::Length(1 << 62), End::Unavailable),
            (on, Fault::Redirect, End::Invalid),
            (on, elsewhere("http://127.0.0.1:1/?X-Amz-Signature=secret-signature"), End::Unavailable),
            (on, elsewhere("file:///etc/passwd"), End::Invalid),
            (on, elsewhere("ftp://mine:secret-password@host/"), End::Invalid),
            (on, elsewhere("http://"), End::Invalid),
            (on, elsewhere("javascript:secret-signature"), End::Invalid),
        ]);
    }
    for answer in ["", "nonsense", "[]", "{}", r#"{"sha": "c"}"#, r#"{"sha": 7, "siblings": []}"#] {
        cases.push((On::Api, text(answer), End::Invalid));
    }
    for name in ["../x", "/etc/passwd", "", "a/../../b"] {
        let names = format!(r#"{{"sha": "c0", "siblings": [{{"rfilename": "{name}"}}]}}"#);
        cases.push((On::Api, Fault::Text(names), End::Invalid));
        cases.push((On::Api, Fault::Text(format!(r#"{{"sha": "{name}", "siblings": []}}"#)), End::Invalid));
    }
    let huge = r#"{"sha": "c0", "gated": false, "siblings": [{"rfilename": "adapter_config.json", "size": 5},
                   {"rfilename": "adapter_model.bin", "size": 18446744073709551615}]}"#;
    cases.push((On::Api, text(huge), End::TooLarge));
    cases.extend([
        (On::File, Fault::OtherCommit, End::Changed),
        (On::File, Fault::OtherHash, End::Changed),
        (On::Storage, Fault::Twice, End::Unavailable),
        (On::Storage, Fault::Length(5), End::Unavailable),
        (On::Storage, Fault::NoLength(0.9), End::Unavailable),
    ]);
    cases
}

#[tokio::test]
async fn what_does_not_pass_is_told_and_nothing_secret_with_it() {
    // Making a client takes long enough to let the others run into their time-outs.
    let cases: Vec<_> = lasting()
        .into_iter()
        .map(|(on, fault, expected)| {
            let server = Server::with(ID, repository().readable_by(&["secret-token"]));
            server.fail(on, fault.clone(), ALWAYS);
            let is_silent = matches!(fault, Fault::Silence | Fault::Stall(_));
            (if is_silent { impatient(&server) } else { of(&server) }, on, fault, expected)
        })
        .collect();
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(log.clone());
    let _guard = tracing::subscriber::set_default(subscriber.finish());
    let began = Instant::now();
    join_all(cases.into_iter().map(async |(sources, on, fault, expected)| {
        let found = sources.lookup(&reference(ID), secret("secret-token").as_ref()).await;
        let error = match found {
            Err(error) => error,
            Ok(found) => {
                let fetched = crate::world::fetch(&sources, ID, &found, "secret-token", 1 << 30).await;
                fetched.expect_err(&format!("{on:?} {fault:?}"))
            }
        };
        assert_eq!(end(&error), expected, "{on:?} {fault:?}: {error}");
        for text in [error.to_string(), format!("{error:?}"), format!("{error:#?}")] {
            assert!(!text.contains("secret-") && text.len() < 2000, "{on:?} {fault:?}: {text}");
        }
    }))
    .await;
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "each fault is found out within the time-outs and retries"
    );
}

/// One that sends a byte now and then is not silent. It goes on for as long as the caller lets it, and tells how far it
/// is; nothing goes on after the caller has left.
#[tokio::test]
async fn a_drip_ends_when_the_caller_leaves() {
    let server = Server::with(ID, repository());
    let sources = of(&server);
    let found = sources.lookup(&reference(ID), None).await.unwrap();
    server.fail(On::Storage, Fault::Drip, ALWAYS);
    let folder = tempfile::tempdir().unwrap();
    let progress = Mutex::new(0);
    let (came, arrived) = tokio::sync::watch::channel(0);
    let told = |bytes| {
        *progress.lock().unwrap() = bytes;
        came.send_replace(bytes);
    };
    let into = Destination { folder: folder.path(), max_bytes: u64::MAX, progress: &told };
    let name = reference(ID);
    let fetching = sources.fetch(&name, &found, None, into);
    let (mut arrived, some) = (arrived, CONFIG.len() as u64 + 5);
    let left = async {
        arrived.wait_for(|bytes| *bytes >= some).await.unwrap();
    };
    tokio::select! {
        fetched = fetching => panic!("{fetched:?}"),
        left = timeout(Duration::from_secs(10), left) => left.unwrap(),
    }
    let last = *progress.lock().unwrap();
    assert!((some..found.bytes).contains(&last), "{last}");
    // Another repository is not held up.
    server.put("org/other", repository());
    server.recover();
    assert!(get(&sources, "org/other", "").await.is_ok());
    assert_eq!(*progress.lock().unwrap(), last);
    assert_eq!(names(folder.path()).len(), 2, "what had come");
}

/// A description that takes too long as a whole is given up, however it trickles.
#[tokio::test]
async fn a_description_has_a_deadline() {
    let server = Server::with(ID, repository());
    server.fail(On::Api, Fault::Drip, ALWAYS);
    let began = Instant::now();
    let error = impatient(&server).lookup(&reference(ID), None).await.unwrap_err();
    assert_eq!(end(&error), End::Unavailable, "{error}");
    assert!(error.to_string().contains("HF_HUB_ETAG_TIMEOUT"), "{error}");
    // A description has hundreds of bytes, of which fifty come in a second.
    assert!(began.elapsed() < Duration::from_secs(10));
}
