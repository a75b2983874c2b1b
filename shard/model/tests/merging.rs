//! Merging takes what was said before. One test to a process, whose memory is measured.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/memory.rs"]
mod memory;

use std::{collections::BTreeMap, path::Path};

use kernels::{DType, testing::Numbers};
use memory::{BESIDES, peak_of};
use model::{
    Decoder, Share,
    adapter::{
        AdapterFiles, BaseModel, ContentHash, Elementwise, MajoritySign, Merge, MergePart, Recipe, Strategy,
    },
    testing::{self, Files, Tensor},
};
use serde_json::json;

const HIDDEN: usize = 1024;
const WIDTH: usize = 4096;

/// An adapter of a model with wide layers, of which nothing but the configuration exists.
fn adapter(lora_rank: usize, seed: u64) -> Files {
    let mut numbers = Numbers(seed);
    let mut files = testing::adapter(&["down_proj"], lora_rank, seed);
    files.tensors = BTreeMap::new();
    for layer in 0..2 {
        for (matrix, shape) in [("A", [lora_rank, WIDTH]), ("B", [HIDDEN, lora_rank])] {
            let name = format!("base_model.model.model.layers.{layer}.mlp.down_proj.lora_{matrix}.weight");
            files.tensors.insert(name, Tensor::random(&mut numbers, &shape, 0.5));
        }
    }
    files
}

fn base(folder: &Path) -> BaseModel {
    let mut files = testing::model();
    files.config["hidden_size"] = json!(HIDDEN);
    files.config["intermediate_size"] = json!(WIDTH);
    files.write_model(folder).unwrap();
    let decoder = Decoder::from_folder(folder).unwrap();
    BaseModel { merged: None, decoder, path: folder.into(), dtype: DType::Bf16, share: Share::WHOLE }
}

#[test]
fn merging_takes_what_was_said() {
    let folder = tempfile::tempdir().unwrap();
    let base = base(folder.path());
    // The first one measures most: an allocator keeps some of what it has been given back.
    let mut first = true;
    let elementwise = [
        Elementwise::Linear,
        Elementwise::Ties,
        Elementwise::DareLinear,
        Elementwise::DareTies,
        Elementwise::MagnitudePrune,
    ];
    let strategies = [Strategy::Svd, Strategy::Cat].into_iter();
    for strategy in strategies.chain(elementwise.map(Strategy::Elementwise)) {
        let lora_rank = if strategy == Strategy::Svd { 64 } else { 512 };
        for count in [5, 2, 1] {
            let part = |number: usize| {
                let at = folder.path().join(format!("{number}"));
                adapter(lora_rank, number as u64).write_adapter(&at).unwrap();
                MergePart { name: "part".into(), files: AdapterFiles::open(&at).unwrap(), weight: 0.5 }
            };
            let parts: Vec<MergePart> = (0..count).map(part).collect();
            let (density, majority_sign) = (Some(0.5), MajoritySign::Total);
            let recipe = Recipe { strategy, density, majority_sign, svd_rank: None, seed: 0 };
            let opened = Merge::open(parts, &recipe, &base).unwrap();
            let said = opened.read_bytes();
            let peak = peak_of(|| drop(opened.read_as(ContentHash([0; 32]), &|| false).unwrap()));
            assert!(peak <= said + BESIDES, "{strategy:?} {count}: {peak}, {said} were said");
            assert!(!first || peak >= said / 3, "{strategy:?} {count}: {peak}, {said} were said");
            first = false;
        }
    }
}
