//! Which model folders are refused, and with which words.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::Path};

use kernels::{DType, cpu::CpuBackend};
use model::{
    Model,
    testing::{self, Files, Tensor, Tensors},
};
use serde_json::json;

fn load(folder: &Path) -> model::Result<Model<CpuBackend>> {
    let ops = CpuBackend::new(DType::F32, 1).unwrap();
    Model::load(&ops, folder, &mut |_| {})
}

/// The message that a folder is refused with.
fn refusal(folder: &Path) -> String {
    load(folder).err().expect("it loaded").to_string()
}

#[test]
fn a_folder_loads_and_shows_its_progress() {
    let folder = tempfile::tempdir().unwrap();
    testing::model().write_model(folder.path()).unwrap();
    fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [2, 7]}"#).unwrap();
    let ops = CpuBackend::new(DType::Bf16, 1).unwrap();
    let mut seen = Vec::new();
    let model = Model::load(&ops, folder.path(), &mut |progress| seen.push(progress)).unwrap();
    assert_eq!(model.decoder().eos, [2, 7]);
    assert!(seen.windows(2).all(|pair| pair[0].done_bytes < pair[1].done_bytes));
    assert_eq!(seen.last().unwrap().done_bytes, seen[0].total_bytes, "it ends at the whole");
}

/// Memory by positions is for what is served, and not for what a model could do.
#[test]
fn positions_that_are_not_served_take_no_memory() {
    let folder = tempfile::tempdir().unwrap();
    let ops = CpuBackend::new(DType::F32, 1).unwrap();
    for (trained, asked, served) in [
        (256, usize::MAX, 256),
        (256, 257, 256),
        (256, 255, 255),
        (256, 2, 2),
        (1 << 22, 4096, 4096),
        (1 << 22, usize::MAX, 1 << 22),
    ] {
        for scaling in
            [json!(null), json!({"type": "dynamic", "factor": 1.0}), json!({"type": "yarn", "factor": 1.0})]
        {
            let mut files = testing::model();
            files.config["max_position_embeddings"] = json!(trained);
            files.config["rope_scaling"] = scaling;
            files.write_model(folder.path()).unwrap();
            let model = Model::load_for(&ops, folder.path(), None, asked, &mut |_| {}).unwrap();
            let decoder = model.decoder();
            assert_eq!(
                (decoder.max_positions, decoder.ropes[0].positions),
                (served, served),
                "{trained}, {asked}"
            );
        }
    }
}

/// As in transformers, whose factor has the type of the weights: 55.43 becomes 55.5 for a Gemma of hidden size 3072.
#[test]
fn the_factor_of_embeddings_has_the_type_of_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let mut files = testing::model();
    files.config["model_type"] = json!("gemma");
    files.config["hidden_act"] = json!("gelu_pytorch_tanh");
    files.write_model(folder.path()).unwrap();
    for (dtype, scale) in [(DType::F32, 32_f32.sqrt()), (DType::Bf16, 5.65625)] {
        let ops = CpuBackend::new(dtype, 1).unwrap();
        let model = Model::load(&ops, folder.path(), &mut |_| {}).unwrap();
        assert_eq!(model.decoder().embedding.scale, scale, "{dtype:?}");
    }
}

#[test]
fn sharded_weights_load_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let files = testing::model();
    files.write_model(folder.path()).unwrap();
    let (first, second): (Tensors, Tensors) =
        files.tensors.clone().into_iter().partition(|(name, _)| name.contains("layers.0"));
    let shards = [("model-1.safetensors", first), ("model-2.safetensors", second)];
    let mut weight_map = serde_json::Map::new();
    for (shard, tensors) in shards {
        weight_map.extend(tensors.keys().map(|name| (name.clone(), shard.into())));
        Files { tensors, ..files.clone() }.write_model(&folder.path().join("part")).unwrap();
        fs::rename(folder.path().join("part/model.safetensors"), folder.path().join(shard)).unwrap();
    }
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    fs::write(&index, json!({"weight_map": weight_map}).to_string()).unwrap();
    assert!(load(folder.path()).is_ok());
    fs::remove_file(folder.path().join("model-2.safetensors")).unwrap();
    assert!(refusal(folder.path()).contains("model-2.safetensors: No such file"));
    fs::write(&index, "{\"weight_map\": 3}").unwrap();
    assert!(refusal(folder.path()).contains("index.json: invalid type"));
}

