//! Models that are in the cache, and a hub that is not asked or does not answer.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
};

use serde_json::json;

use crate::{
    hub::{Hub, Repository, Trouble},
    launcher::Launcher,
};

const ID: &str = "org/name";

/// A repository with several GGUF files, two of which have the same type in their names.
const GGUFS: [&str; 8] = [
    "README.md",
    "Model-Q8_0.gguf",
    "Model-Q4_K_M.gguf",
    "Model-UD-Q4_K_M.gguf",
    "deep/Model-Q8_0.gguf",
    "BF16/Model-BF16-00001-of-00003.gguf",
    "BF16/Model-BF16-00002-of-00003.gguf",
    "BF16/Model-BF16-00003-of-00003.gguf",
];

fn repository(files: &[&str]) -> Repository {
    Repository::new(&files.iter().map(|name| (*name, *name)).collect::<Vec<_>>())
}

/// A launcher of the model `org/name` with something behind it.
fn launcher(hub: &Hub, rest: &str) -> Launcher {
    Launcher::new().env("HF_ENDPOINT", &hub.url).env("MODEL_ID", &format!("{ID}{rest}"))
}

/// A launcher whose cache has what these name, and that is to find something else.
fn filled(hub: &Hub, before: &[&str], asked: &str) -> Launcher {
    let mut filled = launcher(hub, "");
    for rest in before {
        filled = filled.env("MODEL_ID", &format!("{ID}{rest}"));
        filled.configuration();
    }
    filled.env("MODEL_ID", &format!("{ID}{asked}"))
}

fn of_cache(launcher: &Launcher, name: &str) -> PathBuf {
    launcher.folder().join("hf/hub/models--org--name").join(name)
}

/// The cache has one file of several: it must not answer for a name that means another, or none.
#[test]
fn one_of_several_files_does_not_stand_for_the_others() {
    let cases: [(&[&str], &str); 12] = [
        (&["/Model-Q8_0.gguf"], ""),
        (&["/Model-Q8_0.gguf"], ":Q8_0"),
        (&["/Model-Q8_0.gguf"], ":q8_0"),
        (&["/Model-Q8_0.gguf"], ":Model-Q8_0"),
        (&["/Model-Q8_0.gguf"], ":Model-Q8_0.gguf"),
        (&["/Model-Q8_0.gguf"], "/deep/Model-Q8_0.gguf"),
        (&["/Model-Q8_0.gguf"], ":Q4_K_M"),
        (&["/Model-Q4_K_M.gguf"], ":Q4_K_M"),
        (&["/Model-UD-Q4_K_M.gguf"], ":Q4_K_M"),
        (&["/Model-UD-Q4_K_M.gguf"], ":K_M"),
        (&[":BF16"], ""),
        (&["/Model-Q8_0.gguf", ":BF16"], ":Q8_0"),
    ];
    for (before, asked) in cases {
        let hub = Hub::start(ID, repository(&GGUFS));
        let mut launcher = filled(&hub, before, asked).env("HF_HUB_OFFLINE", "1");
        hub.asked();
        let (status, log) = launcher.failure();
        assert_eq!(status, 64, "{before:?} {asked}: {log}");
        assert!(log.contains("org/name"), "{before:?} {asked}: {log}");
        assert!(hub.asked().is_empty());
        hub.fail(Trouble::Status("503 Service Unavailable"));
        let (status, log) = launcher.env("HF_HUB_OFFLINE", "0").fails();
        assert_eq!(status, 1, "{before:?} {asked}: {log}");
        assert!(log.contains("the hub cannot be reached"), "{before:?} {asked}: {log}");
    }
}

