//! Staging an adapter takes the memory that its host copy takes, and no other that grows with it. One test to a
//! process, whose memory is measured.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/memory.rs"]
mod memory;

use std::{fs, path::Path};

use kernels::{DType, cpu::CpuBackend, prelude::*};
use memory::{BESIDES, peak_of};
use model::{
    Decoder,
    adapter::{self, AdapterFolder, BaseModel},
    testing::{self, Tensor},
};
use serde_json::json;

/// Types of backends, each with the bytes of an element.
const TYPES: [(DType, usize); 2] = [(DType::Bf16, 2), (DType::F32, 4)];

fn model(path: &Path, dtype: DType) -> BaseModel {
    let decoder = Decoder::from_folder(path).unwrap();
    BaseModel { merged: None, decoder, path: path.to_owned(), dtype, share: model::Share::WHOLE }
}

#[test]
fn staging_takes_what_was_said() {
    let folder = tempfile::tempdir().unwrap();
    let (path, at) = (folder.path().join("model"), folder.path().join("adapter"));
    let torch = at.join(adapter::WEIGHTS_FILES[1]);
    testing::model().write_model(&path).unwrap();
    let names = ["q_proj", "o_proj", "gate_proj", "down_proj"];
    // Of 11.5 million elements.
    let plain = testing::adapter(&names, 20_000, 1);
    for (dtype, size) in TYPES {
        plain.write_adapter(&at).unwrap();
        expect_peak(&at, &model(&path, dtype), 11 * size);
        fs::remove_file(at.join(adapter::WEIGHTS_FILES[0])).unwrap();
        testing::write_torch(&torch, &plain.tensors).unwrap();
        expect_peak(&at, &model(&path, dtype), 11 * size);
        fs::remove_file(&torch).unwrap();
    }
    drop(plain);
    // A table of 12.8 million elements, of which the model has as many, too.
    const ROWS: usize = 400_000;
    let mut files = testing::model();
    files.config["vocab_size"] = ROWS.into();
    let table = |value| Tensor { shape: vec![ROWS, 32], data: vec![value; ROWS * 32] };
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        files.tensors.insert(name.into(), table(0.5));
    }
    files.write_model(&path).unwrap();
    let mut saved = testing::adapter(&names, 4, 1);
    for module in ["lm_head", "embed_tokens"] {
        saved.config["modules_to_save"] = json!([module]);
        let name = if module == "lm_head" { module.to_owned() } else { format!("model.{module}") };
        let name = format!("base_model.model.{name}.weight");
        saved.tensors.insert(name.clone(), table(0.25));
        saved.write_adapter(&at).unwrap();
        saved.tensors.remove(&name);
        for (dtype, size) in TYPES {
            expect_peak(&at, &model(&path, dtype), 11 * size);
        }
    }
}

/// Stages an adapter of about so many megabytes.
fn expect_peak(at: &Path, model: &BaseModel, megabytes: usize) {
    let dtype = model.dtype;
    let ops = CpuBackend::new(dtype, 1).unwrap();
    let sites = model.decoder.sites();
    let mut opened = None;
    let peak = peak_of(|| opened = Some(AdapterFolder::open(at, model).unwrap()));
    assert!(peak <= 2 * BESIDES, "{dtype:?}: {peak} before anything is read");
    let opened = opened.unwrap();
    let said = ops.host_bytes(&sites, &opened.shapes()).unwrap();
    let peak = peak_of(|| drop(opened.stage(&ops, &sites, 0, &|| false).unwrap()));
    assert!(peak <= said + BESIDES, "{dtype:?}: {peak}, {said} were said");
    assert!(said >= megabytes * 1_000_000, "{dtype:?}: {said} are less than the adapter");
    assert!(said <= megabytes * 1_500_000, "{dtype:?}: {said}");
}
