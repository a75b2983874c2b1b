//! Models as GGUF files: what they compute is what the same model computes from a folder.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "gguf/architectures.rs"]
mod architectures;
#[path = "gguf/ends.rs"]
mod ends;
#[path = "gguf/keys.rs"]
mod keys;
#[path = "support/logits.rs"]
mod logits;
#[path = "gguf/mutations.rs"]
mod mutations;
#[path = "gguf/writer.rs"]
mod writer;

use std::path::Path;

use kernels::{DType, cpu::CpuBackend};
use logits::logits_of;
use model::{
    Decoder, Model,
    adapter::BaseModel,
    testing::{self, Files, Tensor},
};
use serde_json::json;
use writer::{DIM, Meta, converted, write};

/// Logits of a prompt, or why the model is refused.
fn logits(path: &Path) -> Result<Vec<f32>, String> {
    let ops = CpuBackend::new(DType::F32, 1).unwrap();
    let model = Model::load(&ops, path, &mut |_| {}).map_err(|error| error.to_string())?;
    Ok(logits_of(&ops, &model, 12))
}

fn folder_logits(files: &Files) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    files.write_model(folder.path()).unwrap();
    logits(folder.path()).unwrap()
}

/// Logits of a model converted to GGUF, with `extra` tensors.
fn gguf_logits(files: &Files, extra: &[(&str, Tensor)]) -> Result<Vec<f32>, String> {
    gguf_logits_with(files, extra, &[])
}

/// Logits of a model converted to GGUF, with `extra` tensors and with metadata besides, or in place of, the usual.
fn gguf_logits_with(
    files: &Files,
    extra: &[(&str, Tensor)],
    metadata: &[(&str, Meta)],
) -> Result<Vec<f32>, String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let converted = files.tensors.iter().map(|(name, tensor)| converted(name, tensor));
    let extra = extra.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone()));
    write(file.path(), &converted.chain(extra).collect::<Vec<_>>(), metadata);
    logits(file.path())
}

/// Logits of a model in a folder with a field set.
fn folder_logits_with(field: &str, value: serde_json::Value) -> Vec<f32> {
    let mut files = testing::model();
    files.config[field] = value;
    folder_logits(&files)
}

fn are_close(x: &[f32], y: &[f32]) -> bool {
    x.len() == y.len() && x.iter().zip(y).all(|(x, y)| (x - y).abs() < 1e-4)
}

/// A model with biases on the projections whose names hold one of `parts`.
fn biased(parts: &[&str]) -> Files {
    let mut files = testing::model();
    let mut biases = testing::Tensors::new();
    for (name, weight) in &files.tensors {
        if parts.iter().any(|part| name.contains(part)) {
            // Other than a permutation of itself, and large enough to matter.
            let data = weight.data.iter().step_by(weight.shape[1]).map(|x| 4.0 * x).collect();
            biases.insert(name.replace("weight", "bias"), Tensor { shape: vec![weight.shape[0]], data });
        }
    }
    files.tensors.extend(biases);
    files
}

#[test]
fn a_file_computes_what_the_folder_does() {
    let files = testing::model();
    assert_eq!(gguf_logits(&files, &[]).unwrap(), folder_logits(&files));
}

#[test]
fn biases_come_with_their_tensors() {
    let plain = folder_logits(&testing::model());
    for (part, flag) in [("self_attn", "attention_bias"), ("mlp", "mlp_bias")] {
        let mut files = biased(&[part]);
        files.config[flag] = json!(true);
        let logits = folder_logits(&files);
        assert_ne!(logits, plain);
        assert_eq!(gguf_logits(&files, &[]).unwrap(), logits, "{flag}");
    }
    // Any projection may have one without the others; a folder says the same with zeros.
    let some = biased(&["0.self_attn.q_proj", "1.self_attn.v_proj"]);
    let mut all = biased(&["self_attn"]);
    all.config["attention_bias"] = json!(true);
    for (name, tensor) in all.tensors.iter_mut().filter(|(name, _)| name.ends_with("bias")) {
        if !some.tensors.contains_key(name) {
            tensor.data.fill(0.0);
        }
    }
    let logits = folder_logits(&all);
    assert_ne!(logits, plain);
    assert_eq!(gguf_logits(&some, &[]).unwrap(), logits);
}

