//! Folders of a model in many shapes: those that transformers loads are loaded, as the same model.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/logits.rs"]
mod logits;

use std::{collections::BTreeMap, fs, os::unix::fs::symlink, path::Path};

use kernels::{DType, cpu::CpuBackend};
use model::{
    Model,
    testing::{self, Tensor, Tensors},
};
use safetensors::{
    Dtype, View,
    tensor::{TensorView, serialize_to_file},
};
use serde::Deserialize;
use serde_json::Value;

use logits::logits_of;

/// A folder, and what transformers makes of it; see `integration-tests/fixtures/make_folder_cases.py`.
#[derive(Deserialize)]
struct Case {
    name: String,
    /// The head is the embedding table.
    tied: bool,
    config: Value,
    tensors: BTreeMap<String, Named>,
    texts: BTreeMap<String, String>,
    links: BTreeMap<String, String>,
    broken: Vec<String>,
    loads: bool,
    /// The ends that transformers has.
    #[serde(default)]
    eos: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Named {
    /// All tensors of the base, under their own names.
    All(String),
    /// Names in the file, and the base's.
    Some(BTreeMap<String, String>),
}

fn write(case: &Case, base: &Tensors, at: &Path) {
    for (name, named) in &case.tensors {
        let tensors: BTreeMap<String, &Tensor> = match named {
            Named::All(all) => {
                assert_eq!(all, "all");
                base.iter().map(|(name, tensor)| (name.clone(), tensor)).collect()
            }
            Named::Some(named) => named.iter().map(|(name, source)| (name.clone(), &base[source])).collect(),
        };
        fs::create_dir_all(at.join(name).parent().unwrap()).unwrap();
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        serialize_to_file(tensors, Some(metadata), &at.join(name)).unwrap();
    }
    case.broken.iter().for_each(|name| fs::write(at.join(name), "no safetensors").unwrap());
    case.links.iter().for_each(|(name, target)| symlink(target, at.join(name)).unwrap());
    fs::write(at.join("config.json"), case.config.to_string()).unwrap();
    case.texts.iter().for_each(|(name, text)| fs::write(at.join(name), text).unwrap());
}

/// Logits of a prompt and the ends of a sequence, or why the folder is refused.
fn outcome(folder: &Path) -> Result<(Vec<f32>, Vec<u32>), String> {
    let ops = CpuBackend::new(DType::F32, 1).unwrap();
    let mut last = None;
    let model = Model::load(&ops, folder, &mut |progress| last = Some(progress))
        .map_err(|error| error.to_string())?;
    let last = last.unwrap();
    assert!(last.done_bytes <= last.total_bytes);
    Ok((logits_of(&ops, &model, 6), model.decoder().eos.clone()))
}

#[test]
fn folders_that_transformers_loads_are_loaded_as_the_same_model() {
    #[derive(Deserialize)]
    struct Cases {
        cases: Vec<Case>,
    }
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/folders/cases.json");
    let Cases { cases } = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    assert!(cases.len() > 40);
    let base = testing::model().tensors;
    let expected = |tied: bool| {
        let mut files = testing::model();
        if tied {
            files.tensors.insert("lm_head.weight".into(), base["model.embed_tokens.weight"].clone());
        }
        let folder = tempfile::tempdir().unwrap();
        files.write_model(folder.path()).unwrap();
        outcome(folder.path()).unwrap().0
    };
    let expected = [false, true].map(expected);
    assert_ne!(expected[0], expected[1]);
    for case in cases {
        let folder = tempfile::tempdir().unwrap();
        write(&case, &base, folder.path());
        let name = &case.name;
        match outcome(folder.path()) {
            Ok((logits, eos)) => {
                // The name of the architecture is enough here.
                assert!(case.loads || name == "no model_type", "{name}: transformers loads no such folder");
                assert_eq!(logits, expected[usize::from(case.tied)], "{name}");
                assert!(case.eos.iter().all(|end| eos.contains(end)), "{name}: {eos:?}, not {:?}", case.eos);
            }
            Err(refusal) => assert!(!case.loads, "{name}: {refusal}"),
        }
    }
}

/// A tensor of 64 bits.
struct Wide(Vec<usize>, Vec<u8>);

impl View for Wide {
    fn dtype(&self) -> Dtype {
        Dtype::F64
    }

    fn shape(&self) -> &[usize] {
        &self.0
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.1.as_slice().into()
    }

    fn data_len(&self) -> usize {
        self.1.len()
    }
}

#[test]
fn tensors_of_64_bits_are_rounded() {
    let base = testing::model();
    let folder = tempfile::tempdir().unwrap();
    base.write_model(folder.path()).unwrap();
    let expected = outcome(folder.path()).unwrap().0;
    let wide = base.tensors.iter().map(|(name, tensor)| {
        let data = tensor.data.iter().flat_map(|x| f64::from(*x).to_le_bytes()).collect();
        (name.clone(), Wide(tensor.shape.clone(), data))
    });
    let file = folder.path().join("model.safetensors");
    serialize_to_file(wide.collect::<Vec<_>>(), None, &file).unwrap();
    assert_eq!(outcome(folder.path()).unwrap().0, expected);
    let ids = [0u8; 8];
    let odd = TensorView::new(Dtype::I64, vec![1], &ids).unwrap();
    serialize_to_file([("model.norm.weight", odd)], None, &file).unwrap();
    let refusal = outcome(folder.path()).err().unwrap();
    assert!(refusal.contains("tensor model.embed_tokens.weight is missing"), "{refusal}");
}

/// A vocabulary that was padded has rows that no token of the tokenizer has; they are part of the model all the same.
#[test]
fn the_vocabulary_is_as_large_as_the_table() {
    for rows in [96, 97, 128, 1024] {
        let mut files = testing::model();
        files.config["vocab_size"] = rows.into();
        for name in ["model.embed_tokens.weight", "lm_head.weight"] {
            let tensor = files.tensors.get_mut(name).unwrap();
            tensor.shape[0] = rows;
            tensor.data.resize(rows * 32, 0.0);
        }
        let folder = tempfile::tempdir().unwrap();
        files.write_model(folder.path()).unwrap();
        assert_eq!(outcome(folder.path()).unwrap().0.len(), rows, "columns of the logits");
        let ops = CpuBackend::new(DType::F32, 1).unwrap();
        assert_eq!(Model::load(&ops, folder.path(), &mut |_| {}).unwrap().decoder().vocab, rows);
        files.config["vocab_size"] = (rows - 1).into();
        files.write_model(folder.path()).unwrap();
        let refusal = outcome(folder.path()).err().unwrap();
        assert!(
            refusal.contains(&format!("has the shape [{rows}, 32], expected [{}, 32]", rows - 1)),
            "{refusal}"
        );
    }
}
