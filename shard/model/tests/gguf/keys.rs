//! Metadata keys: computed as llama.cpp does, or refused by their names.

use std::path::Path;

use kernels::{DType, cpu::CpuBackend};
use model::{
    Model,
    testing::{self, Tensor},
};
use serde_json::{Value, json};

use crate::{
    Meta, are_close, folder_logits, folder_logits_with, gguf_logits_with,
    writer::{self, DIM},
};

fn logits(metadata: &[(&str, Meta)]) -> Result<Vec<f32>, String> {
    gguf_logits_with(&testing::model(), &[], metadata)
}

/// Keys of rotary scaling, and the same scaling in the words of a folder.
fn scalings() -> Vec<(Vec<(&'static str, Meta)>, Value)> {
    let (factor, kind) = ("llama.rope.scaling.factor", "llama.rope.scaling.type");
    let (linear, attn) = ("llama.rope.scale_linear", "llama.rope.scaling.attn_factor");
    let original = "llama.rope.scaling.original_context_length";
    let by = |factor: f32| json!({"type": "linear", "factor": factor});
    let yarn = |factor: f32, original: u32| json!({"type": "yarn", "factor": factor, "original_max_position_embeddings": original});
    let attended = |factor: f32, attention: f32| json!({"type": "yarn", "factor": factor, "original_max_position_embeddings": 64, "attention_factor": attention});
    vec![
        (vec![(linear, Meta::F32(4.0))], by(4.0)),
        (vec![(factor, Meta::F32(4.0))], by(4.0)),
        (vec![(factor, Meta::F32(2.0)), (linear, Meta::F32(4.0))], by(2.0)),
        (vec![(factor, Meta::F32(0.0)), (linear, Meta::F32(4.0))], Value::Null),
        (vec![(linear, Meta::F32(1.0))], Value::Null),
        (vec![(linear, Meta::F32(0.5))], by(0.5)),
        (vec![(kind, Meta::Str("linear")), (factor, Meta::F32(3.0))], by(3.0)),
        (vec![(kind, Meta::Str("linear")), (linear, Meta::F32(2.0))], by(2.0)),
        (vec![(kind, Meta::Str("linear"))], Value::Null),
        (vec![(kind, Meta::Str("none")), (factor, Meta::F32(4.0))], Value::Null),
        (vec![(kind, Meta::Str("none")), (linear, Meta::F32(4.0))], Value::Null),
        (vec![(kind, Meta::Str("yarn")), (factor, Meta::F32(4.0)), (original, Meta::U32(64))], yarn(4.0, 64)),
        (vec![(kind, Meta::Str("yarn")), (linear, Meta::F32(4.0)), (original, Meta::U32(64))], yarn(4.0, 64)),
        (vec![(kind, Meta::Str("yarn")), (factor, Meta::F32(8.0))], yarn(8.0, 256)),
        (
            vec![
                (kind, Meta::Str("yarn")),
                (factor, Meta::F32(4.0)),
                (original, Meta::U32(64)),
                (attn, Meta::F32(0.5)),
            ],
            attended(4.0, 0.5 * (1.0 + 0.1 * 4f32.ln())),
        ),
        // A factor of attention alone: YaRN by 1 scales nothing else.
        (vec![(attn, Meta::F32(0.7))], attended(1.0, 0.7)),
        (vec![(kind, Meta::Str("none")), (attn, Meta::F32(1.3))], attended(1.0, 1.3)),
        (
            vec![("llama.rope.freq_base", Meta::F32(500.0))],
            json!({"rope_type": "default", "rope_theta": 500.0}),
        ),
        (vec![("llama.rope.scaling.finetuned", Meta::Bool(true)), (factor, Meta::F32(2.0))], by(2.0)),
    ]
}

/// The longest sequence of a model in a folder or a file.
fn longest(path: &Path) -> usize {
    let ops = CpuBackend::new(DType::F32, 1).unwrap();
    Model::load(&ops, path, &mut |_| {}).unwrap().decoder().max_positions
}

#[test]
fn a_file_reaches_as_far_as_its_folder() {
    let mut scaled = 0;
    for (metadata, scaling) in scalings() {
        let mut files = testing::model();
        let tensors: Vec<_> =
            files.tensors.iter().map(|(name, tensor)| writer::converted(name, tensor)).collect();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.gguf");
        writer::write(&file, &tensors, &metadata);
        files.config["rope_scaling"] = scaling;
        files.write_model(folder.path()).unwrap();
        let expected = longest(folder.path());
        assert_eq!(longest(&file), expected, "{metadata:?}");
        scaled += usize::from(expected > 256);
    }
    assert_eq!(scaled, 7, "of a context of 256 tokens");
}

#[test]
fn rotary_scaling_is_computed() {
    let plain = folder_logits(&testing::model());
    for (metadata, scaling) in scalings() {
        let got = logits(&metadata).unwrap();
        assert!(are_close(&got, &folder_logits_with("rope_scaling", scaling.clone())), "{metadata:?}");
        assert_eq!(are_close(&got, &plain), scaling.is_null(), "{metadata:?}");
    }
}

#[test]
fn factors_of_frequencies_come_before_other_scaling() {
    let factors = [("rope_freqs.weight", Tensor { shape: vec![DIM / 2], data: vec![2.0; DIM / 2] })];
    let metadata = [("llama.rope.scale_linear", Meta::F32(2.0))];
    let got = gguf_logits_with(&testing::model(), &factors, &metadata).unwrap();
    let expected = folder_logits_with("rope_scaling", json!({"type": "linear", "factor": 4.0}));
    assert!(are_close(&got, &expected));
}

#[test]
fn what_would_change_the_output_is_refused_by_its_name() {
    let refused = [
        (
            "llama.rope.scaling.type",
            Meta::Str("longrope"),
            "longrope is not supported; known are none, linear, yarn",
        ),
        ("llama.rope.scaling.type", Meta::Str(""), " is not supported; known are none, linear, yarn"),
        ("llama.rope.scaling.factor", Meta::F32(-2.0), "-2 is not supported; known are positive numbers"),
        ("llama.rope.scaling.factor", Meta::F32(f32::NAN), "NaN is not supported"),
        ("llama.rope.scale_linear", Meta::F32(f32::INFINITY), "inf is not supported"),
        ("llama.rope.scaling.attn_factor", Meta::F32(0.0), "0 is not supported"),
        ("llama.rope.freq_base", Meta::F32(0.0), "0 is not supported"),
        ("llama.rope.freq_base_swa", Meta::F32(500.0), "500 is not supported"),
        ("llama.rope.scaling.yarn_log_multiplier", Meta::F32(0.1), "0.1 is not supported"),
        ("llama.rope.scaling.yarn_beta_fast", Meta::F32(16.0), "16 is not supported"),
        ("llama.rope.scaling.yarn_beta_slow", Meta::F32(2.0), "2 is not supported"),
        ("llama.rope.scaling.yarn_ext_factor", Meta::F32(0.5), "0.5 is not supported"),
        ("llama.rope.scaling.yarn_attn_factor", Meta::F32(2.0), "2 is not supported"),
        ("llama.rope.scaling.alpha", Meta::F32(1000.0), "1000 is not supported"),
        ("llama.rope.dimension_count", Meta::U32(4), "4 is not supported"),
        (
            "llama.rope.dimension_sections",
            Meta::Ints(vec![2, 2, 0, 0]),
            "an array of 4 integers is not supported",
        ),
        ("llama.attention.value_length", Meta::U32(16), "16 is not supported"),
        ("llama.attention.clamp_kqv", Meta::F32(8.0), "8 is not supported"),
        ("llama.attention.max_alibi_bias", Meta::F32(8.0), "8 is not supported"),
        ("llama.attention.scale", Meta::F32(0.125), "0.125 is not supported"),
        ("llama.attention.sliding_window", Meta::U32(64), "64 is not supported"),
        ("llama.attention.causal", Meta::Bool(false), "false is not supported"),
        ("llama.attn_logit_softcapping", Meta::F32(50.0), "50 is not supported"),
        ("llama.final_logit_softcapping", Meta::F32(30.0), "30 is not supported"),
        ("llama.logit_scale", Meta::F32(0.0625), "0.0625 is not supported"),
        ("llama.residual_scale", Meta::F32(0.22), "0.22 is not supported"),
        ("llama.embedding_scale", Meta::F32(12.0), "12 is not supported"),
        ("llama.expert_count", Meta::U32(8), "8 is not supported"),
        ("llama.expert_used_count", Meta::U32(2), "2 is not supported"),
        ("llama.use_parallel_residual", Meta::Bool(true), "true is not supported"),
        ("llama.nextn_predict_layers", Meta::U32(1), "1 is not supported"),
        ("llama.pooling_type", Meta::U32(1), "1 is not supported"),
        ("llama.hidden_activation", Meta::Str("gelu"), "gelu is not supported"),
        ("llama.tensor_data_layout", Meta::Str("interleaved"), "interleaved is not supported"),
        ("llama.something.new", Meta::F32(2.0), "2 is not supported"),
    ];
    expect_refusals(&refused);
    let wrong = logits(&[("llama.rope.scale_linear", Meta::U32(4))]).unwrap_err();
    assert_eq!(wrong, "metadata \"llama.rope.scale_linear\" is the integer 4, expected a float");
}

#[test]
fn what_is_no_whole_model_is_refused_by_its_name() {
    expect_refusals(&[
        ("general.type", Meta::Str("adapter"), "adapter is not supported"),
        ("general.type", Meta::Str("mmproj"), "mmproj is not supported"),
        (
            "general.architecture",
            Meta::Str("mamba"),
            "mamba is not supported; known are llama, qwen2, qwen3, gemma,",
        ),
        ("general.quantization_version", Meta::U32(1), "1 is not supported"),
        ("adapter.type", Meta::Str("lora"), "lora is not supported"),
        ("adapter.lora.alpha", Meta::F32(16.0), "16 is not supported"),
        ("controlvector.layer_count", Meta::U32(2), "2 is not supported"),
        ("tokenizer.ggml.suppress_tokens", Meta::Ints(vec![5]), "an array of 1 integers is not supported"),
    ]);
}

/// Each key with its value is refused by its name, and with that cause.
fn expect_refusals(refused: &[(&str, Meta, &str)]) {
    for (key, value, cause) in refused {
        let refusal = logits(&[(*key, value.clone())]).expect_err(&format!("{key} = {value:?}"));
        assert!(refusal.starts_with(key) && refusal.contains(cause), "{refusal}");
    }
}

#[test]
fn neutral_values_change_nothing() {
    let plain = logits(&[]).unwrap();
    for (key, value) in [
        ("general.type", Meta::Str("model")),
        ("general.name", Meta::Str("any")),
        ("general.quantization_version", Meta::U32(2)),
        ("general.sampling.temp", Meta::F32(0.2)),
        ("llama.vocab_size", Meta::U32(96)),
        ("llama.rope.dimension_count", Meta::U32(DIM as u32)),
        ("llama.attention.value_length", Meta::U32(DIM as u32)),
        ("llama.attention.scale", Meta::F32(1.0 / (DIM as f32).sqrt())),
        ("llama.attention.clamp_kqv", Meta::F32(0.0)),
        ("llama.attention.causal", Meta::Bool(true)),
        ("llama.attention.sliding_window", Meta::U32(256)),
        ("llama.attention.layer_norm_epsilon", Meta::F32(1e-6)),
        ("llama.logit_scale", Meta::F32(1.0)),
        ("llama.logit_scale", Meta::F32(0.0)),
        ("llama.expert_count", Meta::U32(0)),
        ("llama.rope.scaling.finetuned", Meta::Bool(false)),
        ("llama.rope.scaling.yarn_beta_fast", Meta::F32(32.0)),
        ("llama.tensor_data_layout", Meta::Str("Meta AI original pth")),
        ("llama.something.new", Meta::Bool(false)),
        ("split.count", Meta::U32(1)),
        ("quantize.imatrix.file", Meta::Str("any.dat")),
        ("tokenizer.ggml.suppress_tokens", Meta::Ints(vec![])),
    ] {
        assert_eq!(logits(&[(key, value.clone())]).unwrap(), plain, "{key} = {value:?}");
    }
    let bases = ["llama.rope.freq_base", "llama.rope.freq_base_swa"].map(|key| (key, Meta::F32(10_000.0)));
    assert_eq!(logits(&bases).unwrap(), plain);
}
