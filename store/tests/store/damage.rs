//! What others do to the folder, or a disk does, is found or harmless.

use std::{
    fs,
    os::unix::fs::{FileExt, symlink},
    path::Path,
};

use store::{Store, StoreError};

use crate::support::*;

const LIMIT: u64 = 1 << 20;

fn flip(path: &Path, position: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, position).unwrap();
    file.write_all_at(&[byte[0] ^ 1], position).unwrap();
}

fn cut(path: &Path, bytes: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

type Harm = fn(&Path);

/// What is done to an entry, and whether a look at its folder is enough to find it.
const HARMS: &[(&str, bool, Harm)] = &[
    ("weights are cut", true, |e| cut(&e.join("files").join(WEIGHTS), 999)),
    ("weights are empty", true, |e| cut(&e.join("files").join(WEIGHTS), 0)),
    ("weights have grown", true, |e| cut(&e.join("files").join(WEIGHTS), 1001)),
    ("the first bit is flipped", false, |e| flip(&e.join("files").join(WEIGHTS), 0)),
    ("a bit in the middle is flipped", false, |e| flip(&e.join("files").join(WEIGHTS), 500)),
    ("the last bit is flipped", false, |e| flip(&e.join("files").join(WEIGHTS), 999)),
    ("a bit of the configuration is flipped", false, |e| flip(&e.join("files").join(CONFIG), 1)),
    ("weights are missing", true, |e| fs::remove_file(e.join("files").join(WEIGHTS)).unwrap()),
    ("the configuration is missing", true, |e| fs::remove_file(e.join("files").join(CONFIG)).unwrap()),
    ("all files are missing", true, |e| fs::remove_dir_all(e.join("files")).unwrap()),
    ("weights are a folder", true, |e| {
        fs::remove_file(e.join("files").join(WEIGHTS)).unwrap();
        fs::create_dir(e.join("files").join(WEIGHTS)).unwrap();
    }),
    ("weights are a link", true, |e| {
        fs::rename(e.join("files").join(WEIGHTS), e.join("elsewhere")).unwrap();
        symlink(e.join("elsewhere"), e.join("files").join(WEIGHTS)).unwrap();
    }),
    ("the record is missing", true, |e| fs::remove_file(e.join("entry.json")).unwrap()),
    ("the record is empty", true, |e| cut(&e.join("entry.json"), 0)),
    ("the record is cut", true, |e| cut(&e.join("entry.json"), 40)),
    ("the record is not JSON", true, |e| fs::write(e.join("entry.json"), [0xff; 100]).unwrap()),
    ("the record is large", true, |e| fs::write(e.join("entry.json"), vec![b' '; 3 << 20]).unwrap()),
    ("the record leads elsewhere", true, |e| {
        let text = r#"{"files":[{"name":"../../../../etc/passwd","bytes":1}],"versions":[]}"#;
        fs::write(e.join("entry.json"), text).unwrap();
    }),
    ("the record has no files", true, |e| {
        fs::write(e.join("entry.json"), r#"{"files":[],"versions":[]}"#).unwrap();
    }),
    ("the record has a version that is a path", true, |e| {
        let text = fs::read_to_string(e.join("entry.json")).unwrap();
        let at = text.find("\"version\":\"").unwrap() + 11;
        fs::write(e.join("entry.json"), format!("{}../{}", &text[..at], &text[at + 3..])).unwrap();
    }),
    ("the lock is missing", true, |e| fs::remove_file(e.join("lock")).unwrap()),
    ("it is an empty folder", true, |e| {
        fs::remove_dir_all(e).unwrap();
        fs::create_dir(e).unwrap();
    }),
    ("it is another adapter's", false, |e| {
        let other =
            fs::read_dir(e.parent().unwrap()).unwrap().map(|i| i.unwrap().path()).find(|p| p != e).unwrap();
        for file in [CONFIG, WEIGHTS] {
            fs::copy(other.join("files").join(file), e.join("files").join(file)).unwrap();
        }
    }),
];

fn entry(store: &Store, content: [u8; 32]) -> std::path::PathBuf {
    store.path(content).parent().unwrap().to_owned()
}

#[test]
fn a_damaged_adapter_is_never_held_and_can_be_published_again() {
    for (harm, _, work) in HARMS {
        let root = tempfile::tempdir().unwrap();
        let before = Store::open(root.path(), LIMIT).unwrap();
        let other = publish(&before, 2, 1000).unwrap().content;
        let content = publish(&before, 1, 1000).unwrap().content;
        drop(before.hold(content).unwrap().unwrap());
        work(&entry(&before, content));
        // Both the process that has published it and the next one notice.
        for store in [before, Store::open(root.path(), LIMIT).unwrap()] {
            assert!(store.hold(content).unwrap().is_none(), "{harm}");
            assert_eq!(store.find(version(1)).unwrap(), None, "{harm}");
            assert_eq!(contents(&store), [other], "{harm}");
            assert_eq!(store.used().unwrap(), 1002, "{harm}");
            assert!(store.hold(other).unwrap().is_some(), "{harm}");
        }
        assert_clean(root.path());
        let store = Store::open(root.path(), LIMIT).unwrap();
        assert_eq!(publish(&store, 1, 1000).unwrap().content, content, "{harm}");
        assert!(store.hold(content).unwrap().is_some(), "{harm}");
    }
}

#[test]
fn publishing_replaces_a_damaged_adapter() {
    for (harm, _, work) in HARMS {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path(), LIMIT).unwrap();
        publish(&store, 2, 1000).unwrap();
        let content = publish(&store, 1, 1000).unwrap().content;
        work(&entry(&store, content));
        assert_eq!(publish(&store, 1, 1000).unwrap().content, content, "{harm}");
        let hold = store.hold(content).unwrap().unwrap();
        assert_eq!(fs::read(hold.folder().join(WEIGHTS)).unwrap(), weights(1, 1000), "{harm}");
        assert_eq!(store.find(version(1)).unwrap().map(|found| found.content), Some(content), "{harm}");
        assert_eq!(store.used().unwrap(), 2004, "{harm}");
        assert_clean(root.path());
    }
}

#[test]
fn a_scan_removes_what_is_seen_not_to_be_whole() {
    for (harm, is_seen, work) in HARMS {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path(), LIMIT).unwrap();
        let other = publish(&store, 2, 1000).unwrap().content;
        let content = publish(&store, 1, 1000).unwrap().content;
        work(&entry(&store, content));
        let left = contents(&Store::open(root.path(), LIMIT).unwrap());
        assert_eq!(left.contains(&content), !is_seen, "{harm}");
        assert!(left.contains(&other), "{harm}");
        assert_eq!(entry(&store, content).exists(), !is_seen, "{harm}");
        assert_clean(root.path());
    }
}