#[test]
fn a_tensor_that_no_module_takes_is_refused_by_name() {
    for name in [
        "blk.0.attn_q_norm.weight",
        "blk.0.attn_norm.bias",
        "blk.2.attn_q.weight",
        "blk.00.attn_q.weight",
        "output.bias",
        "rope_freqs",
    ] {
        let extra = Tensor { shape: vec![DIM], data: vec![3.0; DIM] };
        let refusal = gguf_logits(&testing::model(), &[(name, extra)]).unwrap_err();
        assert_eq!(refusal, format!("tensor {name} belongs to no module of the model"));
    }
}

#[test]
fn rotary_frequencies_are_divided_by_the_files_factors() {
    let mut files = testing::model();
    // What the converter computes from the parameters: 1, a ramp, and the whole factor.
    files.config["rope_scaling"] = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    });
    let inv_freq = |files: &Files| {
        let folder = tempfile::tempdir().unwrap();
        files.write_model(folder.path()).unwrap();
        Decoder::from_folder(folder.path()).unwrap().ropes.remove(0).inv_freq
    };
    let (plain, scaled) = (inv_freq(&testing::model()), inv_freq(&files));
    let data: Vec<f32> = plain.iter().zip(&scaled).map(|(plain, scaled)| plain / scaled).collect();
    assert_eq!((data[0], data[3]), (1.0, 8.0));
    let factors =
        |data: &[f32]| [("rope_freqs.weight", Tensor { shape: vec![data.len()], data: data.into() })];
    let (logits, expected) = (gguf_logits(&files, &factors(&data)).unwrap(), folder_logits(&files));
    assert!(are_close(&logits, &expected));
    let plain = folder_logits(&testing::model());
    assert!(logits.iter().zip(&plain).any(|(x, y)| (x - y).abs() > 1e-2), "they have a say");
    for (data, cause) in [
        (&data[..3], "tensor rope_freqs.weight has the shape [3], expected [4]"),
        (&[1.0, 0.0, 1.0, 1.0], "rope_freqs.weight is missing or not positive numbers"),
        (&[1.0, 1.0, f32::NAN, 1.0], "rope_freqs.weight is missing or not positive numbers"),
    ] {
        assert_eq!(gguf_logits(&files, &factors(data)).unwrap_err(), cause);
    }
}

/// Copies of a model's tables in an adapter are compared with those of a GGUF file, row by row.
#[test]
fn copies_of_tables_are_compared_with_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let (path, adapter) = (folder.path().join("model.gguf"), folder.path().join("adapter"));
    let files = testing::model();
    let tensors: Vec<_> = files.tensors.iter().map(|(name, tensor)| converted(name, tensor)).collect();
    write(&path, &tensors, &[]);
    let ops = CpuBackend::new(DType::F32, 1).unwrap();
    let decoder = Model::load(&ops, &path, &mut |_| {}).unwrap().decoder().clone();
    let base = BaseModel { merged: None, decoder, path, dtype: DType::F32, share: model::Share::WHOLE };
    let read = |module: &str, spoil: Option<usize>| {
        let mut copied = testing::adapter(&["q_proj"], 4, 1);
        let mut table = files.tensors[&format!("{module}.weight")].clone();
        if let Some(element) = spoil {
            table.data[element] += 0.5;
        }
        copied.tensors.insert(format!("base_model.model.{module}.weight"), table);
        copied.write_adapter(&adapter).unwrap();
        let parts = model::adapter::read(&adapter, &base).unwrap().parts;
        parts.into_iter().filter_map(|part| part.rows).flat_map(|rows| rows.ids.unwrap()).collect::<Vec<_>>()
    };
    for module in ["lm_head", "model.embed_tokens"] {
        assert!(read(module, None).is_empty());
        for row in [0, 1, 31, 63, 64, 95] {
            assert_eq!(read(module, Some(row * 32 + row % 32)), [row as u32], "{module}");
        }
    }
}
