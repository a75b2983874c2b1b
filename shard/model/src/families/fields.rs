//! Fields of a `config.json`: typed access, and those that no page reads and must have the value that changes nothing.

use std::{cell::RefCell, collections::HashSet};

use kernels::{Activation, Span};
use serde_json::Value;

use crate::{Decoder, LoadError, Result};

/// Fields of other architectures, or of forks of one, that change what is computed. transformers passes over those that a
/// family does not have in silence; whoever wrote one meant something by it. Each that a family's page has not read must be
/// absent, null, false, 0 or empty.
const OFF: [&str; 43] = [
    "add_cross_attention",
    "alibi",
    "attention_chunk_size",
    "attention_bias",
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
    "mlp_bias",
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
/// Fields that name an activation.
const ACTIVATIONS: [&str; 2] = ["hidden_act", "hidden_activation"];

/// The refusal of a field's value.
pub(super) fn unsupported(field: &str, value: &Value, known: impl Into<String>) -> LoadError {
    LoadError::Unsupported { field: field.into(), value: value.to_string(), known: known.into() }
}

/// The fields, and which of them were asked for.
pub(super) struct Fields {
    json: Value,
    asked: RefCell<HashSet<String>>,
}

impl Fields {
    pub(super) fn new(json: Value) -> Fields {
        Fields { json, asked: RefCell::default() }
    }

    /// All fields, of which none counts as asked for.
    pub(super) fn json(&self) -> &Value {
        &self.json
    }

    /// A field, null included.
    pub(super) fn raw(&self, field: &str) -> Option<&Value> {
        self.asked.borrow_mut().insert(field.into());
        self.json.get(field)
    }

    /// A field that is neither absent nor null.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.raw(field).filter(|value| !value.is_null())
    }

    /// A size, or the default if the field is absent.
    pub(super) fn size(&self, field: &'static str, default: usize) -> Result<usize> {
        self.raw(field).map_or(Ok(default), |value| size(field, value))
    }

    /// A size, or the default if the field is absent or null.
    pub(super) fn size_or_null(&self, field: &'static str, default: usize) -> Result<usize> {
        self.get(field).map_or(Ok(default), |value| size(field, value))
    }

    /// A number, or the default if the field is absent or null.
    pub(super) fn number(&self, field: &'static str, default: f32) -> Result<f32> {
        let wrong = LoadError::Field { field, expected: "a number" };
        self.get(field).map_or(Ok(default), |value| value.as_f64().map(|x| x as f32).ok_or(wrong))
    }

    /// A flag; the default if the field is absent or null.
    pub(super) fn flag(&self, field: &'static str, default: bool) -> Result<bool> {
        let wrong = LoadError::Field { field, expected: "true or false" };
        self.get(field).map_or(Ok(default), |value| value.as_bool().ok_or(wrong))
    }

    /// An activation by the name that transformers has for it (`activations.py`).
    pub(super) fn activation(&self, field: &'static str, default: Activation) -> Result<Activation> {
        let Some(value) = self.get(field) else { return Ok(default) };
        activation(value).ok_or_else(|| {
            unsupported(field, value, "silu, swish, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu")
        })
    }

    /// Refuses fields that no page has read, and that ask for something else than what is computed.
    pub(super) fn check_others(&self, decoder: &Decoder) -> Result<()> {
        let asked = self.asked.borrow().clone();
        let other =
            |field: &str| self.json.get(field).filter(|value| !value.is_null() && !asked.contains(field));
        let is_computed =
            |value: &Value| activation(value) == decoder.layers.first().map(|layer| layer.mlp.activation);
        for field in ACTIVATIONS {
            if let Some(value) = other(field).filter(|value| !is_computed(value)) {
                return Err(unsupported(field, value, "silu"));
            }
        }
        for field in OFF {
            if let Some(value) = other(field).filter(|value| !is_off(value)) {
                return Err(unsupported(field, value, ""));
            }
        }
        let dim = decoder.layers.first().map_or(1.0, |layer| layer.attention.shape.heads.dim as f64);
        let scales = [("attention_multiplier", dim.sqrt().recip()), ("query_pre_attn_scalar", dim)];
        for (field, neutral) in FACTORS.map(|field| (field, 1.0)).into_iter().chain(scales) {
            let is_neutral =
                |value: &Value| value.as_f64().is_some_and(|x| (x - neutral).abs() < 1e-6 * neutral);
            if let Some(value) = other(field).filter(|value| !is_neutral(value)) {
                return Err(unsupported(field, value, ""));
            }
        }
        if let Some(types) = other("layer_types") {
            let expected = decoder.layers.iter().map(|layer| match layer.attention.shape.span {
                Span::Window(_) => "sliding_attention",
                Span::Causal | Span::Bidirectional => "full_attention",
            });
            // A list that says something else than what is computed is meant for another family.
            if !types.as_array().is_some_and(|types| types.iter().eq(expected)) {
                return Err(unsupported("layer_types", types, "the types of layers that this family has"));
            }
        }
        match other("is_causal") {
            Some(Value::Bool(true)) | None => Ok(()),
            Some(value) => Err(unsupported("is_causal", value, "true")),
        }
    }
}

/// A size of a model. None comes near the limit; products of sizes must not overflow.
fn size(field: &'static str, value: &Value) -> Result<usize> {
    let wrong = LoadError::Field { field, expected: "a positive integer" };
    value.as_u64().filter(|x| (1..1 << 31).contains(x)).map(|x| x as usize).ok_or(wrong)
}

fn activation(name: &Value) -> Option<Activation> {
    match name.as_str()? {
        "silu" | "swish" => Some(Activation::Silu),
        "gelu" => Some(Activation::Gelu),
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Some(Activation::GeluTanh),
        "relu" => Some(Activation::Relu),
        _ => None,
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
