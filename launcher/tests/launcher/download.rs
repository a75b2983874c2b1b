//! Models from a hub.

use std::{
    fs::{self, File},
    net::{TcpListener, TcpStream},
    path::Path,
};

use serde_json::{Value, json};

use crate::{
    hub::{Hub, Repository, Trouble},
    launcher::Launcher,
};

const ID: &str = "org/name";
const FILES: [(&str, &str); 5] = [
    ("config.json", "{}"),
    ("tokenizer.json", "{\"a\": 1}"),
    ("model.safetensors", "these are the weights"),
    ("README.md", "not needed"),
    ("pytorch_model.bin", "not needed either"),
];

fn launcher(hub: &Hub, id: &str) -> Launcher {
    Launcher::new().env("HF_ENDPOINT", &hub.url).args(&["--model-id", id])
}

/// Names and texts of the files in the folder of the model.
fn files(config: &Value) -> Vec<(String, String)> {
    let folder = Path::new(config["model"]["path"].as_str().unwrap());
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|file| file.unwrap().path())
        .map(|path| {
            (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read_to_string(path).unwrap())
        })
        .collect();
    files.sort();
    files
}

fn owned(files: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut files: Vec<_> = files.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect();
    files.sort();
    files
}

#[test]
fn what_is_needed_is_fetched_once() {
    let hub = Hub::start(ID, Repository::new(&FILES));
    let mut launcher = launcher(&hub, ID);
    let config = launcher.configuration();
    assert_eq!(files(&config), owned(&FILES[..3]));
    let path = config["model"]["path"].as_str().unwrap();
    assert!(path.starts_with(launcher.folder().join("hf/hub").to_str().unwrap()), "{path}: HF_HOME counts");
    assert_eq!((&config["model"]["id"], &config["model"]["sha"]), (&json!(ID), &json!("c0")));
    assert!(hub.asked().iter().all(|path| !path.contains("README") && !path.contains(".bin")));
    assert_eq!(launcher.configuration()["model"]["path"], path);
    assert_eq!(hub.asked(), ["/api/models/org/name/revision/main"]);
}

#[test]
fn a_branch_that_moved_is_fetched_whole() {
    let hub = Hub::start(ID, Repository::new(&FILES));
    let mut launcher = launcher(&hub, ID);
    launcher.configuration();
    // Only the weights differ: the rest must not come from the other commit's folder, nor the weights.
    let moved = [FILES[0], FILES[1], ("model.safetensors", "better weights")];
    hub.replace(Repository::new(&FILES).with("main", "c1", &moved));
    let config = launcher.configuration();
    assert_eq!(config["model"]["sha"], "c1");
    assert_eq!(files(&config), owned(&moved));
}

#[test]
fn a_revision_is_asked_for_by_flag_or_name() {
    let tagged = [FILES[0], FILES[1], ("model.safetensors", "tagged")];
    let hub = Hub::start(ID, Repository::new(&FILES).with("v2", "c2", &tagged));
    for (id, args) in [("org/name@v2", &[][..]), (ID, &["--revision", "v2"]), ("org/name@c2", &[])] {
        let mut launcher = launcher(&hub, id).args(args);
        let config = launcher.configuration();
        assert_eq!(config["model"]["sha"], "c2");
        assert_eq!(files(&config), owned(&tagged));
        assert_eq!(config["model"]["id"], ID);
    }
    let (status, log) = launcher(&hub, "org/name@v3").fails();
    assert_eq!(status, 64);
    assert!(log.contains("org/name") && log.contains("404"), "{log}");
}

#[test]
fn an_empty_revision_is_none() {
    let hub = Hub::start(ID, Repository::new(&FILES).with("v2", "c2", &FILES));
    let named = |id: &str, revision: &str| launcher(&hub, id).env("REVISION", revision).configuration();
    for (id, sha, revision) in
        [(ID, "c0", Value::Null), ("org/name@", "c0", Value::Null), ("org/name@v2", "c2", json!("v2"))]
    {
        let model = &named(id, "")["model"];
        assert_eq!((&model["sha"], &model["revision"]), (&json!(sha), &revision), "{id}");
    }
    assert_eq!(named("org/name@", "v2")["model"]["sha"], "c2");
}

