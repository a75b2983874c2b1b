//! Models as GGUF files: what they compute is what the same model computes from a folder.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, path::Path};

use kernels::{Backend, DType, Solo, cpu::CpuBackend, testing::batch};
use model::{
    Model, Pass, Rope, RopeScaling,
    testing::{self, Files, Tensor},
};
use serde_json::json;

/// Shape of the heads of [`testing::model`].
const DIM: usize = 8;

fn text(to: &mut Vec<u8>, text: &str) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}

/// The converter's order of the outputs of q and k: the halves of every head interleaved.
fn permute(tensor: &Tensor) -> Tensor {
    let width = tensor.data.len() / tensor.shape[0];
    let source = |row: usize| row / DIM * DIM + row % 2 * (DIM / 2) + row % DIM / 2;
    let rows = (0..tensor.shape[0]).flat_map(|row| &tensor.data[source(row) * width..][..width]);
    Tensor { shape: tensor.shape.clone(), data: rows.copied().collect() }
}

/// A tensor as the converter writes it.
fn converted(name: &str, tensor: &Tensor) -> (String, Tensor) {
    let mut ggml = name.replace("model.layers.", "blk.");
    for (part, renamed) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ] {
        ggml = ggml.replace(part, renamed);
    }
    let permuted = ggml.contains("attn_q") || ggml.contains("attn_k");
    (ggml, if permuted { permute(tensor) } else { tensor.clone() })
}

/// Writes a model of the sizes of [`testing::model`] with these tensors, which have the file's names.
fn write(path: &Path, tensors: &[(String, Tensor)]) {
    const PAIRS: [(&str, u32); 8] = [
        ("llama.embedding_length", 32),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.attention.key_length", DIM as u32),
        ("llama.block_count", 2),
        ("llama.feed_forward_length", 48),
        ("llama.context_length", 256),
        ("tokenizer.ggml.eos_token_id", 2),
    ];
    let mut file = [&b"GGUF"[..], &3u32.to_le_bytes(), &(tensors.len() as u64).to_le_bytes()].concat();
    file.extend((PAIRS.len() as u64 + 2).to_le_bytes());
    for (key, value) in PAIRS {
        text(&mut file, key);
        file.extend([4u32, value].map(u32::to_le_bytes).concat());
    }
    text(&mut file, "general.architecture");
    file.extend(8u32.to_le_bytes());
    text(&mut file, "llama");
    text(&mut file, "llama.attention.layer_norm_rms_epsilon");
    file.extend(6u32.to_le_bytes());
    file.extend(1e-5f32.to_le_bytes());
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        text(&mut file, name);
        file.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|d| file.extend((*d as u64).to_le_bytes()));
        file.extend(0u32.to_le_bytes());
        file.extend((data.len() as u64).to_le_bytes());
        data.extend(tensor.data.iter().flat_map(|x| x.to_le_bytes()));
        data.resize(data.len().next_multiple_of(32), 0);
    }
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    fs::write(path, file).unwrap();
}

/// Logits of a prompt, or why the model is refused.
fn logits(path: &Path) -> Result<Vec<f32>, String> {
    let ops = CpuBackend::new(DType::F32, 1).unwrap();
    let model = Model::load(&ops, path, &mut |_| {}).map_err(|error| error.to_string())?;
    let host = batch(&[(12, 0)], &[]);
    let mut device = ops.batch(host.rows(), host.blocks.len()).unwrap();
    ops.upload(&host, &mut device).unwrap();
    let slots = ops.lora_slots(&model.sites(), 1).unwrap();
    let sampler = ops.sampler(1, model.config().vocab).unwrap();
    let mut scratch = model.scratch(&ops, host.rows(), 1).unwrap();
    let mut kv = model.kv_cache(&ops, 1 + *host.blocks.iter().max().unwrap() as usize).unwrap();
    let pass = Pass { ops: &ops, batch: &device, slots: &slots, sampler: &sampler, comm: &Solo };
    model.forward(&pass, &mut scratch, &mut kv).unwrap();
    Ok(ops.download(&scratch.logits).unwrap())
}

fn folder_logits(files: &Files) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    files.write_model(folder.path()).unwrap();
    logits(folder.path()).unwrap()
}

/// Logits of a model converted to GGUF, with `extra` tensors.
fn gguf_logits(files: &Files, extra: &[(&str, Tensor)]) -> Result<Vec<f32>, String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let converted = files.tensors.iter().map(|(name, tensor)| converted(name, tensor));
    let extra = extra.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone()));
    write(file.path(), &converted.chain(extra).collect::<Vec<_>>());
    logits(file.path())
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
    let refusal = gguf_logits(&biased(&["q_proj", "k_proj", "v_proj"]), &[]).unwrap_err();
    assert_eq!(refusal, "tensor model.layers.0.self_attn.o_proj.bias is missing");
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
    let mut rope = Rope {
        theta: 10_000.0,
        scaling: RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 64.0 },
    };
    let scaled = rope.inv_freq(DIM);
    rope.scaling = RopeScaling::None;
    let data: Vec<f32> =
        rope.inv_freq(DIM).iter().zip(&scaled).map(|(plain, scaled)| plain / scaled).collect();
    assert_eq!((data[0], data[3]), (1.0, 8.0));
    let factors =
        |data: &[f32]| [("rope_freqs.weight", Tensor { shape: vec![data.len()], data: data.into() })];
    let (logits, expected) = (gguf_logits(&files, &factors(&data)).unwrap(), folder_logits(&files));
    assert!(logits.iter().zip(&expected).all(|(x, y)| (x - y).abs() < 1e-4));
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