/// Those who filled the cache have not always kept the list: then nothing but a whole name is sure.
#[test]
fn without_a_list_only_whole_names_are_sure() {
    for (asked, is_sure) in [
        ("", false),
        (":Q8_0", false),
        (":model-q8_0", false),
        ("/Model-Q8_0.gguf", true),
        (":Model-Q8_0.gguf", true),
        ("/deep/Model-Q8_0.gguf", false),
        (":Q4_K_M", false),
    ] {
        for list in [None, Some("nonsense"), Some(r#"{"format_version": 2, "files": {}}"#)] {
            let hub = Hub::start(ID, repository(&GGUFS));
            let mut launcher = filled(&hub, &["/Model-Q8_0.gguf"], asked).env("HF_HUB_OFFLINE", "1");
            let lists = of_cache(&launcher, "trees");
            let file = fs::read_dir(&lists).unwrap().next().unwrap().unwrap().path();
            match list {
                None => fs::remove_dir_all(lists).unwrap(),
                Some(text) => fs::write(file, text).unwrap(),
            }
            if is_sure {
                let path = launcher.configuration()["model"]["path"].clone();
                assert!(path.as_str().unwrap().ends_with("c0/Model-Q8_0.gguf"), "{asked} {list:?}: {path}");
            } else {
                assert_eq!(launcher.fails().0, 64, "{asked} {list:?}");
            }
        }
    }
}

#[test]
fn parts_are_fetched_and_found_together() {
    for asked in [
        ":BF16",
        ":bf16",
        ":Model-BF16",
        "/BF16/Model-BF16-00001-of-00003.gguf",
        "/BF16/Model-BF16-00002-of-00003.gguf",
        ":Model-BF16-00001-of-00003.gguf",
        "@main:BF16",
        "@main:Model-BF16-00003-of-00003.gguf",
    ] {
        let hub = Hub::start(ID, repository(&GGUFS));
        let mut online = launcher(&hub, asked);
        let config = online.configuration();
        let path = Path::new(config["model"]["path"].as_str().unwrap());
        assert!(path.ends_with("BF16/Model-BF16-00001-of-00003.gguf"), "{asked}: {path:?}");
        for part in &GGUFS[5..] {
            assert_eq!(
                fs::read_to_string(path.parent().unwrap().join(part.rsplit('/').next().unwrap())).unwrap(),
                *part
            );
        }
        assert_eq!(hub.asked().len(), 4, "{asked}: the question for the commit, and three files");
        let mut offline = online.env("HF_HUB_OFFLINE", "1");
        assert_eq!(offline.configuration()["model"], config["model"], "{asked}");
        let second = path.with_file_name("Model-BF16-00002-of-00003.gguf");
        fs::remove_file(second.canonicalize().unwrap()).unwrap();
        let (status, log) = offline.fails();
        assert!(status == 64 && log.contains("is not in the cache"), "{asked}: {log}");
    }
    let alone = Hub::start(ID, repository(&["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]));
    let path = launcher(&alone, "").configuration()["model"]["path"].clone();
    assert!(path.as_str().unwrap().ends_with("/m-00001-of-00002.gguf"), "{path}");
    for (files, missing) in [
        (&["m-00001-of-00002.gguf"][..], "m-00002-of-00002.gguf"),
        (&["m-00002-of-00002.gguf"], "m-00001-of-00002.gguf"),
        (&["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"], "m-00002-of-00003.gguf"),
    ] {
        let (status, log) = launcher(&Hub::start(ID, repository(files)), "").fails();
        let cause = format!("org/name has no file {missing}, without which");
        assert!(status == 64 && log.contains(&cause), "{log}");
    }
}

#[test]
fn a_start_from_the_cache_makes_no_connection() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    nobody.set_nonblocking(true).unwrap();
    let address = format!("http://{}", nobody.local_addr().unwrap());
    let index = json!({"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}).to_string();
    let small = ["config.json", "tokenizer.json", "chat_template.jinja"];
    for (files, asked) in [
        (vec!["model.safetensors"], ""),
        (vec!["model.safetensors"], "@main"),
        (vec!["model.safetensors"], "@c0"),
        (vec!["pytorch_model.bin"], ""),
        (vec!["model.safetensors.index.json", "x-1.safetensors", "x-2.safetensors"], ""),
        (vec!["m.gguf"], "@main:m.gguf"),
        (vec!["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], "@c0:m"),
    ] {
        let contents =
            |name: &&'static str| (*name, if name.ends_with(".index.json") { &*index } else { *name });
        let all: Vec<_> = small.iter().chain(&files).map(contents).collect();
        let hub = Hub::start(ID, Repository::new(&all));
        let mut online = launcher(&hub, asked);
        let model = online.configuration()["model"].clone();
        let mut offline = online.env("HF_HUB_OFFLINE", "1").env("HF_ENDPOINT", &address);
        offline = ["http_proxy", "https_proxy", "all_proxy"]
            .iter()
            .fold(offline, |offline, name| offline.env(name, &address));
        assert_eq!(offline.configuration()["model"], model, "{files:?} {asked}");
        assert!(nobody.accept().is_err(), "{files:?} {asked}: a connection was made");
    }
}

/// The list is kept as the hub's own client keeps it, and that of the client is read.
#[test]
fn the_list_of_files_is_that_of_the_hubs_client() {
    let hub = Hub::start(ID, repository(&GGUFS));
    let filled = filled(&hub, &["/Model-Q8_0.gguf"], "");
    let text = fs::read_to_string(of_cache(&filled, "trees/c0.json")).unwrap();
    let list: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(list["format_version"], 1);
    assert_eq!(list["files"].as_object().unwrap().len(), GGUFS.len());
    assert_eq!(list["files"]["Model-Q8_0.gguf"], json!({"size": 15, "blob_id": "b0"}));
    assert_eq!(fs::read_dir(of_cache(&filled, "trees")).unwrap().count(), 1, "nothing is left beside it");
}