#[test]
fn a_token_opens_what_is_not_public() {
    let hub = Hub::start_with(ID, Repository::new(&FILES), Some("secret"));
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
        let mut launcher = launcher(&hub, ID).env(name, "secret");
        let config = launcher.configuration();
        assert_eq!(files(&config), owned(&FILES[..3]), "{name}");
    }
    let (status, log) = launcher(&hub, ID).env("HF_TOKEN", "wrong").fails();
    assert_eq!(status, 64);
    assert!(log.contains("org/name") && log.contains("401"), "{log}");
    assert!(!log.contains("wrong"), "no credential is logged: {log}");
}

/// The lock is that of `huggingface_hub`, beside whose downloads ours may run.
#[test]
fn a_file_that_another_process_fetches_is_waited_for() {
    let hub = Hub::start(ID, Repository::new(&FILES));
    let mut known = launcher(&hub, ID);
    let fetched = known.configuration();
    let link = Path::new(fetched["model"]["path"].as_str().unwrap()).join("model.safetensors");
    let etag = fs::canonicalize(link).unwrap().file_name().unwrap().to_owned();
    let locked = |launcher: &Launcher| {
        let cache = launcher.folder().join("hf/hub");
        let locks = cache.join(".locks/models--org--name");
        fs::create_dir_all(&locks).unwrap();
        fs::create_dir_all(cache.join("models--org--name/blobs")).unwrap();
        let mut name = etag.clone();
        name.push(".lock");
        let lock = File::create(locks.join(name)).unwrap();
        lock.lock().unwrap();
        (lock, cache.join("models--org--name/blobs").join(&etag))
    };
    let stalled = impatient(launcher(&hub, ID));
    let _held = locked(&stalled);
    let (status, log) = stalled.fails();
    assert_eq!(status, 1, "{log}");
    assert!(log.contains("waiting for model.safetensors: nothing came for 1 s"), "{log}");

    let mut waiting = launcher(&hub, ID);
    let (lock, blob) = locked(&waiting);
    let mut running = waiting.start();
    running.until("fetching what is not in the cache");
    fs::write(blob, "from the other process").unwrap();
    drop(lock);
    running.until("router up");
    running.signal("-TERM");
    assert_eq!(running.ended().0, Some(0));
    let config = fs::read(waiting.folder().join("config.json")).unwrap();
    let files = files(&serde_json::from_slice(&config).unwrap());
    assert!(files.contains(&("model.safetensors".into(), "from the other process".into())), "{files:?}");
}

/// Large files are kept elsewhere. Who keeps them must not learn the token.
#[test]
fn a_redirect_is_followed_without_the_token() {
    let elsewhere = Hub::start(ID, Repository::new(&FILES));
    let hub = Hub::start_with(ID, Repository::new(&FILES), Some("secret"));
    hub.redirect_to(&elsewhere);
    elsewhere.break_off(&["model.safetensors"]);
    let mut launcher = launcher(&hub, ID).env("HF_TOKEN", "secret");
    let config = launcher.configuration();
    assert_eq!(files(&config), owned(&FILES[..3]));
    assert!(hub.credentials().iter().all(|credential| credential == "Bearer secret"));
    assert!(elsewhere.credentials().is_empty());
    assert_eq!(elsewhere.resumed(), [FILES[2].1.len() / 2]);
    let file = Path::new(config["model"]["path"].as_str().unwrap()).join("model.safetensors");
    assert!(fs::canonicalize(file).unwrap().ends_with("blobs/linked-model.safetensors"));
}

