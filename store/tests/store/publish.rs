//! From a reservation to an adapter that can be found, held and deleted.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, fs::symlink, net::UnixListener},
    thread,
};

use store::{Deletion, OnDisk, Store, StoreError};

use crate::support::*;

const LIMIT: u64 = 1 << 20;

#[test]
fn what_is_published_is_found_by_its_version_held_and_deleted() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path(), LIMIT).unwrap();
    assert_eq!(store.find(version(1)).unwrap(), None);
    let one = publish(&store, 1, 1000).unwrap();
    assert_eq!(one.bytes, 1002);
    assert_eq!(store.used().unwrap(), 1002);
    // Another server sees it, too, and so does the next process.
    for other in [store.clone(), Store::open(root.path(), LIMIT).unwrap()] {
        assert_eq!(other.find(version(1)).unwrap(), Some(one));
        assert_eq!(other.named(reference(1)).unwrap(), Some(version(1)));
        let scanned = OnDisk { content: one.content, bytes: 1002, versions: vec![version(1)] };
        assert_eq!(other.scan().unwrap(), [scanned]);
        let hold = other.hold(one.content).unwrap().unwrap();
        assert_eq!(hold.folder(), other.path(one.content));
        assert_eq!(fs::read(hold.folder().join(WEIGHTS)).unwrap(), weights(1, 1000));
        assert_eq!(fs::read(hold.folder().join(CONFIG)).unwrap(), b"{}");
    }
    assert_eq!(store.delete(one.content).unwrap(), Deletion::Gone);
    assert_eq!(store.delete(one.content).unwrap(), Deletion::Gone, "a second time");
    assert_eq!(store.find(version(1)).unwrap(), None);
    assert_eq!(store.named(reference(1)).unwrap(), None);
    assert!(store.hold(one.content).unwrap().is_none());
    assert_eq!(store.used().unwrap(), 0);
    for folder in ["contents", "versions", "references"] {
        assert_eq!(names(root.path(), folder), Vec::<String>::new(), "{folder}");
    }
    assert_clean(root.path());
}

#[test]
fn nobody_else_may_read_what_is_published() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(&root.path().join("deep/er"), LIMIT).unwrap();
    let partial = store.reserve(LIMIT).unwrap();
    write(partial.folder(), 1, 10);
    fs::create_dir(partial.folder().join("model_weights")).unwrap();
    fs::write(partial.folder().join("model_weights").join(WEIGHTS), "w").unwrap();
    for path in [CONFIG, WEIGHTS, "model_weights/adapter_model.safetensors", "model_weights"] {
        let path = partial.folder().join(path);
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    partial.publish(version(1), reference(1)).unwrap();
    let _writing = store.reserve(0).unwrap();
    let mut seen = 0;
    let mut folders = vec![root.path().join("deep/er")];
    while let Some(folder) = folders.pop() {
        for item in fs::read_dir(folder).unwrap() {
            let item = item.unwrap();
            let (found, is_folder) = (item.metadata().unwrap(), item.file_type().unwrap().is_dir());
            let expected = if is_folder { 0o700 } else { 0o600 };
            assert_eq!(found.permissions().mode() & 0o777, expected, "{}", item.path().display());
            seen += 1;
            folders.extend(is_folder.then(|| item.path()));
        }
    }
    assert_eq!(seen, 7 + 8 + 3 + 2, "of the root, an entry, a partial adapter, the indexes");
}

#[test]
fn equal_contents_are_stored_once_under_all_their_versions() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path(), LIMIT).unwrap();
    let stores: Vec<Store> = (0..8).map(|_| Store::open(root.path(), LIMIT).unwrap()).collect();
    // Eight servers publish the same content at once: pairs of them as the same version.
    let fetched: Vec<_> = thread::scope(|scope| {
        let publish = |(n, store): (usize, &Store)| {
            let partial = store.reserve(502).unwrap();
            write(partial.folder(), 1, 500);
            partial.publish(version(n as u64 / 2), reference(n as u64)).unwrap()
        };
        let servers: Vec<_> =
            stores.iter().enumerate().map(|item| scope.spawn(move || publish(item))).collect();
        servers.into_iter().map(|server| server.join().unwrap()).collect()
    });
    assert!(fetched.iter().all(|other| other == &fetched[0]));
    let found = store.scan().unwrap();
    let mut versions: Vec<[u8; 32]> = (0..4).map(version).collect();
    versions.sort();
    assert_eq!(found, [OnDisk { content: fetched[0].content, bytes: 502, versions: versions.clone() }]);
    for n in 0..8 {
        assert_eq!(store.named(reference(n)).unwrap(), Some(version(n / 2)), "{n}");
        assert_eq!(store.find(version(n / 2)).unwrap(), Some(fetched[0]), "{n}");
    }
    assert_eq!(store.used().unwrap(), 502);
    assert_clean(root.path());
    assert_eq!(store.delete(fetched[0].content).unwrap(), Deletion::Gone);
    assert_eq!(names(root.path(), "versions"), Vec::<String>::new());
    assert_eq!(names(root.path(), "references"), Vec::<String>::new());
}

#[test]
fn a_reference_leads_where_it_led_last() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path(), LIMIT).unwrap();
    let one = publish(&store, 1, 10).unwrap();
    publish(&store, 2, 20).unwrap();
    store.name(reference(1), version(2)).unwrap();
    store.name(reference(1), version(2)).unwrap();
    assert_eq!(store.named(reference(1)).unwrap(), Some(version(2)));
    store.name(reference(3), version(1)).unwrap();
    assert_eq!(store.named(reference(3)).unwrap(), Some(version(1)));
    store.name(reference(4), version(99)).unwrap();
    assert_eq!(store.named(reference(4)).unwrap(), None, "of a version that is not here");
    // What led elsewhere since is not forgotten with the content that it led to before.
    store.delete(one.content).unwrap();
    assert_eq!(store.named(reference(1)).unwrap(), Some(version(2)));
    assert_eq!(store.named(reference(3)).unwrap(), None);
}

