//! Adapters in folders of this machine.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    os::unix::{ffi::OsStrExt, fs::symlink},
    path::{Path, PathBuf},
};

use sources::{Denial, Found, Reference, SourceError, SourceSettings, Sources, Stamp};
use tempfile::TempDir;

/// A folder with everything in it, and sources that read from two folders of it.
struct World {
    all: TempDir,
    sources: Sources,
}

fn settings(dir: Option<PathBuf>, roots: Vec<PathBuf>) -> SourceSettings {
    SourceSettings::from_env(dir, roots)
}

impl World {
    fn new() -> World {
        let all = tempfile::tempdir().unwrap();
        for folder in ["adapters/one", "shared/two", "secret/three"] {
            adapter(&all.path().join(folder));
        }
        let at = |name: &str| all.path().join(name);
        let sources = Sources::new(settings(Some(at("adapters")), vec![at("shared")])).unwrap();
        World { all, sources }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.all.path().canonicalize().unwrap().join(name)
    }

    async fn find(&self, id: &str) -> Result<Found, SourceError> {
        self.sources.lookup(&Reference::parse("local", id).unwrap(), None).await
    }

    async fn version(&self, id: &str) -> [u8; 32] {
        self.find(id).await.unwrap().version
    }
}

fn adapter(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("adapter_config.json"), "{}").unwrap();
    fs::write(folder.join("adapter_model.safetensors"), "weights").unwrap();
}

fn denied(result: &Result<Found, SourceError>) -> bool {
    matches!(result, Err(SourceError::Denied { reason: Denial::Folder, .. }))
}

#[tokio::test]
async fn only_folders_under_the_roots_are_found() {
    let world = World::new();
    symlink(world.at("secret/three"), world.at("adapters/escape")).unwrap();
    symlink(world.at("secret/four"), world.at("adapters/escape-to-nothing")).unwrap();
    symlink(world.at("secret"), world.at("adapters/secrets")).unwrap();
    symlink("../shared/two", world.at("adapters/within")).unwrap();
    symlink("itself", world.at("adapters/itself")).unwrap();
    let (two, three) = (world.at("shared/two"), world.at("secret/three"));
    for (id, folder) in [
        ("one", "adapters/one"),
        ("./one/", "adapters/one"),
        ("within", "shared/two"),
        (two.to_str().unwrap(), "shared/two"),
        (world.at("adapters/one").to_str().unwrap(), "adapters/one"),
    ] {
        let found = world.find(id).await.unwrap();
        assert_eq!(found.in_place.as_deref(), Some(&*world.at(folder)), "{id}");
        assert!(found.is_free && found.bytes == 9, "{id}: {found:?}");
        let names: Vec<_> = found.files.iter().map(|file| &*file.name).collect();
        assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors"], "{id}");
    }
    for id in ["nothing", "one/nothing", "nothing/at/all", "one/adapter_config.json/x", "within/x"] {
        let found = world.find(id).await;
        assert!(matches!(found, Err(SourceError::NotFound { .. })), "{id}: {found:?}");
    }
    // Whether it exists makes no difference.
    for id in [
        "escape",
        "escape-to-nothing",
        "secrets/three",
        "secrets/four",
        "secrets/four/five",
        "itself",
        "/etc",
        "/etc/nothing",
        "/",
        three.to_str().unwrap(),
        world.at("secret/four").to_str().unwrap(),
        world.at("shared-not/two").to_str().unwrap(),
    ] {
        let found = world.find(id).await;
        assert!(denied(&found), "{id}: {found:?}");
        let text = found.unwrap_err().to_string();
        assert_eq!(
            text.replace(id, "ID"),
            "adapter \"ID\" is outside of the folders that adapters may be read from"
        );
    }
}

