//! Fields of a `config.json`: typed access, and those that must have the value that changes nothing.

use kernels::Heads;
use serde_json::Value;

use crate::{LoadError, Result};

/// Fields of other architectures, or of forks of this one, that change what is computed. transformers' Llama and Mistral
/// pass over them in silence; whoever wrote one meant something by it. Each must be absent, null, false, 0 or empty.
const OFF: [&str; 41] = [
    "add_cross_attention",
    "alibi",
    "attention_chunk_size",
    "attn_logit_softcapping",
    "attn_temperature_tuning",
    "clip_qkv",
    "compression_config",
    "cross_attention_hidden_size",
    "final_logit_softcapping",
    "is_encoder_decoder",
    "kv_lora_rank",
    "layer_norm_bias",
    "logit_softcapping",
    "moe_intermediate_size",
    "multi_query",
    "n_routed_experts",
    "n_shared_experts",
    "new_decoder_architecture",
    "no_rope_layer_interval",
    "no_rope_layers",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "parallel_attn",
    "per_layer_config",
    "post_norm",
    "pruned_heads",
    "q_lora_rank",
    "qk_layernorm",
    "qk_norm",
    "qkv_bias",
    "quantization_config",
    "rope_interleaved",
    "rope_local_base_freq",
    "sandwich_norm",
    "transformers_weights",
    "use_bidirectional_attention",
    "use_bias",
    "use_parallel_residual",
    "use_qk_norm",
    "use_qkv_bias",
];
/// Factors of the same kind: each must be absent, null or 1.
const FACTORS: [&str; 12] = [
    "embedding_multiplier",
    "embedding_scale",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "partial_rotary_factor",
    "residual_multiplier",
    "residual_scale",
    "rope_ratio",
    "rope_pct",
    "rotary_pct",
    "scale_emb",
];
/// Names of the activation that is computed, in either field that names one.
const SILU: [&str; 2] = ["silu", "swish"];

/// The refusal of a field's value.
pub(super) fn unsupported(field: &str, value: &Value, known: &'static str) -> LoadError {
    LoadError::Unsupported { field: field.into(), value: value.to_string(), known }
}

/// The fields.
pub(super) struct Fields(pub(super) Value);

impl Fields {
    /// A field that is neither absent nor null.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    /// A size, or the default if the field is absent.
    pub(super) fn size(&self, field: &'static str, default: usize) -> Result<usize> {
        let wrong = LoadError::Field { field, expected: "a positive integer" };
        match self.0.get(field) {
            None => Ok(default),
            // transformers, too, takes null for "not given" here.
            Some(Value::Null) if field == "head_dim" => Ok(default),
            // No size of a model comes near this; products of sizes must not overflow.
            Some(value) => {
                value.as_u64().filter(|x| (1..1 << 31).contains(x)).map(|x| x as usize).ok_or(wrong)
            }
        }
    }

    /// A number, or the default if the field is absent or null.
    pub(super) fn number(&self, field: &'static str, default: f32) -> Result<f32> {
        let wrong = LoadError::Field { field, expected: "a number" };
        self.get(field).map_or(Ok(default), |value| value.as_f64().map(|x| x as f32).ok_or(wrong))
    }

    /// A flag; false if the field is absent or null.
    pub(super) fn flag(&self, field: &'static str) -> Result<bool> {
        let wrong = LoadError::Field { field, expected: "true or false" };
        self.get(field).map_or(Ok(false), |value| value.as_bool().ok_or(wrong))
    }

    /// Refuses a field that asks for something else than what is computed.
    pub(super) fn check_neutral(&self, heads: Heads) -> Result<()> {
        for field in ["hidden_act", "hidden_activation"] {
            if let Some(value) = self.get(field)
                && !value.as_str().is_some_and(|name| SILU.contains(&name))
            {
                return Err(unsupported(field, value, "silu"));
            }
        }
        for field in OFF {
            if let Some(value) = self.get(field).filter(|value| !is_off(value)) {
                return Err(unsupported(field, value, ""));
            }
        }
        let dim = heads.dim as f64;
        let scales = [("attention_multiplier", dim.sqrt().recip()), ("query_pre_attn_scalar", dim)];
        for (field, neutral) in FACTORS.map(|field| (field, 1.0)).into_iter().chain(scales) {
            let is_neutral =
                |value: &Value| value.as_f64().is_some_and(|x| (x - neutral).abs() < 1e-6 * neutral);
            if let Some(value) = self.get(field).filter(|value| !is_neutral(value)) {
                return Err(unsupported(field, value, ""));
            }
        }
        match self.get("is_causal") {
            Some(Value::Bool(true)) | None => Ok(()),
            Some(value) => Err(unsupported("is_causal", value, "true")),
        }
    }
}

/// Whether a value is that of a feature that a model does not have.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(x) => !x,
        Value::Number(x) => x.as_f64() == Some(0.0),
        Value::String(x) => x.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}
