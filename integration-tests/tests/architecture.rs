//! The boundaries of ARCHITECTURE.md, checked against the tree.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Leaf crates, which several programs share. Any crate may depend on them, and they depend on none of ours.
const LEAVES: &[&str] = &["config", "gguf", "lifecycle", "sampling", "sources", "store", "telemetry"];

/// The crates of ours that each other crate may depend on, beside the leaves. Dependencies of tests are included.
const EDGES: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("kernels", &[]),
    ("model", &["kernels"]),
    ("scheduler", &[]),
    ("exchange", &["scheduler"]),
    ("lorax-shard", &["proto", "model", "kernels"]),
    ("lorax-router", &["proto", "scheduler", "exchange"]),
    ("lorax-launcher", &[]),
    ("integration-tests", &["proto"]),
    ("fuzz-targets", &["lorax-router", "model", "kernels", "proto"]),
];

/// Longest source file, in lines. Tests and generated code apart.
const MAX_LINES: usize = 600;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace root").to_owned()
}

fn packages() -> Vec<serde_json::Value> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

/// Names of the direct dependencies of every workspace crate.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let name = |v: &serde_json::Value| v["name"].as_str().unwrap().to_owned();
    packages()
        .iter()
        .map(|p| (name(p), p["dependencies"].as_array().unwrap().iter().map(name).collect()))
        .collect()
}

/// Every source file that git tracks or would track, relative to the root.
fn sources(extensions: &[&str]) -> Vec<PathBuf> {
    let out = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout)
        .unwrap()
        .lines()
        .map(PathBuf::from)
        .filter(|f| f.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)))
        .filter(|f| root().join(f).exists())
        .collect()
}

fn read(file: &Path) -> String {
    fs::read_to_string(root().join(file)).unwrap()
}

/// Files with a line that holds `needle`, comments apart.
fn files_with(needle: &str) -> BTreeSet<String> {
    sources(&["rs"])
        .into_iter()
        .filter(|f| !f.ends_with("integration-tests/tests/architecture.rs"))
        .filter(|f| read(f).lines().any(|l| l.contains(needle) && !l.trim_start().starts_with("//")))
        .map(|f| f.to_string_lossy().into_owned())
        .collect()
}

#[test]
fn crates_depend_only_on_what_the_picture_allows() {
    let actual = dependencies();
    let ours: BTreeSet<&str> = EDGES.iter().map(|(name, _)| *name).chain(LEAVES.iter().copied()).collect();
    assert_eq!(actual.keys().map(String::as_str).collect::<BTreeSet<_>>(), ours, "crates of the workspace");
    for name in &ours {
        let edges = EDGES.iter().find(|(from, _)| from == name);
        for dependency in actual[*name].iter().filter(|d| ours.contains(d.as_str())) {
            let allowed = edges.is_some_and(|(_, to)| to.iter().chain(LEAVES).any(|to| to == dependency));
            assert!(allowed, "{name} must not depend on {dependency}");
        }
    }
}

#[test]
fn the_pure_crates_stay_pure() {
    let actual = dependencies();
    for name in ["scheduler", "exchange"] {
        let packages = packages();
        let package = packages.iter().find(|package| package["name"] == name).unwrap();
        // The kind of a dependency is null unless it is for tests or for the build.
        let uses = |dependency: &&serde_json::Value| dependency["kind"].is_null();
        let needed = package["dependencies"].as_array().unwrap().iter().find(uses);
        assert!(needed.is_none(), "{name}: std only, not {needed:?}");
    }
    for (name, banned) in [
        ("kernels", &["tokio", "tonic", "prost", "serde", "serde_json"][..]),
        ("model", &["tokio", "tonic", "prost", "cudarc"]),
        ("proto", &["tokio", "serde"]),
        ("lorax-launcher", &["tonic", "prost"]),
    ] {
        for b in banned {
            assert!(!actual[name].contains(*b), "{name} must not depend on {b}");
        }
    }
}

#[test]
fn wire_types_stop_at_one_module_a_side() {
    let allowed = ["router/src/wire.rs", "router/src/wire/", "shard/src/wire.rs", "shard/src/wire/"];
    for file in files_with("proto::") {
        let test = file.contains("/tests/") || file.contains("/benches/");
        // The generated client and service are not wire types: somebody has to call and to implement them.
        let connection = file.starts_with("router/src/ranks") || file == "shard/src/service.rs";
        assert!(
            test || connection || allowed.iter().any(|place| file.starts_with(place)),
            "{file} names wire types"
        );
    }
}

#[test]
fn the_cuda_feature_is_known_to_kernels_and_the_shards_entry_point_only() {
    for file in files_with("feature = \"cuda\"") {
        assert!(file.starts_with("kernels/") || file == "shard/src/main.rs", "{file} knows a backend");
    }
}

#[test]
fn unsafe_code_lives_in_kernels() {
    for package in packages().iter().filter(|p| p["name"] != "kernels") {
        let manifest = fs::read_to_string(package["manifest_path"].as_str().unwrap()).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true"), "{} has lints of its own", package["name"]);
    }
}

#[test]
fn no_file_is_long() {
    for file in sources(&["rs", "cu", "cuh", "py", "sh"]) {
        let name = file.to_string_lossy().into_owned();
        if name.contains("/gen/") || name.contains("/tests/") || name.ends_with("/tests.rs") {
            continue;
        }
        let text = read(&file);
        let code = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or(&text);
        let lines = code.lines().count();
        assert!(lines <= MAX_LINES, "{name} has {lines} lines: a file that long holds two rooms");
    }
}

/// `std::thread::sleep` is denied by clippy. Tokio's may pace a load or a retry, but a test waits for the event itself.
#[test]
fn tests_do_not_sleep() {
    for file in sources(&["rs"]) {
        let name = file.to_string_lossy().into_owned();
        let text = read(&file);
        let tests = if name.contains("/tests/") || name.ends_with("/tests.rs") {
            &*text
        } else {
            text.split_once("mod tests {").map_or("", |(_, tests)| tests)
        };
        let sleeps = ["sleep(", "sleep;", "sleep}", "sleep,", "sleep_until("];
        let found = |line: &&str| {
            sleeps.iter().any(|sleep| line.contains(sleep)) && !line.trim_start().starts_with("//")
        };
        let line = tests.lines().filter(|_| !name.ends_with("tests/architecture.rs")).find(found);
        assert!(line.is_none(), "{name} sleeps: {line:?}");
    }
}

#[test]
fn no_mod_rs_and_no_unfinished_work() {
    for file in sources(&["rs"]) {
        let test_support = file.components().any(|c| c.as_os_str() == "tests");
        assert!(test_support || !file.ends_with("mod.rs"), "{}: use foo.rs + foo/", file.display());
    }
    for marker in ["#[ignore", "todo!(", "unimplemented!(", "FIXME"] {
        let found = files_with(marker);
        assert!(found.is_empty(), "{marker} in {found:?}");
    }
}
