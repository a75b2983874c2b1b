//! What is found and fetched, and with which credential.

use std::collections::BTreeSet;

use sources::{Denial, SourceError};

use crate::{
    fake::{Repository, Server},
    world::{CONFIG, ID, fetch, get, of, reference, repository, secret, settings, sources, weights},
};

#[tokio::test]
async fn only_the_adapters_files_are_fetched() {
    let (st, bin, config) = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json");
    let inner = |name: &str| format!("model_weights/{name}");
    let (own, tools) = ("tokenizer.json", "additional_chat_templates/tool_use.jinja");
    let (inner_st, inner_config, inner_own) = (&*inner(st), &*inner(config), &*inner(own));
    for (files, fetched) in [
        (vec![config, st], vec![config, st]),
        (vec![config, bin], vec![config, bin]),
        (
            vec![config, bin, st, "README.md", "vocab.json", "checkpoint-1/adapter_model.safetensors"],
            vec![config, st],
        ),
        (vec![inner_config, inner_st, "model_hyperparameters.json"], vec![config, st]),
        (vec![config, st, inner_config, inner_st], vec![config, st]),
        // What it has of a tokenizer, from the same folder.
        (vec![config, st, tools, "additional_chat_templates/rag.jinja", own], vec![config, st, tools, own]),
        (vec![inner_config, inner_st, inner_own, tools], vec![config, st, own]),
    ] {
        let contents: Vec<_> = files.iter().map(|name| (*name, name.as_bytes())).collect();
        let server = Server::with(ID, Repository::new(&contents));
        let found = get(&of(&server), ID, "").await.unwrap();
        let names = fetched.iter().filter_map(|name| name.split('/').next()).collect::<Vec<_>>();
        assert_eq!(found.names(), names, "{files:?}");
        let asked = server.asked();
        let questions = asked.iter().filter(|asked| asked.path.contains("/resolve/")).count();
        assert_eq!(questions, fetched.len(), "{asked:?}");
        if files.contains(&tools) && files[0] == config {
            assert_eq!(found.read(tools), tools.as_bytes());
        }
        let from = if files[0] == inner_config { inner_st } else { fetched[1] };
        assert_eq!(found.read(fetched[1]), from.as_bytes(), "{files:?}");
    }
    for files in [&["README.md"][..], &[config], &[st], &["deep/adapter_config.json", st], &[]] {
        let contents: Vec<_> = files.iter().map(|name| (*name, name.as_bytes())).collect();
        let server = Server::with(ID, Repository::new(&contents));
        let found = get(&of(&server), ID, "").await;
        assert!(matches!(found, Err(SourceError::Invalid { .. })), "{files:?}: {found:?}");
    }
}

#[tokio::test]
async fn a_version_is_a_commit() {
    let other: &[(&str, &[u8])] = &[("adapter_config.json", b"{}"), ("adapter_model.bin", b"of v2")];
    let server = Server::with(ID, repository().with("v2", other).with("refs/pr/1", other));
    let (sources, main) = (of(&server), server.commit(ID, "main"));
    let version = async |id: &str| sources.lookup(&reference(id), None).await.unwrap();
    let found = version(ID).await;
    assert_eq!(found.bytes, (CONFIG.len() + weights().len()) as u64);
    assert!(!found.is_free && found.in_place.is_none());
    for same in ["org/name", "org/name@", "org/name@main", "hf://org/name", &format!("{ID}@{main}")] {
        assert_eq!(version(same).await, found, "{same}");
    }
    let v2 = version("org/name@v2").await;
    assert_ne!(v2.version, found.version);
    assert_eq!(version("org/name@refs/pr/1").await.version, v2.version);
    assert_eq!(get(&sources, "org/name@v2", "").await.unwrap().read("adapter_model.bin"), b"of v2");
    // The same commit of another repository or hub is another version.
    server.put("org/copy", repository());
    assert_ne!(version("org/copy").await.version, found.version);
    let mirror = Server::with(ID, repository());
    let there = of(&mirror).lookup(&reference(ID), None).await.unwrap();
    assert_ne!(there.version, found.version);
    assert_ne!(of(&mirror).place(&reference(ID)), sources.place(&reference(ID)));
    // A branch moves while its files are fetched: they are those of the commit.
    server.put(ID, repository().with("main", other).with(&main, &[]));
    let old = repository().commits.remove(&main).unwrap();
    let mut moved = repository().with("main", other);
    moved.commits.insert(main, old);
    server.put(ID, moved);
    let fetched = fetch(&sources, ID, &found, "", u64::MAX).await.unwrap();
    assert_eq!(fetched.read("adapter_model.safetensors"), weights());
    assert_eq!(fetched.progress.last(), Some(&found.bytes));
    assert!(fetched.progress.is_sorted());
}

/// What a caller may read.
#[derive(Debug, Clone, Copy, PartialEq)]
enum May {
    Read,
    NotFind,
    NotRead,
}

