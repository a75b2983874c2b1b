//! What a decoder looks like, from `config.json` or from a GGUF file's metadata.

use std::{f32::consts::TAU, fs, path::Path};

use gguf::Gguf;
use kernels::Heads;
use serde_json::Value;

use crate::{LoadError, Result};

/// How rotary frequencies are changed for longer contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All positions are divided by the factor (Chen et al., 2023).
    Linear(f32),
    /// Llama 3.1's: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f32,
        /// Wavelengths above `original / low` are low frequencies.
        low: f32,
        /// Wavelengths below `original / high` are high frequencies.
        high: f32,
        /// Context length before scaling.
        original: f32,
    },
    /// Each frequency is divided by its own factor, `[dim / 2]`: how GGUF files say Llama 3.1's.
    Factors(Vec<f32>),
}

/// A rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// How they are changed.
    pub scaling: RopeScaling,
}

impl Rope {
    /// Frequency of each pair of elements of a head of `dim` elements.
    pub fn inv_freq(&self, dim: usize) -> Vec<f32> {
        let scaled = |(j, freq): (usize, f32)| match &self.scaling {
            RopeScaling::None => freq,
            RopeScaling::Linear(factor) => freq / factor,
            RopeScaling::Factors(factors) => freq / factors[j],
            RopeScaling::Llama3 { factor, low, high, original } => {
                let wavelength = TAU / freq;
                let ramp = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                freq / factor * (1.0 - ramp) + freq * ramp
            }
        };
        let freqs = (0..dim / 2).map(|j| self.theta.powf(-2.0 * j as f32 / dim as f32));
        freqs.enumerate().map(scaled).collect()
    }
}

/// Most layers of a model.
const MAX_LAYERS: usize = 1 << 10;
/// Most positions of a model; the longest context that a Llama was trained for.
const MAX_POSITIONS: usize = 1 << 22;

/// A Llama-like decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: Heads,
    /// Width of the feed-forward network.
    pub ffn: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Longest sequence.
    pub max_positions: usize,
    /// Tokens that end a sequence.
    pub eos: Vec<u32>,
    /// Added to the mean square in norms.
    pub rms_eps: f32,
    /// Positions.
    pub rope: Rope,
    /// The output projection is the embedding table.
    pub tied: bool,
    /// q, k, v and o have biases.
    pub attention_bias: bool,
    /// gate, up and down have biases.
    pub mlp_bias: bool,
    /// A row sees so many positions at most.
    pub window: Option<u32>,
}

/// Fields of a `config.json`.
struct Fields(Value);

impl Fields {
    fn get(&self, field: &'static str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn size(&self, field: &'static str) -> Result<Option<usize>> {
        let wrong = LoadError::Field { field, expected: "a positive integer" };
        match self.get(field) {
            None => Ok(None),
            // No size of a model comes near this; products of sizes must not overflow.
            Some(value) => {
                value.as_u64().filter(|x| (1..1 << 31).contains(x)).map(|x| Some(x as usize)).ok_or(wrong)
            }
        }
    }

    fn required(&self, field: &'static str) -> Result<usize> {
        self.size(field)?.ok_or(LoadError::Field { field, expected: "a positive integer" })
    }

    fn number(&self, field: &'static str, default: f32) -> Result<f32> {
        let wrong = LoadError::Field { field, expected: "a number" };
        self.get(field).map_or(Ok(default), |value| value.as_f64().map(|x| x as f32).ok_or(wrong))
    }