#[test]
fn indexes_that_are_wrong_lead_nowhere() {
    let wrong: &[&[u8]] =
        &[b"", b"x", b"../../../etc/passwd", &[b'0'; 63], &[b'0'; 64], &[b'G'; 64], &[0xff; 64], b"0a\n"];
    for text in wrong {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path(), LIMIT).unwrap();
        let one = publish(&store, 1, 10).unwrap();
        for folder in ["versions", "references"] {
            let name = names(root.path(), folder).pop().unwrap();
            fs::write(root.path().join(folder).join(name), text).unwrap();
        }
        assert_eq!(store.find(version(1)).unwrap(), None, "{text:?}");
        assert_eq!(store.named(reference(1)).unwrap(), None, "{text:?}");
        // The record of the entry still knows, and the next publication mends the index.
        let next = Store::open(root.path(), LIMIT).unwrap();
        assert_eq!(names(root.path(), "versions"), Vec::<String>::new(), "{text:?}");
        assert_eq!(names(root.path(), "references"), Vec::<String>::new(), "{text:?}");
        assert_eq!(next.scan().unwrap()[0].versions, [version(1)], "{text:?}");
        publish(&next, 1, 10).unwrap();
        assert_eq!(next.find(version(1)).unwrap(), Some(one), "{text:?}");
    }
}

#[test]
fn what_is_not_ours_is_left_alone_and_does_not_count() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path(), 100).unwrap();
    let one = publish(&store, 1, 10).unwrap();
    let foreign = [
        "README",
        "contents/README",
        "contents/0123",
        "contents/lost+found/x",
        "partial/notes",
        "partial/x-10",
        "removing/keep",
        "versions/README",
        "references/x",
        "versions/.nfs0001",
    ];
    for path in foreign {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, vec![1; 500]).unwrap();
    }
    for store in [store, Store::open(root.path(), 100).unwrap()] {
        assert_eq!(contents(&store), [one.content]);
        assert_eq!(store.used().unwrap(), 12);
        drop(store.reserve(88).unwrap());
        assert!(store.reserve(89).is_err());
        for path in foreign {
            assert!(root.path().join(path).exists(), "{path}");
        }
    }
}

#[test]
fn a_folder_of_something_else_is_refused_and_not_touched() {
    let cases: &[(&str, &[u8], &str)] = &[
        ("VERSION", b"lorax adapters 2\n", "lorax adapters 2"),
        ("VERSION", b"lorax adapters 1", ""),
        ("VERSION", b"lorax adapters 1\n\n", ""),
        ("VERSION", b"", ""),
        ("VERSION", b"1.2.3\n", "1.2.3"),
        ("VERSION", b"\xff\xfe", "no text"),
        ("thesis.tex", b"x", "thesis.tex"),
        (".bashrc", b"x", ".bashrc"),
        ("contents", b"x", "contents"),
        ("models--org--name", b"x", "models--org--name"),
    ];
    for (name, text, named) in cases {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join(name), text).unwrap();
        let error = Store::open(root.path(), LIMIT).unwrap_err();
        assert!(matches!(error, StoreError::Foreign { .. }), "{name}: {error}");
        let message = error.to_string();
        assert!(message.contains(root.path().to_str().unwrap()) && message.contains(named), "{message}");
        assert_eq!(names(root.path(), "."), [*name], "nothing is added");
        assert_eq!(fs::read(root.path().join(name)).unwrap(), *text);
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    assert!(matches!(Store::open(file.path(), LIMIT), Err(StoreError::Io { .. })));
}

/// A process may be killed while it makes the folder.
#[test]
fn a_folder_that_was_begun_is_finished() {
    for begun in [
        &[][..],
        &["lock"],
        &["lock", "new"],
        &["lock", "new", "VERSION"],
        &["VERSION", "partial", "contents"],
    ] {
        let root = tempfile::tempdir().unwrap();
        for name in begun {
            match *name {
                "VERSION" => fs::write(root.path().join(name), "lorax adapters 1\n").unwrap(),
                "lock" | "new" => fs::write(root.path().join(name), "").unwrap(),
                folder => fs::create_dir(root.path().join(folder)).unwrap(),
            }
        }
        let store = Store::open(root.path(), LIMIT).unwrap();
        publish(&store, 1, 10).unwrap();
        assert_clean(root.path());
    }
}
