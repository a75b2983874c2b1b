use std::{collections::BTreeSet, fs, path::Path};

use serde::Deserialize;

use super::*;
use crate::testing::seeded::Manifest;

/// What transformers and PEFT have, see `integration-tests/fixtures/make_modules.py`.
#[derive(Deserialize)]
struct Family {
    family: String,
    targets: BTreeSet<String>,
    /// Those of the first layer stand for all layers.
    paths: BTreeSet<String>,
}

/// PEFT matches patterns with every module, so that one too many or too few is another adapter.
#[test]
fn modules_are_those_of_transformers() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures");
    let text = fs::read(fixtures.join("config/modules.json")).unwrap();
    let families: Vec<Family> = serde_json::from_slice(&text).unwrap();
    assert_eq!(families.len(), 11);
    for Family { family, targets, paths } in families {
        let manifest = Manifest::read(&fixtures.join("families").join(&family).join("model.json")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), manifest.config.to_string()).unwrap();
        let decoder = Decoder::from_folder(folder.path()).unwrap();
        let modules = Modules::of(&decoder);
        let ours = modules.iter().filter(|module| module.layer.is_none_or(|layer| layer == 0));
        let names = decoder.names;
        let (outer, inner) = names.others;
        let inner = inner.iter().map(|path| format!("{}.0.{path}", names.layers));
        let others = outer.iter().map(|path| (*path).to_owned()).chain(inner);
        let others = others.map(|path| path.trim_end_matches('.').to_owned());
        let ours: BTreeSet<String> = ours.map(|module| module.path.clone()).chain(others).collect();
        assert_eq!(ours, paths, "{family}");
        let known: BTreeSet<String> = names.targets.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(known, targets, "{family}");
    }
}
