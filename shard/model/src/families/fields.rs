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

/// Names that a family has for fields which most others share: the common name, and its own.
pub(super) type Aliases = &'static [(&'static str, &'static str)];

/// The fields, and which of them were asked for.
pub(super) struct Fields {
    json: Value,
    aliases: Aliases,
    asked: RefCell<HashSet<String>>,
}

impl Fields {
    pub(super) fn new(json: Value, aliases: Aliases) -> Fields {
        Fields { json, aliases, asked: RefCell::default() }
    }

    /// The family's own name of a field.
    pub(super) fn name(&self, field: &'static str) -> &'static str {
        self.aliases.iter().find(|(common, _)| *common == field).map_or(field, |(_, own)| *own)
    }

    /// All fields, of which none counts as asked for.
    pub(super) fn json(&self) -> &Value {
        &self.json
    }

    /// A field, null included. Where a family has an own name for it, transformers takes either.
    pub(super) fn raw(&self, field: &'static str) -> Option<&Value> {
        let own = self.name(field);
        self.asked.borrow_mut().extend([field.to_owned(), own.to_owned()]);
        self.json.get(own).or_else(|| self.json.get(field))
    }

    /// A field that is neither absent nor null.
    pub(super) fn get(&self, field: &'static str) -> Option<&Value> {
        self.raw(field).filter(|value| !value.is_null())
    }

    /// A size, or the default if the field is absent.
    pub(super) fn size(&self, field: &'static str, default: usize) -> Result<usize> {
        self.raw(field).map_or(Ok(default), |value| size(self.name(field), value))
    }

    /// A number of things of which there may be none, or the default if the field is absent.
    pub(super) fn count(&self, field: &'static str, default: usize) -> Result<usize> {
        let wrong = LoadError::Field { field: self.name(field), expected: "0 or a positive integer" };
        self.raw(field).map_or(Ok(default), |value| value.as_u64().map(|x| x as usize).ok_or(wrong))
    }

    /// A cap of logits or scores: the default if the field is absent, none if it is null.
    pub(super) fn cap(&self, field: &'static str, default: Option<f32>) -> Result<Option<f32>> {
        if self.raw(field).is_none() {
            return Ok(default);
        }
        let cap = self.optional_number(field)?.map(|cap| cap as f32);
        let wrong = LoadError::Field { field, expected: "null or a positive number" };
        if cap.is_none_or(|cap| cap > 0.0) { Ok(cap) } else { Err(wrong) }
    }

    /// A size, or none if the field is absent or null.
    pub(super) fn optional_size(&self, field: &'static str) -> Result<Option<usize>> {
        self.get(field).map(|value| size(self.name(field), value)).transpose()
    }

    /// A number, or the default if the field is absent or null.
    pub(super) fn number(&self, field: &'static str, default: f32) -> Result<f32> {
        Ok(self.optional_number(field)?.map_or(default, |x| x as f32))
    }

    /// A number, or none if the field is absent or null.
    pub(super) fn optional_number(&self, field: &'static str) -> Result<Option<f64>> {
        let wrong = LoadError::Field { field: self.name(field), expected: "a number" };
        self.get(field).map(|value| value.as_f64().ok_or(wrong)).transpose()
    }

    /// A flag; the default if the field is absent or null.
    pub(super) fn flag(&self, field: &'static str, default: bool) -> Result<bool> {
        let wrong = LoadError::Field { field: self.name(field), expected: "true or false" };
        self.get(field).map_or(Ok(default), |value| value.as_bool().ok_or(wrong))
    }

    /// An activation by the name that transformers has for it (`activations.py`).
    pub(super) fn activation(&self, field: &'static str, default: Activation) -> Result<Activation> {
        let Some(value) = self.get(field) else { return Ok(default) };
        activation(value).ok_or_else(|| {
            unsupported(
                self.name(field),
                value,
                "silu, swish, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu",
            )
        })
    }

    /// Refuses any other value of a field.
    pub(super) fn expect(&self, field: &'static str, only: &'static str) -> Result<()> {
        match self.get(field) {
            Some(value) if value != only => Err(unsupported(field, value, only)),
            _ => Ok(()),
        }
    }

    /// Refuses a feature.
    pub(super) fn expect_off(&self, field: &'static str) -> Result<()> {
        match self.get(field) {
            Some(value) if !is_off(value) => Err(unsupported(field, value, "")),
            _ => Ok(()),
        }
    }

    /// Refuses fields that ask for a feature that no page has read.
    pub(super) fn check_off(&self) -> Result<()> {
        let asked = self.asked.borrow();
        let is_on = |field: &&str| !asked.contains(*field) && !self.json.get(*field).is_none_or(is_off);
        match OFF.into_iter().find(is_on) {
            Some(field) => Err(unsupported(field, &self.json[field], "")),
            None => Ok(()),
        }
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
                return Err(unsupported(field, value, "the activation that this family has"));
            }
        }
        for (common, own) in self.aliases {
            let given = [common, own].map(|name| self.json.get(*name).filter(|value| !value.is_null()));
            if let [Some(value), Some(expected)] = given
                && value != expected
            {
                return Err(unsupported(common, value, format!("{expected}, as {own}")));
            }
        }
        self.check_off()?;
        let shape = decoder.layers.first().map(|layer| layer.attention.shape);
        let scales = shape.into_iter().flat_map(|shape| {
            let (scale, heads) = (f64::from(shape.scale), shape.heads);
            [
                ("attention_multiplier", scale),
                ("query_pre_attn_scalar", scale.powi(-2)),
                ("head_dim", heads.dim as f64),
                ("num_key_value_heads", heads.kv as f64),
            ]
        });
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
