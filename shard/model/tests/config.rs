//! What is read in a `config.json`: the numbers that transformers reads, or a refusal that names the field.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "config/limits.rs"]
mod limits;
#[path = "config/mutations.rs"]
mod mutations;
#[path = "config/odd.rs"]
mod odd;
#[path = "config/published.rs"]
mod published;
#[path = "config/saved.rs"]
mod saved;

use std::{fs, path::Path};

use model::Decoder;
use serde::Deserialize;
use serde_json::{Value, json};

/// What transformers reads, see `integration-tests/fixtures/make_config_cases.py`.
#[derive(Deserialize)]
struct Case {
    config: Value,
    inv_freq: Vec<f32>,
    attention_factor: f32,
    kv_heads: usize,
    head_dim: usize,
    window: Option<u32>,
    eos: Vec<u32>,
    tied: bool,
    attention_bias: bool,
    mlp_bias: bool,
}

fn read(config: &Value) -> Result<Decoder, String> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    Decoder::from_folder(folder.path()).map_err(|error| error.to_string())
}

fn base() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "intermediate_size": 112, "vocab_size": 320, "max_position_embeddings": 256,
        "rope_theta": 10000.0, "eos_token_id": [1, 2],
    })
}

fn with(field: &str, value: Value) -> Result<Decoder, String> {
    let mut json = base();
    json[field] = value;
    read(&json)
}

#[test]
fn configurations_are_read_as_transformers_reads_them() {
    #[derive(Deserialize)]
    struct Cases {
        cases: Vec<Case>,
    }
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/config/cases.json");
    let Cases { cases } = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert!(cases.len() > 30);
    for case in cases {
        let config = read(&case.config).unwrap();
        let read = &case.config;
        let close = |x: f32, y: f32| (x - y).abs() <= 2e-6 * y.abs();
        assert_eq!(config.ropes[0].inv_freq.len(), case.inv_freq.len(), "{read}");
        for (j, (x, y)) in config.ropes[0].inv_freq.iter().zip(&case.inv_freq).enumerate() {
            assert!(close(*x, *y), "pair {j}: {x}, transformers has {y}: {read}");
        }
        assert!(close(config.ropes[0].scale, case.attention_factor), "{read}");
        assert_eq!((config.heads().kv, config.heads().dim), (case.kv_heads, case.head_dim), "{read}");
        assert_eq!((config.lookback(), &config.eos), (case.window, &case.eos), "{read}");
        let flags = (config.head.tied, config.layers[0].attention.qkv_bias, config.layers[0].mlp.bias);
        assert_eq!(flags, (case.tied, case.attention_bias, case.mlp_bias), "{read}");
    }
}

#[test]
fn sizes_of_a_llama_are_its_sites() {
    let config = read(&base()).unwrap();
    assert_eq!(config.sites().len(), 10);
    assert_eq!(config.sites()[0].outputs, [64, 32, 32]);
}

#[test]
fn absent_fields_have_the_values_of_their_family() {
    let config = read(&json!({"model_type": "llama"})).unwrap();
    assert_eq!(
        (config.hidden, config.layers[0].mlp.width, config.layers.len(), config.vocab),
        (4096, 11_008, 32, 32_000)
    );
    assert_eq!((config.heads().kv, config.max_positions, config.eos.as_slice()), (32, 2048, &[2][..]));
    let config = read(&json!({"architectures": ["MistralForCausalLM"]})).unwrap();
    assert_eq!((config.heads().kv, config.layers[0].mlp.width, config.max_positions), (8, 14_336, 131_072));
    assert_eq!(config.lookback(), Some(4096));
}