#[test]
fn a_content_remembers_a_bounded_number_of_versions() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path(), LIMIT).unwrap();
    for n in 0..100 {
        let partial = store.reserve(12).unwrap();
        write(partial.folder(), 1, 10);
        partial.publish(version(n), reference(0)).unwrap();
    }
    assert_eq!(store.scan().unwrap()[0].versions.len(), 64);
    assert_eq!(names(root.path(), "versions").len(), 64);
    assert_eq!(store.find(version(35)).unwrap(), None);
    assert!(store.find(version(36)).unwrap().is_some());
    assert_eq!(store.named(reference(0)).unwrap(), Some(version(99)));
}

#[test]
fn names_and_kinds_that_an_adapter_does_not_have_are_refused() {
    type Make = fn(&std::path::Path);
    let cases: &[(&str, Make)] = &[
        ("a link", |folder| symlink("/etc/passwd", folder.join("x")).unwrap()),
        ("a link to a folder", |folder| symlink("/etc", folder.join("x")).unwrap()),
        ("a socket", |folder| drop(UnixListener::bind(folder.join("x")).unwrap())),
        ("hidden", |folder| fs::write(folder.join(".x"), "").unwrap()),
        ("a hidden folder", |folder| fs::create_dir(folder.join(".x")).unwrap()),
        ("a control character", |folder| fs::write(folder.join("a\nb"), "").unwrap()),
        ("an escape sequence", |folder| fs::write(folder.join("a\u{1b}[2J"), "").unwrap()),
        ("not UTF-8", |folder| {
            let name: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"a\xff");
            fs::write(folder.join(name), "").unwrap();
        }),
        ("too deep", |folder| {
            fs::create_dir_all(folder.join("a/b")).unwrap();
            fs::write(folder.join("a/b/c"), "").unwrap();
        }),
        ("too many", |folder| (0..65).for_each(|n| fs::write(folder.join(format!("{n}")), "").unwrap())),
    ];
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path(), LIMIT).unwrap();
    for (case, make) in cases {
        let partial = store.reserve(100).unwrap();
        write(partial.folder(), 1, 10);
        make(partial.folder());
        let error = partial.publish(version(1), reference(1)).unwrap_err();
        assert!(matches!(error, StoreError::Name { .. }), "{case}: {error}");
        assert!(!error.to_string().contains(['\n', '\u{1b}']), "{case}: {error}");
        assert_clean(root.path());
    }
    let empty = store.reserve(100).unwrap().publish(version(1), reference(1)).unwrap_err();
    assert!(matches!(empty, StoreError::Empty), "{empty}");
    assert_eq!(store.used().unwrap(), 0);
    assert!(contents(&store).is_empty());
    assert_eq!(fs::metadata("/etc/passwd").unwrap().permissions().mode() & 0o777, 0o644, "was left alone");
}

#[test]
fn what_is_held_is_not_deleted() {
    let root = tempfile::tempdir().unwrap();
    let [here, there] = [(); 2].map(|()| Store::open(root.path(), LIMIT).unwrap());
    let one = publish(&here, 1, 100).unwrap();
    for (holder, other) in [(&here, &there), (&there, &here), (&here, &here)] {
        let holds = [holder.hold(one.content).unwrap().unwrap(), holder.hold(one.content).unwrap().unwrap()];
        for hold in holds {
            assert_eq!(other.delete(one.content).unwrap(), Deletion::Held);
            assert_eq!(other.make_room(LIMIT).unwrap(), Vec::<[u8; 32]>::new());
            assert!(hold.folder().join(WEIGHTS).exists());
            assert_eq!(other.find(version(1)).unwrap(), Some(one));
        }
    }
    assert_eq!(there.delete(one.content).unwrap(), Deletion::Gone);
    assert!(here.hold(one.content).unwrap().is_none());
    // What is published again may be held again.
    publish(&there, 1, 100).unwrap();
    assert!(here.hold(one.content).unwrap().is_some());
}

/// Holding, deleting and publishing the same content from several servers: a hold always has the right bytes.
#[test]
fn a_hold_never_sees_anything_else() {
    let root = tempfile::tempdir().unwrap();
    let content = publish(&Store::open(root.path(), LIMIT).unwrap(), 1, 5000).unwrap().content;
    thread::scope(|scope| {
        for server in 0..4 {
            let store = Store::open(root.path(), LIMIT).unwrap();
            scope.spawn(move || {
                for round in 0..60 {
                    if let Some(hold) = store.hold(content).unwrap() {
                        assert_eq!(fs::read(hold.folder().join(WEIGHTS)).unwrap(), weights(1, 5000));
                    }
                    if (round + server) % 3 == 0 {
                        store.delete(content).unwrap();
                    } else if (round + server) % 3 == 1 {
                        assert_eq!(publish(&store, 1, 5000).unwrap().content, content);
                    }
                    assert!(store.used().unwrap() <= LIMIT);
                }
            });
        }
    });
    let store = Store::open(root.path(), LIMIT).unwrap();
    publish(&store, 1, 5000).unwrap();
    assert_eq!(store.used().unwrap(), 5002);
    assert_clean(root.path());
}
