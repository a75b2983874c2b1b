//! Reading an adapter takes what was said before it was read. One test to a process, whose memory is measured.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/memory.rs"]
mod memory;

use std::path::Path;

use kernels::DType;
use memory::{BESIDES, peak_of};
use model::{
    Decoder,
    adapter::{AdapterFolder, BaseModel},
    testing::{self, Tensor},
};
use serde_json::json;

#[test]
fn reading_takes_what_was_said() {
    let folder = tempfile::tempdir().unwrap();
    let (path, at) = (folder.path().join("model"), folder.path().join("adapter"));
    testing::model().write_model(&path).unwrap();
    let decoder = Decoder::from_folder(&path).unwrap();
    // Of 50 MB in f32.
    let names = ["q_proj", "o_proj", "gate_proj", "down_proj"];
    testing::adapter(&names, 20_000, 1).write_adapter(&at).unwrap();
    let types = [(DType::Bf16, 25), (DType::F32, 50), (DType::F16, 25)];
    for (dtype, megabytes) in types {
        let model =
            BaseModel { decoder: decoder.clone(), path: path.clone(), dtype, share: model::Share::WHOLE };
        expect_peak(&at, &model, megabytes);
    }
    // A table of 50 MB, of which the model has 50 MB, too.
    const ROWS: usize = 400_000;
    let mut files = testing::model();
    files.config["vocab_size"] = ROWS.into();
    let table = |value| Tensor { shape: vec![ROWS, 32], data: vec![value; ROWS * 32] };
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        files.tensors.insert(name.into(), table(0.5));
    }
    files.write_model(&path).unwrap();
    let mut saved = testing::adapter(&names, 4, 1);
    saved.config["modules_to_save"] = json!(["lm_head"]);
    saved.tensors.insert("base_model.model.lm_head.weight".into(), table(0.25));
    saved.write_adapter(&at).unwrap();
    drop((files, saved));
    let decoder = Decoder::from_folder(&path).unwrap();
    for (dtype, megabytes) in types {
        let model =
            BaseModel { decoder: decoder.clone(), path: path.clone(), dtype, share: model::Share::WHOLE };
        expect_peak(&at, &model, megabytes);
    }
}

/// Reads an adapter of about so many megabytes.
fn expect_peak(at: &Path, model: &BaseModel, megabytes: usize) {
    let dtype = model.dtype;
    let mut opened = None;
    let peak = peak_of(|| opened = Some(AdapterFolder::open(at, model).unwrap()));
    assert!(peak <= 2 * BESIDES, "{dtype:?}: {peak} before anything is read");
    let opened = opened.unwrap();
    let said = opened.read_bytes();
    let peak = peak_of(|| drop(opened.read().unwrap()));
    assert!(peak <= said + BESIDES, "{dtype:?}: {peak}, {said} were said");
    assert!(peak >= megabytes * 900_000, "{dtype:?}: {peak} are less than the adapter");
    // Hardly more than the adapter itself: a tensor at a time is converted.
    assert!(said <= megabytes * 2_000_000, "{dtype:?}: {said}");
}
