//! The pages, checked against the tree.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Longest line of a page, in characters; tables and code apart.
const MAX_COLUMNS: usize = 120;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace root").to_owned()
}

fn read(file: impl AsRef<Path>) -> String {
    fs::read_to_string(root().join(file)).unwrap()
}

/// Every page that git tracks or would track, with its text.
fn pages() -> Vec<(PathBuf, String)> {
    let out = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "*.md"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let names = String::from_utf8(out.stdout).unwrap();
    let there = names.lines().map(PathBuf::from).filter(|page| root().join(page).exists());
    there.map(|page| (page.clone(), read(page))).collect()
}

/// Lines of a page outside of code blocks.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut code = false;
    text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        code ^= fence;
        !code && !fence
    })
}

/// The words that follow each `before` in a text; a word ends at the first character that `is_part` refuses.
fn words<'a>(
    text: &'a str,
    before: &'a str,
    is_part: impl Fn(char) -> bool + Copy + 'a,
) -> impl Iterator<Item = &'a str> {
    text.split(before).skip(1).map(move |rest| &rest[..rest.find(|c| !is_part(c)).unwrap_or(rest.len())])
}

#[test]
fn lines_of_pages_are_short() {
    for (page, text) in pages() {
        let long = prose(&text).find(|line| !line.starts_with('|') && line.chars().count() > MAX_COLUMNS);
        assert_eq!(long, None, "{}", page.display());
    }
}

#[test]
fn links_of_pages_lead_to_files() {
    for (page, text) in pages() {
        let folder = root().join(page.parent().unwrap());
        let links = prose(&text).flat_map(|line| words(line, "](", |c| c != ')'));
        for link in links.filter(|link| !link.starts_with("http") && !link.starts_with('#')) {
            let file = link.split('#').next().unwrap();
            assert!(folder.join(file).exists(), "{}: {link}", page.display());
        }
    }
}

/// Pages say which file has what. A path is relative to the root, to the page, or to a crate or module that the page is
/// about. Decisions may name files of their time, and of other projects.
#[test]
fn files_that_pages_name_exist() {
    let folders =
        ["", "router/src", "router/scheduler/src", "router/tests/http", "shard/src", "shard/model/src"]
            .into_iter()
            .chain(["kernels", "kernels/src", "integration-tests"]);
    let folders: Vec<PathBuf> = folders.map(|folder| root().join(folder)).collect();
    for (page, text) in pages().into_iter().filter(|(page, _)| !page.starts_with("docs/decisions")) {
        let here = root().join(page.parent().unwrap());
        for word in prose(&text).flat_map(|line| line.split('`').skip(1).step_by(2)) {
            let is_path = word.contains('/') && !word.contains(['*', '{', ' ', '<', '$', '~']);
            let source =
                [".rs", ".py", ".cu", ".cuh", ".sh", ".proto", ".md"].iter().any(|end| word.ends_with(end));
            if is_path && source {
                let mut from = folders.iter().chain([&here]);
                assert!(from.any(|folder| folder.join(word).exists()), "{}: {word}", page.display());
            }
        }
    }
}

#[test]
fn every_route_is_documented() {
    let (routes, api) = (read("router/src/server/routes.rs"), read("docs/api.md"));
    let paths: BTreeSet<&str> = words(&routes, ".route(\"", |c| c != '"').collect();
    assert!(paths.contains("/generate"), "{paths:?}");
    for path in paths {
        let path = path.replace("{*", "{");
        let mentioned = ["GET", "POST"].iter().any(|method| api.contains(&format!("`{method} {path}`")));
        assert!(mentioned, "{path} is not in docs/api.md");
    }
}

#[test]
fn every_flag_that_a_page_names_exists() {
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let mut flags = BTreeSet::from(["api-key".to_owned(), "help".into()]);
    for file in ["config/src/router.rs", "config/src/shard.rs", "config/src/log.rs", "launcher/src/args.rs"] {
        let text = read(file);
        let fields = text.lines().filter_map(|line| {
            let line = line.trim_start();
            let line = line.strip_prefix("pub(crate) ").or_else(|| line.strip_prefix("pub "))?;
            Some(line.split_once(':')?.0.replace('_', "-"))
        });
        flags.extend(fields);
        flags.extend(words(&text, "alias = \"", is_name).map(str::to_owned));
    }
    assert!(flags.contains("max-batch-size"), "{flags:?}");
    for page in ["README.md", "ARCHITECTURE.md", "docs/api.md", "docs/metrics.md", "docs/scheduling.md"] {
        let text = read(page);
        for flag in words(&text, "`--", is_name) {
            assert!(flags.contains(flag), "{page} names --{flag}");
        }
    }
}