#[test]
fn what_else_a_hub_says_is_refused() {
    let outside = [("config.json", "{}"), ("model.safetensors", "x"), ("../../../outside", "y")];
    let hub = Hub::start(ID, Repository::new(&outside));
    let (status, log) = launcher(&hub, ID).fails();
    assert_eq!(status, 64, "{log}");
    assert!(log.contains("\"../../../outside\" is not a name"), "{log}");
    let (status, log) = Launcher::new().env("HF_ENDPOINT", "not a url").args(&["--model-id", ID]).fails();
    assert_eq!(status, 64, "{log}");
    assert!(log.contains("HF_ENDPOINT: relative URL without a base"), "{log}");
}

/// An error page is never taken for a file, however the hub spells its trouble.
#[test]
fn an_error_is_not_kept_as_a_file() {
    let hub = Hub::start(ID, Repository::new(&FILES));
    let mut first = launcher(&hub, ID);
    hub.fail(Trouble::Files("500 Internal Server Error"));
    let running = first.start();
    let (status, log) = running.ended();
    assert_eq!(status, Some(1), "{log:?}");
    hub.recover();
    assert_eq!(files(&first.configuration()), owned(&FILES[..3]));
}

#[test]
fn every_file_of_an_index_is_fetched() {
    let index =
        json!({"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-1.safetensors"}});
    let index = index.to_string();
    let all = [
        ("config.json", "{}"),
        ("model.safetensors.index.json", &index),
        ("x-1.safetensors", "one"),
        ("x-2.safetensors", "two"),
    ];
    let hub = Hub::start(ID, Repository::new(&all));
    let mut launcher = launcher(&hub, ID);
    assert_eq!(files(&launcher.configuration()), owned(&all));
}

/// As transformers takes them.
#[test]
fn a_whole_file_goes_before_an_index_that_is_left_over() {
    let index = json!({"weight_map": {"a": "gone-1.safetensors"}}).to_string();
    let all = [FILES[0], FILES[1], FILES[2], ("model.safetensors.index.json", &*index)];
    let hub = Hub::start(ID, Repository::new(&all));
    let mut launcher = launcher(&hub, ID);
    assert_eq!(files(&launcher.configuration()), owned(&FILES[..3]));
    let mut launcher = launcher.env("HF_HUB_OFFLINE", "1");
    assert_eq!(files(&launcher.configuration()), owned(&FILES[..3]));
}