#[tokio::test]
async fn files_behind_links_are_checked_as_folders_are() {
    let world = World::new();
    let file = |name: &str| world.at("adapters").join(name);
    for (name, to) in [("stolen", "secret/three"), ("dangling", "secret/nothing")] {
        fs::create_dir(file(name)).unwrap();
        fs::write(file(name).join("adapter_config.json"), "{}").unwrap();
        let to = world.at(to).join("adapter_model.safetensors");
        symlink(to, file(name).join("adapter_model.safetensors")).unwrap();
        assert!(denied(&world.find(name).await), "{name}");
    }
    // A folder of Ludwig that leads outside is not looked into.
    for (name, to) in [("ludwig", "secret/three"), ("ludwig-nothing", "secret/nothing")] {
        fs::create_dir(file(name)).unwrap();
        symlink(world.at(to), file(name).join("model_weights")).unwrap();
        let found = world.find(name).await;
        assert!(matches!(found, Err(SourceError::Invalid { .. })), "{name}: {found:?}");
    }
    // As in the cache of the hub's clients.
    adapter(&world.at("shared/blobs"));
    fs::create_dir(file("snapshot")).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        symlink(Path::new("../../shared/blobs").join(name), file("snapshot").join(name)).unwrap();
    }
    assert_eq!(world.find("snapshot").await.unwrap().bytes, 9);
}

#[tokio::test]
async fn what_it_has_of_a_tokenizer_belongs_to_an_adapter() {
    let world = World::new();
    let at = |name: &str| world.at("adapters/one").join(name);
    let mut versions = vec![world.version("one").await];
    let template = "chat_template.jinja";
    let tools = "additional_chat_templates/tool_use.jinja";
    fs::create_dir(at("additional_chat_templates")).unwrap();
    for (name, text) in [(template, "a"), (template, "b"), (tools, "c"), ("tokenizer.json", "{}")] {
        fs::write(at(name), text).unwrap();
        let found = world.find("one").await.unwrap();
        assert!(found.files.iter().any(|file| file.name == name), "{name}: {found:?}");
        assert!(!versions.contains(&found.version), "{name}: {text}");
        versions.push(found.version);
    }
    let found = world.find("one").await.unwrap();
    let names: Vec<_> = found.files.iter().map(|file| &*file.name).collect();
    let weights = ["adapter_config.json", "adapter_model.safetensors"];
    assert_eq!(names, [&weights[..], &[tools, template, "tokenizer.json"]].concat());
    assert_eq!(found.bytes, 9 + 4);
    fs::write(at("vocab.json"), "{}").unwrap();
    assert_eq!(world.version("one").await, found.version, "a file that nobody reads");
    // A link of one of them is checked as those of weights are.
    symlink(world.at("secret/three/adapter_config.json"), at("tokenizer_config.json")).unwrap();
    assert!(denied(&world.find("one").await));
}

#[tokio::test]
async fn what_is_no_adapter_is_refused() {
    let world = World::new();
    let weights = "adapter_model.safetensors";
    type Case = (&'static str, fn(&Path), &'static str);
    let cases: [Case; 6] = [
        ("empty", |_| (), "has no adapter_config.json"),
        ("config", |at| fs::write(at.join("adapter_config.json"), "{}").unwrap(), "has neither"),
        (
            "weights",
            |at| fs::write(at.join("adapter_model.safetensors"), "w").unwrap(),
            "has no adapter_config.json",
        ),
        ("folder", |at| fs::create_dir_all(at.join("adapter_config.json")).unwrap(), "has neither"),
        (
            "weights-folder",
            |at| {
                adapter(at);
                fs::remove_file(at.join("adapter_model.safetensors")).unwrap();
                fs::create_dir(at.join("adapter_model.safetensors")).unwrap();
            },
            "adapter_model.safetensors is not a file",
        ),
        (
            "socket",
            |at| {
                adapter(at);
                fs::remove_file(at.join("adapter_config.json")).unwrap();
                std::os::unix::net::UnixListener::bind(at.join("adapter_config.json")).unwrap();
            },
            "adapter_config.json is not a file",
        ),
    ];
    for (name, make, fault) in cases {
        let folder = world.at("adapters").join(name);
        fs::create_dir(&folder).unwrap();
        make(&folder);
        let error = world.find(name).await.unwrap_err();
        assert!(matches!(error, SourceError::Invalid { .. }), "{name}: {error}");
        assert!(error.to_string().contains(fault), "{name}: {error}");
    }
    fs::write(world.at("adapters/file"), "").unwrap();
    assert!(world.find("file").await.is_err());
    // PEFT's old format, and Ludwig's folder.
    fs::rename(world.at("adapters/one").join(weights), world.at("adapters/one/adapter_model.bin")).unwrap();
    assert_eq!(world.find("one").await.unwrap().files[1].name, "adapter_model.bin");
    adapter(&world.at("adapters/ludwig/model_weights"));
    let found = world.find("ludwig").await.unwrap();
    assert_eq!(found.in_place.as_deref(), Some(&*world.at("adapters/ludwig/model_weights")));
    assert_eq!(found.files[1].name, weights);
}

