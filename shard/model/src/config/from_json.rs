//! The configuration of a Llama or a Mistral from a folder in Hugging Face layout, as transformers reads it
//! (`models/llama`, `models/mistral`, `configuration_utils.py`, `generation/configuration_utils.py`).

mod fields;
mod rope;

use std::{fs, path::Path};

use kernels::Heads;
use serde_json::Value;

use super::{Config, check_head_dim};
use crate::{LoadError, Result};
use fields::Fields;

/// transformers' class of a model, which decides what a field means and what it is if it is absent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
}

impl Family {
    /// As transformers' `AutoModelForCausalLM`: by `model_type`. Only a folder without one is asked for its architecture.
    fn of(fields: &Fields) -> Result<Family> {
        if let Some(kind) = fields.get("model_type") {
            return match kind.as_str() {
                Some("llama") => Ok(Family::Llama),
                Some("mistral") => Ok(Family::Mistral),
                _ => Err(fields::unsupported("model_type", kind, "llama, mistral")),
            };
        }
        let architecture = &fields.0["architectures"][0];
        match architecture.as_str() {
            Some("LlamaForCausalLM" | "LlamaModel") => Ok(Family::Llama),
            Some("MistralForCausalLM" | "MistralModel") => Ok(Family::Mistral),
            _ => {
                let known = "LlamaForCausalLM, MistralForCausalLM";
                Err(fields::unsupported("architectures", architecture, known))
            }
        }
    }

    /// `intermediate_size`, `max_position_embeddings` and `num_key_value_heads` of a configuration without them.
    fn defaults(self, query: usize) -> (usize, usize, usize) {
        match self {
            Family::Llama => (11_008, 2_048, query),
            Family::Mistral => (14_336, 131_072, 8),
        }
    }
}

impl Config {
    /// Reads a folder's `config.json`, and the tokens that end a sequence from its `generation_config.json`. Only
    /// [`Model::load`](crate::Model::load) finds out that a model said to be tied has an output projection after all.
    pub fn from_folder(folder: &Path) -> Result<Config> {
        let path = folder.join("config.json");
        let text = fs::read(&path).map_err(|source| LoadError::Io { path: path.clone(), source })?;
        let json = serde_json::from_slice(&text).map_err(|source| LoadError::Json { path, source })?;
        Config::from_json(json, generation(folder).as_ref())
    }

    fn from_json(json: Value, generation: Option<&Value>) -> Result<Config> {
        let fields = Fields(json);
        let family = Family::of(&fields)?;
        let query = fields.size("num_attention_heads", 32)?;
        let hidden = fields.size("hidden_size", 4096)?;
        let (ffn, max_positions, kv) = family.defaults(query);
        let heads = Heads {
            query,
            // A Mistral whose field is null has as many as queries; one without the field has 8.
            kv: match fields.0.get("num_key_value_heads") {
                Some(Value::Null) => query,
                _ => fields.size("num_key_value_heads", kv)?,
            },
            dim: check_head_dim(fields.size("head_dim", hidden / query)?)?,
        };
        fields.check_neutral(heads)?;
        let max_positions = fields.size("max_position_embeddings", max_positions)?;
        let window = window(&fields, family)?;
        check_layer_types(&fields, window)?;
        let config = Config {
            hidden,
            layers: fields.size("num_hidden_layers", 32)?,
            heads,
            ffn: fields.size("intermediate_size", ffn)?,
            vocab: fields.size("vocab_size", 32_000)?,
            max_positions,
            eos: ends(&fields, generation)?,
            rms_eps: fields.number("rms_norm_eps", 1e-6)?,
            rope: rope::rope(&fields, heads.dim, max_positions)?,
            tied: fields.flag("tie_word_embeddings")?,
            attention_bias: bias(&fields, family, "attention_bias")?,
            mlp_bias: bias(&fields, family, "mlp_bias")?,
            window,
        };
        config.check()
    }
}

/// `generation_config.json`. One that is missing or no JSON counts for nothing: transformers then makes one from
/// `config.json`.
fn generation(folder: &Path) -> Option<Value> {
    let text = fs::read(folder.join("generation_config.json")).ok()?;
    serde_json::from_slice::<Value>(&text).ok().filter(Value::is_object)
}

/// The tokens that end a sequence: those of either file, each an id or a list of ids. There may be none.
fn ends(fields: &Fields, generation: Option<&Value>) -> Result<Vec<u32>> {
    let field = "eos_token_id";
    let mut ends = match fields.0.get(field) {
        Some(value) => {
            let expected = "a token id or a list of token ids";
            ids(value).ok_or(LoadError::Field { field, expected })?
        }
        None => Vec::new(),
    };
    ends.extend(generation.and_then(|generation| ids(generation.get(field)?)).unwrap_or_default());
    Ok(ends)
}

/// The ids of a value that is null, an id, or a list of ids. An id that no token can have is left out.
fn ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_i64().map(|id| u32::try_from(id).ok());
    match value {
        Value::Null => Some(Vec::new()),
        Value::Array(values) => {
            let ids: Option<Vec<_>> = values.iter().map(id).collect();
            Some(ids?.into_iter().flatten().collect())
        }
        value => Some(id(value)?.into_iter().collect()),
    }
}

/// Positions that a row sees: a Mistral's field, 4096 if it is absent, all if it is null. A Llama has none.
fn window(fields: &Fields, family: Family) -> Result<Option<u32>> {
    let field = "sliding_window";
    match (family, fields.get(field)) {
        (Family::Llama, _) => Ok(None),
        (Family::Mistral, None) => Ok(if fields.0.get(field).is_some() { None } else { Some(4096) }),
        (Family::Mistral, Some(_)) => Ok(Some(fields.size(field, 4096)? as u32)),
    }
}

/// transformers takes no notice of `layer_types` in these two families. A list that says something else than what is
/// computed is meant for another one.
fn check_layer_types(fields: &Fields, window: Option<u32>) -> Result<()> {
    let field = "layer_types";
    let Some(types) = fields.get(field) else { return Ok(()) };
    let expected = if window.is_some() { "sliding_attention" } else { "full_attention" };
    let is_expected = types.as_array().is_some_and(|types| types.iter().all(|kind| *kind == expected));
    if is_expected { Ok(()) } else { Err(fields::unsupported(field, types, "the same type for all layers")) }
}

/// Whether projections have biases; a Mistral's never have.
fn bias(fields: &Fields, family: Family, field: &'static str) -> Result<bool> {
    let has_bias = fields.flag(field)?;
    if has_bias && family == Family::Mistral {
        return Err(fields::unsupported(field, &Value::Bool(true), "false for a Mistral"));
    }
    Ok(has_bias)
}
