//! The configuration of a Llama from a GGUF file's metadata, as llama.cpp reads it (`src/llama-model.cpp`,
//! `src/models/llama.cpp`, `src/llama-context.cpp`). A key that would change the output and is not computed is refused
//! by its name, see [`keys`].

mod keys;

use std::f32::consts::PI;

use gguf::{FromValue, Gguf};
use kernels::{Activation, Heads, RopeSpec, Stretch};

use super::{
    frequencies::{Rope, Yarn, yarn_attention_factor},
    llama,
};
use crate::{
    Decoder, LoadError, Result,
    decoder::{
        Attention, Embedding, Head, Layer, MAX_LAYERS, Mlp, Names, NormSpec, Stored, Wiring, check_head_dim,
    },
};

/// Tensor of a GGUF file that divides rotary frequencies, `[head_dim / 2]`. Llama 3.1's scaling is written this way.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

fn optional<'a, T: FromValue<'a>>(file: &'a Gguf, key: &str) -> Result<Option<T>> {
    Ok(file.get(&format!("llama.{key}"))?)
}

fn size(file: &Gguf, key: &str) -> Result<usize> {
    Ok(file.require::<u32>(&format!("llama.{key}"))? as usize)
}

fn refused(key: &str, value: impl ToString, known: &'static str) -> LoadError {
    LoadError::Unsupported { field: format!("llama.{key}"), value: value.to_string(), known: known.into() }
}

impl Decoder {
    /// Reads a GGUF file's metadata.
    pub(crate) fn from_gguf(file: &Gguf) -> Result<Decoder> {
        let architecture: &str = file.require("general.architecture")?;
        if architecture != "llama" {
            let (field, value) = ("general.architecture".into(), architecture.into());
            return Err(LoadError::Unsupported { field, value, known: "llama".into() });
        }
        keys::check_file(file)?;
        let (hidden, query) = (size(file, "embedding_length")?, size(file, "attention.head_count")?.max(1));
        let dim = optional::<u32>(file, "attention.key_length")?.map_or(hidden / query, |dim| dim as usize);
        let dim = check_head_dim(dim)?;
        let table = file
            .tensor("token_embd.weight")
            .ok_or_else(|| LoadError::MissingTensor("token_embd.weight".into()))?;
        // No key tells of biases: a projection has one if the tensor is there.
        let has_bias = |part: &str| {
            let is_bias =
                |name: &str| name.ends_with(".bias") && name.split('.').any(|at| at.starts_with(part));
            file.tensors().iter().any(|info| is_bias(&info.name))
        };
        let max_positions = size(file, "context_length")?;
        let kv = optional::<u32>(file, "attention.head_count_kv")?.map_or(query, |kv| kv as usize);
        let mut attention = Attention::causal(Heads { query, kv, dim });
        attention.qkv_bias = has_bias("attn_");
        attention.out_bias = attention.qkv_bias;
        let norm = NormSpec::rms(file.require("llama.attention.layer_norm_rms_epsilon")?);
        let mlp = Mlp {
            width: size(file, "feed_forward_length")?,
            activation: Activation::Silu,
            gated: true,
            bias: has_bias("ffn_"),
        };
        let layer = Layer { norm, wiring: Wiring::Sequential { post_norms: false }, attention, mlp };
        let decoder = Decoder {
            hidden,
            vocab: table.dims.get(1).copied().unwrap_or(0),
            max_positions,
            eos: file.end_tokens()?,
            embedding: Embedding { scale: 1.0, positions: None, norm: None },
            layers: vec![layer; size(file, "block_count")?.min(MAX_LAYERS + 1)],
            norm,
            head: Head::plain(file.tensor("output.weight").is_none()),
            ropes: vec![rope(file, dim, max_positions)?],
            residual_scale: 1.0,
            names: Names { stored: Stored::Gguf { permuted: true }, ..llama::NAMES },
        };
        let decoder = decoder.check()?;
        keys::check_architecture(file, &decoder)?;
        Ok(decoder)
    }
}

/// A number that must be positive.
fn positive(file: &Gguf, key: &str, default: f32) -> Result<f32> {
    let value = optional::<f32>(file, key)?.unwrap_or(default);
    if value.is_finite() && value > 0.0 { Ok(value) } else { Err(refused(key, value, "positive numbers")) }
}

/// The rotary embedding. Without a type the scaling is linear; a factor of 0 is none; the factors of [`ROPE_FACTORS`]
/// apply before any other scaling; and `attn_factor` applies whatever the type is.
fn rope(file: &Gguf, dim: usize, context: usize) -> Result<RopeSpec> {
    scaled(file, dim, context).map(|rope| rope.spec(context, Stretch::None))
}

fn scaled(file: &Gguf, dim: usize, context: usize) -> Result<Rope> {
    let theta = positive(file, "rope.freq_base", 10_000.0)?;
    let rope =
        Rope::plain(theta, dim).with_attention_factor(positive(file, "rope.scaling.attn_factor", 1.0)?);
    let rope = match rope_factors(file, dim)? {
        Some(factors) => rope.divided_by(&factors),
        None => rope,
    };
    let key = match optional::<f32>(file, "rope.scaling.factor")? {
        Some(_) => "rope.scaling.factor",
        // The older name, which counts only where the newer one is absent.
        None => "rope.scale_linear",
    };
    let factor = match optional(file, key)? {
        Some(0.0) | None => 1.0,
        Some(_) => positive(file, key, 1.0)?,
    };
    match optional::<&str>(file, "rope.scaling.type")?.unwrap_or("linear") {
        "none" => Ok(rope),
        "linear" => Ok(rope.linear(factor)),
        "yarn" => {
            let key = "rope.scaling.original_context_length";
            let original = match optional::<u32>(file, key)? {
                Some(0) | None => context,
                Some(original) => original as usize,
            };
            Ok(yarn(rope, factor, original as f32, (theta, dim as f32)))
        }
        other => Err(refused("rope.scaling.type", other, "none, linear, yarn")),
    }
}

/// YaRN with ggml's constants: full rotations from 32 on are kept, up to 1 are interpolated (`ggml_rope_yarn_corr_dims`
/// in `ggml.c`, in f32 as there).
fn yarn(rope: Rope, factor: f32, original: f32, (theta, dim): (f32, f32)) -> Rope {
    let pair_of = |rotations: f32| dim * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let low = pair_of(32.0).floor().max(0.0);
    let high = pair_of(1.0).ceil().min(dim - 1.0);
    let attention_factor = yarn_attention_factor(factor.into(), 1.0) as f32;
    rope.yarn(&Yarn { factor, low, width: (high - low).max(0.001) }).with_attention_factor(attention_factor)
}

/// The factors of a file's rotary frequencies for heads of `dim` elements, if it has any.
fn rope_factors(file: &Gguf, dim: usize) -> Result<Option<Vec<f32>>> {
    let Some(info) = file.tensor(ROPE_FACTORS) else { return Ok(None) };
    if info.dims != [dim / 2] {
        let (got, expected) = (info.dims.clone(), vec![dim / 2]);
        return Err(LoadError::Shape { name: ROPE_FACTORS.into(), got, expected });
    }
    let factors = file.dequantize(ROPE_FACTORS)?;
    if factors.iter().any(|factor| !factor.is_finite() || *factor <= 0.0) {
        return Err(LoadError::Field { field: ROPE_FACTORS, expected: "positive numbers" });
    }
    Ok(Some(factors))
}