/// Rewrites a file with as many bytes.
fn rewrite(path: &Path) {
    let text = fs::read_to_string(path).unwrap();
    fs::write(path, text.to_uppercase()).unwrap();
}

#[tokio::test]
async fn every_change_makes_another_version() {
    let world = World::new();
    let folder = world.at("adapters/one");
    let (config, weights) = (folder.join("adapter_config.json"), folder.join("adapter_model.safetensors"));
    let changes: [&dyn Fn(); 8] = [
        &|| rewrite(&weights),
        &|| fs::write(&weights, "longer weights").unwrap(),
        &|| fs::write(&config, "{ }").unwrap(),
        &|| rewrite(&config),
        &|| {
            fs::copy(&weights, folder.join("new")).unwrap();
            fs::rename(folder.join("new"), &weights).unwrap();
        },
        &|| {
            // With the times of the file before it, as archives set them.
            let times = fs::metadata(&weights).unwrap();
            rewrite(&weights);
            let file = fs::File::options().write(true).open(&weights).unwrap();
            file.set_modified(times.modified().unwrap()).unwrap();
        },
        &|| fs::rename(&weights, folder.join("adapter_model.bin")).unwrap(),
        &|| {
            fs::rename(&folder, world.at("adapters/old")).unwrap();
            adapter(&folder);
        },
    ];
    let mut seen = vec![world.version("one").await];
    assert_eq!(world.version("one").await, seen[0], "nothing has changed");
    for (number, change) in changes.iter().enumerate() {
        change();
        let version = world.version("one").await;
        assert!(!seen.contains(&version), "change {number}");
        assert_eq!(world.version("one").await, version, "nothing has changed since {number}");
        seen.push(version);
    }
    assert_ne!(world.version(world.at("shared/two").to_str().unwrap()).await, world.version("one").await);
}

/// Two changes within one tick of the file system's clock may have one stamp. The version that a look-up between them
/// answers with must not be that of the second.
#[tokio::test]
async fn a_change_in_the_same_tick_makes_another_version() {
    let world = World::new();
    let weights = world.at("adapters/one/adapter_model.safetensors");
    let stamp = || Stamp::of(&fs::metadata(&weights).unwrap());
    for round in 0..10 {
        rewrite(&weights);
        let early = stamp();
        let before = world.version("one").await;
        // The answer came after the tick: from now on, each change shows.
        rewrite(&weights);
        assert_ne!(stamp(), early, "round {round}");
        assert_ne!(world.version("one").await, before, "round {round}");
    }
}

#[tokio::test]
async fn names_that_are_no_text_of_the_system_are_not_found() {
    let world = World::new();
    let odd = world.at("adapters").join(std::ffi::OsStr::from_bytes(b"\xff\xfe"));
    adapter(&odd);
    for id in [
        "\u{fffd}\u{fffd}",
        "%ff%fe",
        "..%2fsecret",
        "one%00",
        "ONE",
        "one ",
        " one",
        "o*e",
        "~/one",
        "$HOME",
    ] {
        let found = world.find(id).await;
        assert!(matches!(found, Err(SourceError::NotFound { .. })), "{id}: {found:?}");
    }
}

#[tokio::test]
async fn without_folders_nothing_is_found() {
    let sources = Sources::new(settings(None, vec![])).unwrap();
    let find = async |id: &str| sources.lookup(&Reference::parse("local", id).unwrap(), None).await;
    for id in ["one", "./one", "a/b"] {
        assert!(matches!(find(id).await, Err(SourceError::NotFound { .. })), "{id}");
    }
    for id in ["/", "/etc", "/nothing", "/etc/passwd"] {
        assert!(denied(&find(id).await), "{id}");
    }
    let missing = tempfile::tempdir().unwrap().path().join("missing");
    assert!(Sources::new(settings(Some(missing.clone()), vec![])).is_err());
    assert!(Sources::new(settings(None, vec![missing])).is_err());
}

/// Looking is left to other threads: one that hangs in the file system holds up nobody.
#[tokio::test]
async fn looking_does_not_hold_up_the_runtime() {
    let world = World::new();
    let looking = world.find("one");
    tokio::pin!(looking);
    let first = futures::poll!(&mut looking);
    assert!(first.is_pending(), "the caller's thread has not looked");
    assert!(looking.await.is_ok());
}
