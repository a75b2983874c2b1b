//! Rotary embeddings (Su et al., 2021) and the ways to scale them for contexts longer than those of the training.

use std::f32::consts::TAU;

use kernels::{RopeSpec, Stretch};

use crate::decoder::MAX_POSITIONS;

/// A rotary embedding: what a position is multiplied with to get the angle of each pair of elements of a head.
#[derive(Clone)]
pub(super) struct Rope {
    /// Radians per position of each pair.
    inv_freq: Vec<f32>,
    /// Factor of all cosines and sines. The logits of attention grow by its square.
    attention_factor: f32,
}

/// Llama 3.1's scaling: low frequencies are divided by `factor`, high ones are kept, with a ramp between.
pub(super) struct Llama3 {
    /// Divisor of low frequencies.
    pub(super) factor: f32,
    /// Wavelengths above `original / low` belong to low frequencies.
    pub(super) low: f32,
    /// Wavelengths below `original / high` belong to high frequencies.
    pub(super) high: f32,
    /// Context length of the training before.
    pub(super) original: f32,
}

/// YaRN's scaling by parts (Peng et al., 2023): pairs up to `low` keep their frequency, those from `low + width` on are
/// divided by `factor`, with a ramp between.
pub(super) struct Yarn {
    /// Divisor of low frequencies.
    pub(super) factor: f32,
    /// Where the ramp begins, in pairs.
    pub(super) low: f32,
    /// Length of the ramp in pairs.
    pub(super) width: f32,
}

impl Rope {
    /// The same as it is computed.
    pub(super) fn spec(self, positions: usize, stretch: Stretch) -> RopeSpec {
        RopeSpec { inv_freq: self.inv_freq, scale: self.attention_factor, positions, stretch }
    }

    /// The frequencies `theta^(-2j / dim)` of a head of `dim` elements, unscaled.
    pub(super) fn plain(theta: f32, dim: usize) -> Rope {
        let inv_freq = |j: usize| 1.0 / theta.powf(2.0 * j as f32 / dim as f32);
        Rope { inv_freq: (0..dim / 2).map(inv_freq).collect(), attention_factor: 1.0 }
    }

    fn map(mut self, scaled: impl Fn(usize, f32) -> f32) -> Rope {
        self.inv_freq.iter_mut().enumerate().for_each(|(j, freq)| *freq = scaled(j, *freq));
        self
    }

    /// Position interpolation (Chen et al., 2023).
    pub(super) fn linear(self, factor: f32) -> Rope {
        self.map(|_, freq| freq / factor)
    }

    /// Each frequency is divided by its own factor.
    pub(super) fn divided_by(self, factors: &[f32]) -> Rope {
        self.map(|j, freq| freq / factors[j])
    }

    pub(super) fn llama3(self, scaling: &Llama3) -> Rope {
        let Llama3 { factor, low, high, original } = *scaling;
        self.map(|_, freq| {
            let wavelength = TAU / freq;
            if wavelength < original / high {
                freq
            } else if wavelength > original / low {
                freq / factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                (1.0 - smooth) * freq / factor + smooth * freq
            }
        })
    }

    pub(super) fn yarn(self, scaling: &Yarn) -> Rope {
        let Yarn { factor, low, width } = *scaling;
        self.map(|j, freq| {
            let interpolated = ((j as f32 - low) / width).clamp(0.0, 1.0);
            freq / factor * interpolated + freq * (1.0 - interpolated)
        })
    }

    /// Multiplies all cosines and sines.
    pub(super) fn with_attention_factor(mut self, factor: f32) -> Rope {
        self.attention_factor *= factor;
        self
    }
}

/// YaRN's factor of cosines and sines for positions that are scaled by `factor`.
pub(super) fn yarn_attention_factor(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// LongRoPE's factor of cosines and sines (Ding et al., 2024) for positions that are scaled by `factor`, beyond a context
/// of `original` tokens.
pub(super) fn long_rope_attention_factor(factor: f64, original: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() }
}

/// The longest sequence, if frequencies are scaled by `factor` from a context of `original` tokens. Some models'
/// `max_position_embeddings` is the length of the training before, and others' is larger than what the factor gives. vLLM
/// goes by the factor, too (`_get_and_verify_max_len`), except for `llama3`, `longrope` and Gemma 3.
pub(super) fn reach(max_positions: usize, original: f64, factor: f64) -> usize {
    let scaled = (original * factor).min(MAX_POSITIONS as f64);
    max_positions.max(scaled as usize)
}
