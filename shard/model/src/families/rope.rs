//! Rotary parameters in all the ways in which a `config.json` writes them, computed as transformers does
//! (`modeling_rope_utils.py`).

use std::f64::consts::TAU;

use kernels::{RopeSpec, Stretch};
use serde_json::{Map, Value};

use super::{
    fields::{Fields, unsupported},
    frequencies::{Llama3, Rope, Yarn, yarn_attention_factor},
};
use crate::{LoadError, Result};

/// Scalings that are computed.
const KNOWN: &str = "default, linear, dynamic, yarn, llama3";

/// A `rope_scaling` or `rope_parameters`, with what the fields around it contribute.
struct Parameters<'a> {
    fields: &'a Fields,
    nested: &'a Map<String, Value>,
    max_positions: usize,
}

/// The rotary embedding of heads of `dim` elements.
pub(super) fn rope(fields: &Fields, dim: usize, max_positions: usize) -> Result<RopeSpec> {
    let none = Map::new();
    // The older name wins over the newer one, unless it is empty.
    let nested = match object(fields, "rope_scaling")?.filter(|nested| !nested.is_empty()) {
        Some(nested) => nested,
        None => object(fields, "rope_parameters")?.unwrap_or(&none),
    };
    if let Some((layers, value)) = nested.iter().find(|(_, value)| value.is_object()) {
        return Err(unsupported(layers, value, "the same rotary parameters for all layers"));
    }
    let parameters = Parameters { fields, nested, max_positions };
    let theta = match parameters.number("rope_theta")? {
        Some(theta) => theta,
        None => fields.number("rope_theta", 10_000.0)?.into(),
    };
    if !theta.is_finite() || theta <= 0.0 {
        return Err(LoadError::Field { field: "rope_theta", expected: "a positive number" });
    }
    if parameters.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(unsupported("partial_rotary_factor", &nested["partial_rotary_factor"], "1"));
    }
    parameters.scaled(Rope::plain(theta as f32, dim), theta, dim)
}

fn object<'a>(fields: &'a Fields, field: &'static str) -> Result<Option<&'a Map<String, Value>>> {
    let wrong = LoadError::Field { field, expected: "an object" };
    fields.get(field).map(|value| value.as_object().ok_or(wrong)).transpose()
}

impl Parameters<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.nested.get(key).filter(|value| !value.is_null())
    }

    fn number(&self, field: &'static str) -> Result<Option<f64>> {
        let wrong = LoadError::Field { field, expected: "a number in rope_scaling" };
        self.get(field).map(|value| value.as_f64().ok_or(wrong)).transpose()
    }

    fn required(&self, field: &'static str) -> Result<f64> {
        self.number(field)?.ok_or(LoadError::Field { field, expected: "a number in rope_scaling" })
    }

    /// The factor that frequencies are divided by.
    fn factor(&self) -> Result<f64> {
        let factor = self.required("factor")?;
        let wrong = LoadError::Field { field: "factor", expected: "a positive number in rope_scaling" };
        if factor > 0.0 { Ok(factor) } else { Err(wrong) }
    }

    /// Context length of the training before: a field beside the parameters, one of them, or the longest sequence.
    fn original(&self) -> Result<f64> {
        let field = "original_max_position_embeddings";
        let beside = self.fields.get(field).and_then(Value::as_f64);
        let original = match beside {
            Some(original) => original,
            None => self.number(field)?.unwrap_or(self.max_positions as f64),
        };
        let wrong = LoadError::Field { field, expected: "a positive number" };
        if original > 0.0 { Ok(original) } else { Err(wrong) }
    }

    fn scaled(&self, rope: Rope, theta: f64, dim: usize) -> Result<RopeSpec> {
        let plain = |rope: Rope| rope.spec(self.max_positions, Stretch::None);
        let (name, kind) = match (self.get("rope_type"), self.get("type")) {
            (Some(kind), _) => ("rope_type", kind.clone()),
            (None, Some(kind)) => ("type", kind.clone()),
            (None, None) => ("rope_type", "default".into()),
        };
        match kind.as_str() {
            Some("default") => match self.number("factor")? {
                None | Some(1.0) => Ok(plain(rope)),
                // A factor of nothing: transformers passes over it, or fails, depending on its version.
                Some(_) => Err(unsupported("factor", &self.nested["factor"], "factors of a rope_type")),
            },
            Some("linear") => Ok(plain(rope.linear(self.factor()? as f32))),
            Some("dynamic") => {
                let factor = self.factor()? as f32;
                let positions = (self.max_positions as f32 * factor.max(1.0)) as usize;
                Ok(rope.spec(positions, Stretch::Dynamic { original: self.max_positions as u32, factor }))
            }
            Some("yarn") => self.yarn(rope, theta, dim as f64).map(plain),
            Some("llama3") => Ok(plain(rope.llama3(&Llama3 {
                factor: self.factor()? as f32,
                low: self.required("low_freq_factor")? as f32,
                high: self.required("high_freq_factor")? as f32,
                original: self.original()? as f32,
            }))),
            _ => Err(unsupported(name, &kind, KNOWN)),
        }
    }

    /// YaRN, with its constants where the parameters have none: full rotations from 32 on are kept, up to 1 are
    /// interpolated.
    fn yarn(&self, rope: Rope, theta: f64, dim: f64) -> Result<Rope> {
        let original = self.original()?;
        let factor = match self.get("factor") {
            Some(_) => self.factor()?,
            None => self.max_positions as f64 / original,
        };
        // As in Python, 0 counts as "not given".
        let given = |field| Ok::<_, LoadError>(self.number(field)?.filter(|x| *x != 0.0));
        let attention_factor =
            match (self.number("attention_factor")?, given("mscale")?, given("mscale_all_dim")?) {
                (Some(attention_factor), _, _) => attention_factor,
                (None, Some(mscale), Some(all)) => {
                    yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, all)
                }
                _ => yarn_attention_factor(factor, 1.0),
            };
        let pair_of = |rotations: f64| dim * (original / (rotations * TAU)).ln() / (2.0 * theta.ln());
        let low = pair_of(given("beta_fast")?.unwrap_or(32.0));
        let high = pair_of(given("beta_slow")?.unwrap_or(1.0));
        let truncates = match self.nested.get("truncate") {
            None => true,
            Some(Value::Null) => false,
            Some(truncate) => truncate
                .as_bool()
                .ok_or(LoadError::Field { field: "truncate", expected: "true or false in rope_scaling" })?,
        };
        let (low, high) = if truncates { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        let width = if low == high { 0.001 } else { high - low };
        let yarn = Yarn { factor: factor as f32, low: low as f32, width: width as f32 };
        Ok(rope.yarn(&yarn).with_attention_factor(attention_factor as f32))
    }
}