    fn flag(&self, field: &'static str) -> Result<bool> {
        let wrong = LoadError::Field { field, expected: "true or false" };
        self.get(field).map_or(Ok(false), |value| value.as_bool().ok_or(wrong))
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read(path).map_err(|source| LoadError::Io { path: path.into(), source })?;
    serde_json::from_slice(&text).map_err(|source| LoadError::Json { path: path.into(), source })
}

/// One id, or a list of them.
fn eos_ids(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

impl Config {
    /// Reads a folder's `config.json`, and the tokens that end a sequence from its `generation_config.json`. Only
    /// [`Model::load`](crate::Model::load) finds out that a model said to be tied has an output projection after all.
    pub fn from_folder(folder: &Path) -> Result<Config> {
        let mut config = Config::from_json(read_json(&folder.join("config.json"))?)?;
        let generation = folder.join("generation_config.json");
        if generation.exists() {
            config.eos.extend(eos_ids(read_json(&generation)?.get("eos_token_id")));
        }
        config.eos.sort_unstable();
        config.eos.dedup();
        Ok(config)
    }

    fn from_json(json: Value) -> Result<Config> {
        let unsupported =
            |field, value: &Value, known| LoadError::Unsupported { field, value: value.to_string(), known };
        let fields = Fields(json);
        let architecture = fields.0["architectures"][0].clone();
        if !matches!(architecture.as_str(), Some("LlamaForCausalLM" | "MistralForCausalLM")) {
            let known = "LlamaForCausalLM, MistralForCausalLM";
            return Err(unsupported("architectures", &architecture, known));
        }
        for (field, served) in [("hidden_act", "silu")] {
            if let Some(value) = fields.get(field).filter(|value| *value != served) {
                return Err(unsupported(field, value, served));
            }
        }
        if let Some(value) = fields.get("quantization_config") {
            return Err(unsupported("quantization_config", value, ""));
        }
        let (hidden, query) = (fields.required("hidden_size")?, fields.required("num_attention_heads")?);
        let config = Config {
            hidden,
            layers: fields.required("num_hidden_layers")?,
            heads: Heads {
                query,
                kv: fields.size("num_key_value_heads")?.unwrap_or(query),
                dim: fields.size("head_dim")?.unwrap_or(hidden / query),
            },
            ffn: fields.required("intermediate_size")?,
            vocab: fields.required("vocab_size")?,
            max_positions: fields.size("max_position_embeddings")?.unwrap_or(2048),
            eos: eos_ids(fields.get("eos_token_id")),
            rms_eps: fields.number("rms_norm_eps", 1e-6)?,
            rope: rope(&fields)?,
            tied: fields.flag("tie_word_embeddings")?,
            attention_bias: fields.flag("attention_bias")?,
            mlp_bias: fields.flag("mlp_bias")?,
            window: window(&fields)?,
        };
        config.check()
    }

    /// Reads a GGUF file's metadata.
    pub(crate) fn from_gguf(file: &Gguf) -> Result<Config> {
        let architecture: &str = file.require("general.architecture")?;
        if architecture != "llama" {
            return Err(LoadError::Unsupported {
                field: "general.architecture",
                value: architecture.into(),
                known: "llama",
            });
        }
        let size =
            |key: &str| -> Result<usize> { Ok(file.require::<u32>(&format!("llama.{key}"))? as usize) };
        let (hidden, query) = (size("embedding_length")?, size("attention.head_count")?.max(1));
        if let Some(value) = file.get::<&str>("llama.rope.scaling.type")?.filter(|value| *value != "none") {
            let field = "llama.rope.scaling.type";
            return Err(LoadError::Unsupported { field, value: value.into(), known: "none" });
        }
        let table = file
            .tensor("token_embd.weight")
            .ok_or_else(|| LoadError::MissingTensor("token_embd.weight".into()))?;
        // No field tells of biases. Where one projection has one, its neighbours must.
        let has_bias = |part: &str| {
            let is_bias =
                |name: &str| name.ends_with(".bias") && name.split('.').any(|at| at.starts_with(part));
            file.tensors().iter().any(|info| is_bias(&info.name))
        };
        let dim = file.get::<u32>("llama.attention.key_length")?.map_or(hidden / query, |dim| dim as usize);
        let config = Config {
            hidden,
            layers: size("block_count")?,
            heads: Heads {
                query,
                kv: file.get::<u32>("llama.attention.head_count_kv")?.map_or(query, |kv| kv as usize),
                dim,
            },
            ffn: size("feed_forward_length")?,
            vocab: table.dims.get(1).copied().unwrap_or(0),
            max_positions: size("context_length")?,
            eos: file.get::<u32>("tokenizer.ggml.eos_token_id")?.into_iter().collect(),
            rms_eps: file.require("llama.attention.layer_norm_rms_epsilon")?,
            rope: Rope {
                theta: file.get("llama.rope.freq_base")?.unwrap_or(10_000.0),
                scaling: rope_factors(file, dim)?,
            },
            tied: file.tensor("output.weight").is_none(),
            attention_bias: has_bias("attn_"),
            mlp_bias: has_bias("ffn_"),
            window: None,
        };
        config.check()
    }

    fn check(self) -> Result<Config> {
        let inconsistent = |what, got, expected| Err(LoadError::Inconsistent { what, got, expected });
        let Heads { query, kv, dim } = self.heads;
        if kv == 0 || !query.is_multiple_of(kv) {
            return inconsistent("num_attention_heads, a multiple of num_key_value_heads", query, kv);
        }
        if dim == 0 || !dim.is_multiple_of(2) {
            return inconsistent("head_dim, an even number", dim, dim + 1);
        }
        if self.layers == 0 || self.vocab == 0 || self.ffn == 0 || self.max_positions == 0 {
            return inconsistent("a size of the model", 0, 1);
        }
        // Memory is taken for each of them before weights are there to contradict.
        if self.layers > MAX_LAYERS {
            let expected = "a positive integer up to 1024";
            return Err(LoadError::Field { field: "num_hidden_layers", expected });
        }
        if self.max_positions > MAX_POSITIONS {
            let expected = "a positive integer up to 4194304";
            return Err(LoadError::Field { field: "max_position_embeddings", expected });
        }
        if !self.rms_eps.is_finite() || !self.rope.theta.is_finite() || self.rope.theta <= 0.0 {
            return Err(LoadError::Field {
                field: "rms_norm_eps or rope_theta",
                expected: "a positive number",
            });
        }
        Ok(self)
    }

    /// The low-rank sites of the model, by their index: per layer q k v, o, gate up, down; then the output projection.
    pub fn sites(&self) -> Vec<kernels::LoraSite> {
        let Heads { query, kv, dim } = self.heads;
        let site = |inputs, outputs: &[usize]| kernels::LoraSite { inputs, outputs: outputs.to_vec() };
        let layer = [
            site(self.hidden, &[query * dim, kv * dim, kv * dim]),
            site(query * dim, &[self.hidden]),
            site(self.hidden, &[self.ffn, self.ffn]),
            site(self.ffn, &[self.hidden]),
        ];
        let layers = std::iter::repeat_n(layer, self.layers).flatten();
        layers.chain([site(self.hidden, &[self.vocab])]).collect()
    }
}

/// Positions that a row sees: a Mistral's field, 4096 if it is absent, all if it is null. A Llama has none.
fn window(fields: &Fields) -> Result<Option<u32>> {
    let field = "sliding_window";
    match (fields.0["architectures"][0].as_str(), fields.0.get(field)) {
        (Some("MistralForCausalLM"), None) => Ok(Some(4096)),
        (Some("MistralForCausalLM"), Some(_)) => Ok(fields.size(field)?.map(|window| window as u32)),
        _ => Ok(None),
    }
}

/// Tensor of a GGUF file that divides rotary frequencies, `[dim / 2]`.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The factors of a GGUF file's rotary frequencies for heads of `dim` elements, if it has any.
fn rope_factors(file: &Gguf, dim: usize) -> Result<RopeScaling> {
    let Some(info) = file.tensor(ROPE_FACTORS) else { return Ok(RopeScaling::None) };
    if info.dims != [dim / 2] {
        let (got, expected) = (info.dims.clone(), vec![dim / 2]);
        return Err(LoadError::Shape { name: ROPE_FACTORS.into(), got, expected });
    }
    let factors = file.dequantize(ROPE_FACTORS)?;
    if factors.iter().any(|factor| !factor.is_finite() || *factor <= 0.0) {
        return Err(LoadError::Field { field: ROPE_FACTORS, expected: "positive numbers" });
    }
    Ok(RopeScaling::Factors(factors))
}

/// The rotary embedding, from either generation of field names.
fn rope(fields: &Fields) -> Result<Rope> {
    let parameters = fields.get("rope_parameters").or(fields.get("rope_scaling"));
    let nested = |key: &str| parameters.and_then(|parameters| parameters.get(key)).and_then(Value::as_f64);
    let theta = match nested("rope_theta") {
        Some(theta) => theta as f32,
        None => fields.number("rope_theta", 10_000.0)?,
    };
    let number = |key: &'static str| {
        nested(key)
            .map(|x| x as f32)
            .ok_or(LoadError::Field { field: key, expected: "a number in rope_scaling" })
    };
    let kind = parameters.and_then(|parameters| parameters.get("rope_type").or(parameters.get("type")));
    let scaling = match kind.and_then(Value::as_str) {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear(number("factor")?),
        Some("llama3") => RopeScaling::Llama3 {
            factor: number("factor")?,
            low: number("low_freq_factor")?,
            high: number("high_freq_factor")?,
            original: number("original_max_position_embeddings")?,
        },
        Some(other) => {
            let known = "default, linear, llama3";
            return Err(LoadError::Unsupported { field: "rope_type", value: other.into(), known });
        }
    };
    Ok(Rope { theta, scaling })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn base() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 112, "vocab_size": 320,
            "max_position_embeddings": 256, "rope_theta": 10000.0, "eos_token_id": [1, 2],
        })
    }

    fn with(field: &str, value: Value) -> Result<Config> {
        let mut json = base();
        json[field] = value;
        Config::from_json(json)
    }

    #[test]
    fn a_llama_is_read() {
        let config = Config::from_json(base()).unwrap();
        assert_eq!(config.heads, Heads { query: 4, kv: 2, dim: 16 });
        assert_eq!(config.eos, [1, 2]);
        assert_eq!(config.sites().len(), 9);
        assert_eq!(config.sites()[0].outputs, [64, 32, 32]);
    }

    #[test]
    fn what_cannot_be_served_is_named() {
        for (field, value, message) in [
            (
                "architectures",
                json!(["GPT2"]),
                "architectures \"GPT2\" is not supported; known are LlamaForCausalLM, MistralForCausalLM",
            ),
            ("hidden_act", json!("gelu"), "hidden_act \"gelu\" is not supported; known are silu"),
            (
                "rope_scaling",
                json!({"rope_type": "yarn"}),
                "rope_type yarn is not supported; known are default, linear, llama3",
            ),
            ("vocab_size", json!(-3), "vocab_size is missing or not a positive integer"),
            ("hidden_size", Value::Null, "hidden_size is missing or not a positive integer"),
            (
                "num_key_value_heads",
                json!(3),
                "num_attention_heads, a multiple of num_key_value_heads: 4, expected 3",
            ),
            (
                "num_hidden_layers",
                json!(i32::MAX),
                "num_hidden_layers is missing or not a positive integer up to 1024",
            ),
            (
                "max_position_embeddings",
                json!(i32::MAX),
                "max_position_embeddings is missing or not a positive integer up to 4194304",
            ),
        ] {
            assert_eq!(with(field, value).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn only_a_mistral_has_a_window() {
        assert_eq!(with("sliding_window", json!(64)).unwrap().window, None);
        let mut mistral = base();
        mistral["architectures"] = json!(["MistralForCausalLM"]);
        assert_eq!(Config::from_json(mistral.clone()).unwrap().window, Some(4096));
        for (value, window) in [(json!(64), Some(64)), (Value::Null, None)] {
            mistral["sliding_window"] = value;
            assert_eq!(Config::from_json(mistral.clone()).unwrap().window, window);
        }
    }

    /// Values of transformers' own computation for Llama 3.1's parameters and a head of 128 elements.
    #[test]
    fn llama3_scaling_keeps_high_frequencies() {
        let rope = Rope {
            theta: 500_000.0,
            scaling: RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 },
        };
        let plain = Rope { scaling: RopeScaling::None, ..rope.clone() };
        let (scaled, plain) = (rope.inv_freq(128), plain.inv_freq(128));
        assert_eq!(scaled[0], 1.0);
        assert_eq!(scaled[20], plain[20]);
        assert!((scaled[63] - plain[63] / 8.0).abs() < 1e-12);
    }
}