#[test]
fn a_head_that_is_not_the_table_is_used() {
    let mut files = testing::model();
    files.config["tie_word_embeddings"] = json!(true);
    let tied = |files: &Files| {
        let folder = tempfile::tempdir().unwrap();
        files.write_model(folder.path()).unwrap();
        load(folder.path()).unwrap().decoder().head.tied
    };
    assert!(!tied(&files), "the file has another one");
    files.tensors.insert("lm_head.weight".into(), files.tensors["model.embed_tokens.weight"].clone());
    assert!(tied(&files), "the file has it twice");
    files.tensors.remove("lm_head.weight");
    assert!(tied(&files));
}

#[test]
fn weights_that_contradict_the_configuration_are_refused() {
    type Spoil = fn(&mut Files);
    let cases: [(Spoil, &str); 6] = [
        (
            |files| drop(files.tensors.remove("model.layers.1.mlp.up_proj.weight")),
            "tensor model.layers.1.mlp.up_proj.weight is missing",
        ),
        (
            |files| {
                let transposed = Tensor { shape: vec![32, 48], data: vec![0.0; 32 * 48] };
                files.tensors.insert("model.layers.0.mlp.gate_proj.weight".into(), transposed);
            },
            "tensor model.layers.0.mlp.gate_proj.weight has the shape [32, 48], expected [48, 32]",
        ),
        (|files| files.config["vocab_size"] = json!(97), "has the shape [96, 32], expected [97, 32]"),
        (
            |files| files.config["num_hidden_layers"] = json!(3),
            "tensor model.layers.2.input_layernorm.weight",
        ),
        (
            |files| {
                files.config["attention_bias"] = json!(true);
                let bias = Tensor { shape: vec![31], data: vec![0.0; 31] };
                files.tensors.insert("model.layers.0.self_attn.o_proj.bias".into(), bias);
            },
            "tensor model.layers.0.self_attn.o_proj.bias has the shape [1, 31], expected [1, 32]",
        ),
        (|files| files.config["quantization_config"] = json!({"bits": 4}), "quantization_config"),
    ];
    for (spoil, cause) in cases {
        let folder = tempfile::tempdir().unwrap();
        let mut files = testing::model();
        spoil(&mut files);
        files.write_model(folder.path()).unwrap();
        let refusal = refusal(folder.path());
        assert!(refusal.contains(cause), "{refusal}");
    }
}

#[test]
fn damaged_files_are_refused() {
    type Spoil = fn(&Path, Vec<u8>);
    let cases: [(Spoil, &str); 7] = [
        (|file, _| fs::remove_file(file).unwrap(), "No such file"),
        (|file, all| fs::write(file, &all[..all.len() - 5]).unwrap(), "truncated"),
        (|file, all| fs::write(file, &all[..100]).unwrap(), "truncated"),
        (|file, _| fs::write(file, b"abc").unwrap(), "truncated: 3 bytes"),
        (|file, all| fs::write(file, [&[255; 8], &all[8..]].concat()).unwrap(), "corrupt"),
        (
            |file, all| fs::write(file, [&all[..8], &[b'x'; 50], &all[58..]].concat()).unwrap(),
            "corrupt header",
        ),
        (|file, all| fs::write(file, [all, vec![0; 9]].concat()).unwrap(), "bytes of tensors in"),
    ];
    for (spoil, cause) in cases {
        let folder = tempfile::tempdir().unwrap();
        testing::model().write_model(folder.path()).unwrap();
        let file = folder.path().join("model.safetensors");
        spoil(&file, fs::read(&file).unwrap());
        let refusal = refusal(folder.path());
        assert!(refusal.contains(cause) && refusal.contains("model.safetensors"), "{cause}: {refusal}");
    }
    let folder = tempfile::tempdir().unwrap();
    assert!(refusal(folder.path()).contains("config.json: No such file"));
    fs::write(folder.path().join("config.json"), "{").unwrap();
    assert!(refusal(folder.path()).contains("config.json: EOF"));
    fs::write(folder.path().join("model.gguf"), "GGUFabc").unwrap();
    let gguf = refusal(&folder.path().join("model.gguf"));
    assert!(gguf.contains("truncated"), "{gguf}");
}
