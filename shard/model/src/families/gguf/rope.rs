//! Rotary embeddings from a GGUF file's metadata, as llama.cpp computes them (`src/llama-context.cpp`).

use std::f32::consts::PI;

use kernels::{RopeSpec, Stretch};

use super::{Metadata, refused};
use crate::{
    LoadError, Result,
    families::frequencies::{Rope, Yarn, reach, yarn_attention_factor},
};

/// Tensor that divides rotary frequencies, one element for each pair. Llama 3.1's scaling is written this way.
pub(super) const FACTORS: &str = "rope_freqs.weight";
/// The same for LongRoPE: for sequences up to the original context, and for longer ones.
pub(super) const LONG_FACTORS: [&str; 2] = ["rope_factors_short.weight", "rope_factors_long.weight"];

/// The rotary embedding of `rotated` elements of each head, for `context` positions.
pub(super) fn rope(of: &Metadata<'_>, rotated: usize, context: usize) -> Result<RopeSpec> {
    let theta = of.positive("rope.freq_base", 10_000.0)?;
    let [short, long] = LONG_FACTORS.map(|name| of.factors(name, rotated));
    let (Some(short), Some(long)) = (short?, long?) else {
        let (rope, longest) = scaled(of, theta, rotated, context, FACTORS)?;
        return Ok(rope.spec(longest, Stretch::None));
    };
    let (rope, _) = scaled(of, theta, rotated, context, "")?;
    let inv_freq = rope.clone().divided_by(&long).spec(0, Stretch::None).inv_freq;
    let original = original_context(of, context)? as u32;
    Ok(rope.divided_by(&short).spec(context, Stretch::Long { original, inv_freq }))
}

/// The rotary embedding of layers with a window that have a base of their own and are not scaled.
pub(super) fn unscaled(of: &Metadata<'_>, rotated: usize, context: usize) -> Result<RopeSpec> {
    let theta = of.positive("rope.freq_base_swa", 10_000.0)?;
    let factor = of.positive("rope.scaling.attn_factor", 1.0)?;
    Ok(Rope::plain(theta, rotated).with_attention_factor(factor).spec(context, Stretch::None))
}

fn original_context(of: &Metadata<'_>, context: usize) -> Result<usize> {
    Ok(match of.optional::<u32>("rope.scaling.original_context_length")? {
        Some(0) | None => context,
        Some(original) => original as usize,
    })
}

/// The embedding, and the longest sequence, which is that of a folder with the same parameters: llama.cpp has no limit.
/// Without a type the scaling is linear; a factor of 0 is none; the file's factors of frequencies apply before any other
/// scaling; and `attn_factor` applies whatever the type is.
fn scaled(
    of: &Metadata<'_>,
    theta: f32,
    rotated: usize,
    context: usize,
    factors: &'static str,
) -> Result<(Rope, usize)> {
    let attention_factor = of.positive("rope.scaling.attn_factor", 1.0)?;
    let rope = Rope::plain(theta, rotated).with_attention_factor(attention_factor);
    let rope = match of.factors(factors, rotated)? {
        Some(factors) => rope.divided_by(&factors),
        None => rope,
    };
    let key = match of.optional::<f32>("rope.scaling.factor")? {
        Some(_) => "rope.scaling.factor",
        // The older name, which counts only where the newer one is absent.
        None => "rope.scale_linear",
    };
    let factor = match of.optional(key)? {
        Some(0.0) | None => 1.0,
        Some(_) => of.positive(key, 1.0)?,
    };
    let original = original_context(of, context)?;
    let longest = reach(context, original as f64, factor.into());
    match of.optional::<&str>("rope.scaling.type")?.unwrap_or("linear") {
        "none" => Ok((rope, context)),
        "linear" => Ok((rope.linear(factor), longest)),
        "yarn" => Ok((yarn(rope, factor, original as f32, (theta, rotated as f32)), longest)),
        other => Err(refused(of, "rope.scaling.type", other, "none, linear, yarn")),
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

impl Metadata<'_> {
    /// The factors of a file's rotary frequencies, if it has them.
    fn factors(&self, name: &'static str, rotated: usize) -> Result<Option<Vec<f32>>> {
        let Some(info) = self.file.tensor(name) else { return Ok(None) };
        if info.dims != [rotated / 2] {
            let (got, expected) = (info.dims.clone(), vec![rotated / 2]);
            return Err(LoadError::Shape { name: name.into(), got, expected });
        }
        let factors = self.file.dequantize(name)?;
        if factors.iter().any(|factor| !factor.is_finite() || *factor <= 0.0) {
            return Err(LoadError::Field { field: name, expected: "positive numbers" });
        }
        Ok(Some(factors))
    }
}