#[test]
fn an_index_names_files_of_its_repository_alone() {
    for (index, cause) in [
        (r#"{"weight_map": {"a": "../../../../outside"}}"#, "is not in the repository"),
        (r#"{"weight_map": {"a": 7}}"#, "invalid type"),
        ("nonsense", "expected"),
    ] {
        let hub = Hub::start(
            ID,
            Repository::new(&[("config.json", "{}"), ("model.safetensors.index.json", index)]),
        );
        let (status, log) = launcher(&hub, ID).fails();
        assert_eq!(status, 64, "{log}");
        assert!(log.contains("model.safetensors.index.json") && log.contains(cause), "{log}");
    }
}

#[test]
fn a_single_gguf_file_is_a_model() {
    let hub = Hub::start(ID, Repository::new(&[("README.md", "x"), ("m.gguf", "weights")]));
    let mut launcher = launcher(&hub, ID);
    let config = launcher.configuration();
    let path = Path::new(config["model"]["path"].as_str().unwrap());
    assert_eq!(
        (path.file_name().unwrap(), &*fs::read_to_string(path).unwrap()),
        ("m.gguf".as_ref(), "weights")
    );
    let mut offline = launcher.env("HF_HUB_OFFLINE", "1");
    assert_eq!(offline.configuration()["model"], config["model"]);
}

/// transformers takes safetensors where there are both, and one file before an index.
#[test]
fn files_of_torch_are_fetched_where_there_are_no_others() {
    let index = r#"{"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}"#;
    let both = [("pytorch_model-1.bin", "1"), ("pytorch_model-2.bin", "2")];
    let (whole, named) = (("pytorch_model.bin", "w"), ("pytorch_model.bin.index.json", index));
    let small = [("config.json", "{}"), ("tokenizer.model", "t"), ("vocab.json", "v"), ("merges.txt", "m")];
    type Named = (&'static str, &'static str);
    let cases: [(Vec<Named>, &[&str], &[&str]); 3] = [
        (vec![whole], &["pytorch_model.bin"], &[]),
        ([vec![named], both.to_vec()].concat(), &["pytorch_model-1.bin", "pytorch_model-2.bin"], &[]),
        (vec![whole, ("model.safetensors", "s")], &["model.safetensors"], &["pytorch_model.bin"]),
    ];
    for (weights, fetched, left) in cases {
        let hub = Hub::start(ID, Repository::new(&[small.to_vec(), weights].concat()));
        let mut launcher = launcher(&hub, ID);
        let config = launcher.configuration();
        let folder = Path::new(config["model"]["path"].as_str().unwrap());
        for name in fetched.iter().chain(&["tokenizer.model", "vocab.json", "merges.txt"]) {
            assert!(folder.join(name).exists(), "{name}");
        }
        assert!(left.iter().all(|name| !folder.join(name).exists()), "{left:?}");
        let mut offline = launcher.env("HF_HUB_OFFLINE", "1");
        assert_eq!(offline.configuration()["model"], config["model"]);
    }
}

/// A repository with several GGUF files, and others beside them.
const GGUFS: [&str; 12] = [
    "README.md",
    "config.json",
    "Model-Q4_K_M.gguf",
    "Model-Q8_0.gguf",
    "Model-UD-Q4_K_XL.gguf",
    "Model-Q4_K_XL.gguf",
    "model.q5_1.gguf",
    "BF16/Model-BF16-00001-of-00002.gguf",
    "BF16/Model-BF16-00002-of-00002.gguf",
    "deep/er/Model-IQ1_S.gguf",
    "mmproj-Model-f16.gguf",
    "Model.imatrix.gguf",
];

fn repository(files: &[&str]) -> Repository {
    Repository::new(&files.iter().map(|name| (*name, *name)).collect::<Vec<_>>())
}

#[test]
fn one_of_several_gguf_files_is_named() {
    let hub = Hub::start(ID, repository(&GGUFS).with("v2", "c2", &[("Model-Q8_0.gguf", "of v2")]));
    for (spelling, file, content) in [
        (":Q4_K_M", "Model-Q4_K_M.gguf", "Model-Q4_K_M.gguf"),
        (":q4_k_m", "Model-Q4_K_M.gguf", "Model-Q4_K_M.gguf"),
        (":Q5_1", "model.q5_1.gguf", "model.q5_1.gguf"),
        (":UD-Q4_K_XL", "Model-UD-Q4_K_XL.gguf", "Model-UD-Q4_K_XL.gguf"),
        (":iq1_s", "deep/er/Model-IQ1_S.gguf", "deep/er/Model-IQ1_S.gguf"),
        (":Model-Q8_0.gguf", "Model-Q8_0.gguf", "Model-Q8_0.gguf"),
        ("/Model-Q4_K_XL.gguf", "Model-Q4_K_XL.gguf", "Model-Q4_K_XL.gguf"),
        ("/deep/er/Model-IQ1_S.gguf", "deep/er/Model-IQ1_S.gguf", "deep/er/Model-IQ1_S.gguf"),
        (":Q8_0@v2", "Model-Q8_0.gguf", "of v2"),
        ("@v2:q8_0", "Model-Q8_0.gguf", "of v2"),
        ("/Model-Q8_0.gguf@v2", "Model-Q8_0.gguf", "of v2"),
    ] {
        let mut launcher = launcher(&hub, &format!("{ID}{spelling}"));
        hub.asked();
        let config = launcher.configuration();
        let path = config["model"]["path"].as_str().unwrap();
        assert!(path.ends_with(&format!("/{file}")), "{spelling}: {path}");
        assert_eq!(fs::read_to_string(path).unwrap(), content, "{spelling}");
        assert_eq!(hub.asked().len(), 2, "{spelling}: the question for the commit, and one file");
        let mut offline = launcher.env("HF_HUB_OFFLINE", "1");
        assert_eq!(offline.configuration()["model"], config["model"], "{spelling}");
    }
    let mut launcher = launcher(&hub, &format!("hf.co/{ID}:Q8_0"));
    assert_eq!(launcher.configuration()["model"]["id"], json!("org/name:Q8_0"));
}

#[test]
fn gguf_files_that_cannot_be_chosen_are_refused_by_name() {
    let several = "org/name has several GGUF files, so that one must be named, as org/name/FILE or org/name:TYPE; it \
                   has: BF16/Model-BF16-00001-of-00002.gguf, ";
    let hub = Hub::start(ID, repository(&GGUFS));
    for (spelling, cause) in [
        ("", several),
        (":Q2_K", "org/name has 0 GGUF files that \"Q2_K\" names; it has: "),
        (":Q4_K", "org/name has 0 GGUF files that \"Q4_K\" names"),
        (":Q4_K_XL", "org/name has 2 GGUF files that \"Q4_K_XL\" names"),
        (":00001", "org/name has 0 GGUF files that \"00001\" names"),
        ("/Model-BF16-00001-of-00002.gguf", "org/name has 0 GGUF files"),
        (":f16", "org/name has 0 GGUF files that \"f16\" names"),
        ("/mmproj-Model-f16.gguf", "org/name has 0 GGUF files"),
        ("/Model-IQ1_S.gguf", "org/name has 0 GGUF files that \"Model-IQ1_S.gguf\" names"),
        (":", "neither a path that exists nor a hub id"),
        ("/../Model-Q8_0.gguf", "neither a path that exists nor a hub id"),
    ] {
        let (status, log) = launcher(&hub, &format!("{ID}{spelling}")).fails();
        assert!(status == 64 && log.contains(cause), "{spelling}: {log}");
    }
    let tower = Hub::start(ID, repository(&["m.gguf", "mmproj-m.gguf"]));
    let config = launcher(&tower, ID).configuration();
    assert!(config["model"]["path"].as_str().unwrap().ends_with("/m.gguf"), "a tower is no choice");
}

#[test]
fn weights_in_no_known_format_are_refused() {
    for names in [&["config.json", "flax_model.msgpack"][..], &["README.md", "mmproj-m.gguf"]] {
        let hub = Hub::start(ID, repository(names));
        let (status, log) = launcher(&hub, ID).fails();
        assert_eq!(status, 64);
        let cause = "neither safetensors, pytorch_model.bin nor GGUF files";
        assert!(log.contains(cause) && log.contains(names[1]), "{log}");
    }
}

#[test]
fn offline_the_cache_is_enough() {
    let hub = Hub::start(ID, Repository::new(&FILES).with("v2", "c2", &FILES));
    let (status, log) = launcher(&hub, ID).env("HF_HUB_OFFLINE", "1").fails();
    assert_eq!(status, 64);
    assert!(log.contains("org/name at main is not in the cache, and HF_HUB_OFFLINE is set"), "{log}");
    let mut launcher = launcher(&hub, ID);
    let online = launcher.configuration();
    hub.asked();
    let mut launcher = launcher.env("HF_HUB_OFFLINE", "1");
    assert_eq!(launcher.configuration()["model"], online["model"]);
    let (status, log) = launcher.args(&["--revision", "v2"]).fails();
    assert_eq!(status, 64);
    assert!(log.contains("at v2"), "{log}");
    assert!(hub.asked().is_empty(), "nobody was asked");
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_was() {
    let weights = "these are the weights".repeat(100_000);
    let large = [FILES[0], FILES[1], ("model.safetensors", &*weights)];
    let hub = Hub::start(ID, Repository::new(&large));
    hub.break_off(&["config.json", "model.safetensors", "model.safetensors", "model.safetensors"]);
    let mut launcher = launcher(&hub, ID);
    assert_eq!(files(&launcher.configuration()), owned(&large));
    let (half, rest) = (weights.len() / 2, weights.len() - weights.len() / 2);
    assert_eq!(hub.resumed(), [1, half, half + rest / 2]);
}

/// The URL of a hub that is not there. The port is that of a client, and no hub's as long as this client lives.
fn nowhere() -> (String, (TcpListener, TcpStream)) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (format!("http://{}", client.local_addr().unwrap()), (listener, client))
}

/// All that makes a hub useless, with what is said of it.
const TROUBLES: [(Trouble, &str); 5] = [
    (Trouble::Status("503 Service Unavailable"), "status code 503"),
    (Trouble::Status("429 Too Many Requests"), "status code 429"),
    (Trouble::Silence, "timed out"),
    // Asked for first.
    (Trouble::NoFiles, "config.json"),
    (Trouble::Stall, "nothing came for 1 s (HF_HUB_DOWNLOAD_TIMEOUT)"),
];

/// One that soon finds that a hub does not answer.
fn impatient(launcher: Launcher) -> Launcher {
    launcher.env("HF_HUB_ETAG_TIMEOUT", "1").env("HF_HUB_DOWNLOAD_TIMEOUT", "1")
}

/// The model's path and commit as the router gets them from a launcher that must say `warning`.
fn warned(launcher: &mut Launcher, warning: &str) -> Value {
    let mut running = launcher.start();
    let lines = running.until("router up");
    let said = lines.iter().find(|line| line.contains("using what is in the cache"));
    assert!(
        said.is_some_and(|line| line.contains("WARN") && line.contains(warning)),
        "{warning}: {lines:#?}"
    );
    running.signal("-TERM");
    assert_eq!(running.ended().0, Some(0));
    let config: Value =
        serde_json::from_slice(&fs::read(launcher.folder().join("config.json")).unwrap()).unwrap();
    config["model"].clone()
}

#[test]
fn what_is_in_the_cache_is_served_while_the_hub_cannot_be_reached() {
    let moved = [FILES[0], FILES[1], ("model.safetensors", "better weights")];
    for (trouble, cause) in TROUBLES {
        let hub = Hub::start(ID, Repository::new(&FILES));
        let mut launcher = launcher(&hub, ID);
        let before = launcher.configuration();
        hub.replace(Repository::new(&FILES).with("main", "c1", &moved));
        hub.fail(trouble);
        let mut launcher = impatient(launcher);
        assert_eq!(warned(&mut launcher, cause), before["model"]);
        assert_eq!(files(&before), owned(&FILES[..3]));
    }
    let hub = Hub::start(ID, Repository::new(&FILES));
    let mut launcher = launcher(&hub, ID);
    let before = launcher.configuration();
    let (nowhere, _held) = nowhere();
    assert_eq!(warned(&mut launcher.env("HF_ENDPOINT", &nowhere), &nowhere), before["model"]);
}

#[test]
fn without_a_hub_and_a_whole_copy_nothing_is_served() {
    let index = json!({"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}).to_string();
    let sharded = [
        ("config.json", "{}"),
        ("model.safetensors.index.json", &*index),
        ("x-1.safetensors", "one"),
        ("x-2.safetensors", "two"),
    ];
    for (all, lost) in
        [(&FILES[..3], "model.safetensors"), (&FILES[..3], "config.json"), (&sharded, "x-2.safetensors")]
    {
        let hub = Hub::start(ID, Repository::new(all));
        let mut launcher = launcher(&hub, ID);
        let config = launcher.configuration();
        let file = Path::new(config["model"]["path"].as_str().unwrap()).join(lost);
        fs::remove_file(file.canonicalize().unwrap()).unwrap();
        hub.fail(Trouble::Status("500 Internal Server Error"));
        let (status, log) = launcher.fails();
        assert_eq!(status, 1, "{lost}: {log}");
        assert!(log.contains("org/name at main is not in the cache"), "{lost}: {log}");
        assert!(log.contains("the hub cannot be reached") && log.contains("status code 500"), "{log}");
    }
}

#[test]
fn a_hub_that_is_not_there_is_named() {
    for (trouble, cause) in TROUBLES {
        let hub = Hub::start(ID, Repository::new(&FILES));
        hub.fail(trouble);
        let (status, log) = impatient(launcher(&hub, ID)).fails();
        assert_eq!(status, 1, "{log}");
        assert!(log.contains("org/name at main") && log.contains(cause), "{log}");
    }
    let (nowhere, _held) = nowhere();
    let (status, log) = Launcher::new().env("HF_ENDPOINT", &nowhere).args(&["--model-id", ID]).fails();
    assert_eq!(status, 1);
    assert!(log.contains("org/name at main") && log.contains(&nowhere), "{log}");
}

#[test]
fn what_the_hub_refuses_is_not_served_from_the_cache() {
    for refusal in ["401 Unauthorized", "403 Forbidden", "404 Not Found"] {
        let hub = Hub::start(ID, Repository::new(&FILES));
        let mut launcher = launcher(&hub, ID);
        launcher.configuration();
        hub.fail(Trouble::Status(refusal));
        let (status, log) = launcher.fails();
        assert_eq!(status, 64, "{log}");
        assert!(log.contains("org/name") && log.contains(&refusal[..3]), "{log}");
    }
}

#[test]
fn a_download_can_be_stopped() {
    for (trouble, signal) in [
        (Trouble::Silence, "-TERM"),
        (Trouble::Silence, "-INT"),
        (Trouble::Stall, "-TERM"),
        (Trouble::Stall, "-INT"),
        (Trouble::Files("503 Service Unavailable"), "-TERM"),
    ] {
        let hub = Hub::start(ID, Repository::new(&FILES));
        hub.fail(trouble);
        let mut launcher = launcher(&hub, ID);
        let running = launcher.start();
        while hub.asked().is_empty() {
            std::thread::yield_now();
        }
        running.signal(signal);
        // A signal that nobody handles ends the process as well, unless it is the first one of a container.
        let (status, log) = running.ended();
        assert_eq!(status, Some(0), "{trouble:?} {signal}: {log:#?}");
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_read() {
    let hub = Hub::start(ID, Repository::new(&FILES).with("v2", "c0", &FILES));
    let mut launcher = launcher(&hub, ID);
    let before = launcher.configuration();
    let refs = Path::new(before["model"]["path"].as_str().unwrap()).join("../../refs");
    for revision in ["main", "v2"] {
        let _ = fs::remove_file(refs.join(revision));
        // Even root cannot write to it then.
        fs::create_dir(refs.join(revision)).unwrap();
    }
    assert_eq!(launcher.configuration()["model"], before["model"]);
    let mut launcher = launcher.args(&["--revision", "v2"]);
    assert_eq!(launcher.configuration()["model"]["path"], before["model"]["path"]);
}

#[test]
fn downloads_are_off_where_the_hubs_own_client_takes_them_to_be() {
    let hub = Hub::start(ID, Repository::new(&FILES));
    for (value, offline) in [
        ("1", true),
        ("ON", true),
        ("on", true),
        ("Yes", true),
        ("true", true),
        ("TRUE", true),
        ("0", false),
        ("", false),
        ("false", false),
        ("False", false),
        ("no", false),
        ("OFF", false),
    ] {
        let mut launcher = launcher(&hub, ID).env("HF_HUB_OFFLINE", value);
        if offline {
            let (status, log) = launcher.fails();
            assert_eq!(status, 64, "{value:?}: {log}");
            assert!(log.contains("HF_HUB_OFFLINE is set"), "{value:?}: {log}");
        } else {
            launcher.configuration();
        }
    }
}