/// What is refused, and with which words.
const REFUSED: &[(&str, &str, &str)] = &[
    (
        "model_type",
        r#""qwen""#,
        "model_type \"qwen\" is not supported; known are llama, mistral, qwen2, qwen3, gemma,",
    ),
    ("model_type", r#""gemma3""#, "text_config is missing or not an object"),
    ("head_dim", "4098", "head_dim is missing or not a positive even integer up to 4096"),
    ("head_dim", "2147483646", "head_dim is missing or not a positive even integer up to 4096"),
    ("hidden_size", "2147483640", "head_dim is missing or not a positive even integer up to 4096"),
    ("model_type", "7", "model_type 7 is not supported"),
    ("hidden_act", r#""relu2""#, "hidden_act \"relu2\" is not supported; known are silu, swish, gelu"),
    ("hidden_activation", r#""relu2""#, "hidden_activation \"relu2\" is not supported"),
    (
        "rope_scaling",
        r#"{"rope_type": "mrope"}"#,
        "rope_type \"mrope\" is not supported; known are default, linear,",
    ),
    (
        "rope_scaling",
        r#"{"rope_type": "longrope"}"#,
        "short_factor is missing or not a list of positive numbers",
    ),
    ("rope_scaling", r#"{"type": "su", "factor": 2}"#, "type \"su\" is not supported"),
    ("rope_scaling", r#"{"type": "mrope", "mrope_section": [8, 8, 8]}"#, "type \"mrope\" is not supported"),
    ("rope_scaling", r#"{"rope_type": 3}"#, "rope_type 3 is not supported"),
    ("rope_scaling", r#"{"factor": 4.0}"#, "factor 4.0 is not supported"),
    ("rope_scaling", r#"{"type": "linear"}"#, "factor is missing or not a number in rope_scaling"),
    ("rope_scaling", r#"{"type": "linear", "factor": "4"}"#, "factor is missing or not a number"),
    ("rope_scaling", r#"{"type": "linear", "factor": 0}"#, "factor is missing or not a positive number"),
    ("rope_scaling", r#"{"type": "dynamic"}"#, "factor is missing or not a number"),
    ("rope_scaling", r#"{"type": "llama3", "factor": 8}"#, "low_freq_factor is missing or not a number"),
    (
        "rope_scaling",
        r#"{"type": "yarn", "factor": 4, "attention_factor": "1"}"#,
        "attention_factor is missing or not",
    ),
    (
        "rope_scaling",
        r#"{"type": "linear", "factor": 2, "partial_rotary_factor": 0.5}"#,
        "partial_rotary_factor 0.5",
    ),
    ("rope_scaling", r#""linear""#, "rope_scaling is missing or not an object"),
    (
        "rope_parameters",
        r#"{"full_attention": {"rope_type": "default"}}"#,
        "full_attention {\"rope_type\":\"default\"}",
    ),
    ("rope_parameters", r#"{"rope_type": "proportional", "rope_theta": 1e4}"#, "rope_type \"proportional\""),
    ("rope_theta", "0", "rope_theta is missing or not a positive number"),
    ("rope_theta", r#""10000""#, "rope_theta is missing or not a number"),
    ("partial_rotary_factor", "0.25", "partial_rotary_factor 0.25 is not supported"),
    ("vocab_size", "-3", "vocab_size is missing or not a positive integer"),
    ("hidden_size", "null", "hidden_size is missing or not a positive integer"),
    ("num_key_value_heads", "3", "num_attention_heads, a multiple of num_key_value_heads: 4, expected 3"),
    ("num_hidden_layers", "2147483647", "num_hidden_layers is missing or not a positive integer up to 1024"),
    (
        "max_position_embeddings",
        "2147483647",
        "max_position_embeddings is missing or not a positive integer up to 4194304",
    ),
    ("head_dim", "15", "head_dim is missing or not a positive even integer up to 4096"),
    ("eos_token_id", r#""</s>""#, "eos_token_id is missing or not a token id or a list of token ids"),
    ("eos_token_id", "[2, 2.5]", "eos_token_id is missing or not"),
    ("tie_word_embeddings", "1", "tie_word_embeddings is missing or not true or false"),
    ("quantization_config", r#"{"bits": 4}"#, "quantization_config {\"bits\":4} is not supported"),
    ("compression_config", r#"{"format": "x"}"#, "compression_config"),
    ("logit_scale", "0.0625", "logit_scale 0.0625 is not supported"),
    ("logits_scaling", "8", "logits_scaling 8 is not supported"),
    ("embedding_multiplier", "12.0", "embedding_multiplier 12.0 is not supported"),
    ("residual_multiplier", "0.22", "residual_multiplier 0.22 is not supported"),
    ("attention_multiplier", "0.5", "attention_multiplier 0.5 is not supported"),
    ("query_pre_attn_scalar", "256", "query_pre_attn_scalar 256 is not supported"),
    ("final_logit_softcapping", "30.0", "final_logit_softcapping 30.0 is not supported"),
    ("attn_logit_softcapping", "50", "attn_logit_softcapping 50 is not supported"),
    ("num_local_experts", "8", "num_local_experts 8 is not supported"),
    ("qk_norm", "true", "qk_norm true is not supported"),
    ("no_rope_layers", "[1, 0]", "no_rope_layers [1,0] is not supported"),
    ("is_causal", "false", "is_causal false is not supported"),
    ("is_encoder_decoder", "true", "is_encoder_decoder true is not supported"),
    ("per_layer_config", r#"{"0": {"head_dim": 8}}"#, "per_layer_config"),
    ("layer_types", r#"["full_attention", "sliding_attention"]"#, "layer_types"),
];

#[test]
fn what_cannot_be_served_is_named() {
    for (field, value, cause) in REFUSED {
        let value: Value = serde_json::from_str(value).unwrap();
        let refusal = with(field, value.clone()).expect_err(&format!("{field} = {value}"));
        assert!(refusal.contains(cause), "{refusal}");
    }
    let mut json = base();
    json.as_object_mut().unwrap().remove("model_type");
    for (architectures, shown) in [(json!(["GPT2"]), "\"GPT2\""), (json!([]), "null"), (Value::Null, "null")]
    {
        json["architectures"] = architectures;
        let refusal = read(&json).unwrap_err();
        let expected = format!(
            "architectures {shown} is not supported; known are LlamaForCausalLM, MistralForCausalLM, "
        );
        assert!(refusal.starts_with(&expected), "{refusal}");
    }
}

#[test]
fn neutral_values_change_nothing() {
    let plain = read(&base()).unwrap();
    for (field, value) in [
        ("quantization_config", Value::Null),
        ("logit_scale", json!(1.0)),
        ("logits_scaling", Value::Null),
        ("attention_multiplier", json!(0.25)),
        ("query_pre_attn_scalar", json!(16)),
        ("num_experts", json!(0)),
        ("pruned_heads", json!({})),
        ("rope_scaling", Value::Null),
        ("rope_scaling", json!({"type": "default"})),
        ("rope_scaling", json!({"rope_type": "default", "factor": 1.0})),
        ("layer_types", json!(["full_attention", "full_attention"])),
        ("sliding_window", json!(64)),
        ("pretraining_tp", json!(4)),
        ("torch_dtype", json!("float32")),
        ("architectures", json!(["SomebodysLlama"])),
        ("partial_rotary_factor", json!(1)),
        ("somebodys_own_field", json!("x")),
    ] {
        assert_eq!(with(field, value.clone()).unwrap(), plain, "{field} = {value}");
    }
}

#[test]
fn a_mistral_has_no_biases() {
    let mut json = base();
    json["model_type"] = json!("mistral");
    for field in ["attention_bias", "mlp_bias"] {
        let mut json = json.clone();
        json[field] = json!(true);
        let refusal = read(&json).unwrap_err();
        assert_eq!(refusal, format!("{field} true is not supported"));
    }
    json["layer_types"] = json!(["full_attention", "full_attention"]);
    assert!(read(&json).unwrap_err().contains("layer_types"), "its window is 4096");
    json["sliding_window"] = Value::Null;
    assert_eq!(read(&json).unwrap().lookback(), None);
}

#[test]
fn a_family_has_its_own_end_of_sequences() {
    for (family, ends) in [
        ("llama", &[2][..]),
        ("mistral", &[2]),
        ("qwen2", &[]),
        ("qwen3", &[]),
        ("gemma", &[1]),
        ("gemma2", &[1]),
        ("gemma3_text", &[1]),
        ("phi", &[2]),
        ("phi3", &[32_000]),
        ("gpt2", &[50_256]),
        ("gpt_neox", &[2]),
    ] {
        assert_eq!(read(&json!({"model_type": family})).unwrap().eos, ends, "{family}");
    }
}

/// `config.json`'s field (or none), `generation_config.json` (or none), and the ends of a sequence.
#[test]
fn ends_of_sequences_are_those_of_either_file() {
    for (own, generation, ends) in [
        (Some(json!(2)), None, &[2][..]),
        (Some(json!([2, 5])), None, &[2, 5]),
        (Some(Value::Null), None, &[]),
        (None, None, &[2]),
        (None, Some("{}"), &[]),
        (None, Some(r#"{"eos_token_id": 7}"#), &[7]),
        (Some(json!(2)), Some(r#"{"eos_token_id": [7, 2, 9]}"#), &[2, 7, 9]),
        (Some(json!(2)), Some(r#"{"eos_token_id": null}"#), &[2]),
        (Some(Value::Null), Some(r#"{"eos_token_id": [3]}"#), &[3]),
        (Some(json!([])), Some(r#"{"eos_token_id": 3}"#), &[3]),
        (Some(json!(2)), Some("{\"eos_token_id\": [7"), &[2]),
        (None, Some("not json"), &[2]),
        (Some(json!(4)), Some("[1]"), &[4]),
        (Some(json!(4)), Some(r#"{"eos_token_id": "</s>"}"#), &[4]),
        (Some(json!([-1, 4])), Some(r#"{"eos_token_id": [320, 319]}"#), &[4, 319]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut json = base();
        json.as_object_mut().unwrap().remove("eos_token_id");
        if let Some(own) = &own {
            json["eos_token_id"] = own.clone();
        }
        fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
        if let Some(generation) = generation {
            fs::write(folder.path().join("generation_config.json"), generation).unwrap();
        }
        assert_eq!(Decoder::from_folder(folder.path()).unwrap().eos, ends, "{own:?} {generation:?}");
    }
}