#[tokio::test]
async fn who_may_read_is_the_hubs_decision() {
    let server = Server::with("org/public", repository());
    server.put("org/private", repository().readable_by(&["mine", "servers"]));
    server.put("org/gated", repository().readable_by(&["mine", "servers"]).gated());
    server.know("other");
    for (id, token, expected) in [
        ("org/public", "", May::Read),
        ("org/public", "mine", May::Read),
        ("org/public", "other", May::Read),
        ("org/public", "unknown", May::NotRead),
        ("org/public", "no\ntoken", May::NotRead),
        ("org/public", "n\u{f6}\u{2028}token", May::NotRead),
        ("org/private", "", May::NotFind),
        ("org/private", "mine", May::Read),
        ("org/private", "other", May::NotFind),
        ("org/private", "unknown", May::NotRead),
        ("org/gated", "", May::NotRead),
        ("org/gated", "mine", May::Read),
        ("org/gated", "other", May::NotRead),
        ("org/nothing", "", May::NotFind),
        ("org/nothing", "mine", May::NotFind),
        ("org/nothing", "unknown", May::NotRead),
        ("org/public@v9", "", May::NotFind),
    ] {
        for use_hub_token in [false, true] {
            let mut hub = settings(&server.url);
            hub.token = secret("servers");
            server.asked();
            let found = get(&sources(hub, use_hub_token), id, token).await;
            let may = match &found {
                Ok(_) => May::Read,
                Err(SourceError::NotFound { .. }) => May::NotFind,
                Err(SourceError::Denied { reason: Denial::Credential(_), .. }) => May::NotRead,
                Err(error) => panic!("{id} {token}: {error}"),
            };
            // The server's own token is used only if it is said to be, and never instead of another.
            let is_servers = use_hub_token && token.is_empty();
            let is_theirs = id == "org/private" || id == "org/gated";
            assert_eq!(may, if is_servers && is_theirs { May::Read } else { expected }, "{id} {token}");
            let shown: BTreeSet<_> =
                server.asked().iter().filter_map(|asked| Some(asked.token()?.to_owned())).collect();
            let sent = if is_servers { "servers" } else { token };
            let is_sendable = !sent.is_empty() && sent.is_ascii() && !sent.contains('\n');
            assert_eq!(
                shown.into_iter().collect::<Vec<_>>(),
                if is_sendable { vec![sent] } else { vec![] },
                "{id} {token}"
            );
        }
    }
}

/// Between a look-up and the fetch the hub may change its mind.
#[tokio::test]
async fn access_that_is_taken_away_ends_a_fetch() {
    let private = || repository().readable_by(&["mine"]);
    let server = Server::with(ID, private());
    let sources = of(&server);
    let found = sources.lookup(&reference(ID), secret("mine").as_ref()).await.unwrap();
    assert!(fetch(&sources, ID, &found, "mine", u64::MAX).await.is_ok());
    let refused = fetch(&sources, ID, &found, "", u64::MAX).await;
    assert!(matches!(refused, Err(SourceError::NotFound { .. })), "{refused:?}");
    server.know("mine");
    server.put(ID, repository().readable_by(&["others"]));
    let refused = fetch(&sources, ID, &found, "mine", u64::MAX).await;
    assert!(matches!(refused, Err(SourceError::NotFound { .. })), "{refused:?}");
    server.put(ID, repository().readable_by(&["others"]).gated());
    let refused = fetch(&sources, ID, &found, "mine", u64::MAX).await;
    assert!(matches!(refused, Err(SourceError::Denied { .. })), "{refused:?}");
}

/// The files' addresses are signed; who keeps them must not learn the token.
#[tokio::test]
async fn a_token_is_shown_to_the_hub_alone() {
    let server = Server::with(ID, repository().readable_by(&["mine"]));
    get(&of(&server), ID, "mine").await.unwrap();
    let asked = server.asked();
    let (storage, hub): (Vec<_>, Vec<_>) = asked.iter().partition(|asked| asked.query.contains("Signature"));
    assert!(hub.len() >= 3 && hub.iter().all(|asked| asked.token() == Some("mine")), "{hub:?}");
    assert!(storage.len() == 1 && storage.iter().all(|asked| !asked.headers.contains_key("authorization")));
}

#[tokio::test]
async fn what_is_too_large_is_refused_before_it_is_read() {
    let server = Server::with(ID, repository());
    let sources = of(&server);
    let found = sources.lookup(&reference(ID), None).await.unwrap();
    server.asked();
    for max_bytes in [0, 1, CONFIG.len() as u64, found.bytes / 2, found.bytes - 1] {
        let refused = fetch(&sources, ID, &found, "", max_bytes).await;
        let is_right = matches!(refused, Err(SourceError::TooLarge { bytes, limit, .. })
            if bytes == found.bytes && limit == max_bytes);
        assert!(is_right, "{max_bytes}: {refused:?}");
    }
    assert!(server.asked().is_empty());
    assert!(fetch(&sources, ID, &found, "", found.bytes).await.is_ok());
}
