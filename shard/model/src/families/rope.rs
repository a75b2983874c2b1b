//! Rotary parameters in all the ways in which a `config.json` writes them, computed as transformers does
//! (`modeling_rope_utils.py`).

use std::f64::consts::TAU;

use kernels::{RopeSpec, Stretch};
use serde_json::{Map, Value};

use super::{
    fields::{Fields, unsupported},
    frequencies::{Llama3, Rope, Yarn, long_rope_attention_factor, reach, yarn_attention_factor},
};
use crate::{LoadError, Result};

/// A way to scale rotary frequencies.
#[derive(Clone, Copy)]
pub(super) enum Scaling {
    Default,
    Linear,
    Dynamic,
    Yarn,
    Llama3,
    LongRope,
}

/// The name of each scaling.
const SCALINGS: [(&str, Scaling); 6] = [
    ("default", Scaling::Default),
    ("linear", Scaling::Linear),
    ("dynamic", Scaling::Dynamic),
    ("yarn", Scaling::Yarn),
    ("llama3", Scaling::Llama3),
    ("longrope", Scaling::LongRope),
];

/// A family's fields of rotary parameters.
pub(super) struct RopeFields {
    /// The field beside the parameters that has the base of frequencies.
    pub(super) theta: &'static str,
    /// Its default.
    pub(super) default_theta: f64,
    /// The field that has the share of a head that is rotated, and its default; none where all is.
    pub(super) partial: Option<(&'static str, f64)>,
    /// The context length of the training before, if the family has a field of it beside the parameters.
    pub(super) original: Option<f64>,
    /// Names of the scalings that the family takes.
    pub(super) scalings: &'static [(&'static str, Scaling)],
}

impl RopeFields {
    /// Those of most families.
    pub(super) const COMMON: RopeFields = RopeFields {
        theta: "rope_theta",
        default_theta: 10_000.0,
        partial: None,
        original: None,
        scalings: &SCALINGS,
    };
}

/// A `rope_scaling` or `rope_parameters`, with what the fields around it contribute.
struct Parameters<'a> {
    fields: &'a Fields,
    of: &'a RopeFields,
    nested: &'a Map<String, Value>,
    max_positions: usize,
}

/// The rotary embedding of heads of `dim` elements.
pub(super) fn rope(fields: &Fields, of: &RopeFields, dim: usize, max_positions: usize) -> Result<RopeSpec> {
    let none = Map::new();
    // The older name wins over the newer one, unless it is empty.
    let nested = match object(fields, "rope_scaling")?.filter(|nested| !nested.is_empty()) {
        Some(nested) => nested,
        None => object(fields, "rope_parameters")?.unwrap_or(&none),
    };
    if let Some((layers, value)) = nested.iter().find(|(_, value)| value.is_object()) {
        return Err(unsupported(layers, value, "the same rotary parameters for all layers"));
    }
    Parameters { fields, of, nested, max_positions }.spec(dim)
}

/// The rotary embedding of layers of one type, whose parameters are an object of their own.
pub(super) fn rope_of(
    fields: &Fields,
    of: &RopeFields,
    nested: &Map<String, Value>,
    (dim, max_positions): (usize, usize),
) -> Result<RopeSpec> {
    Parameters { fields, of, nested, max_positions }.spec(dim)
}

/// A field that is an object, unless it is absent or null.
pub(super) fn object<'a>(fields: &'a Fields, field: &'static str) -> Result<Option<&'a Map<String, Value>>> {
    let wrong = LoadError::Field { field, expected: "an object" };
    fields.get(field).map(|value| value.as_object().ok_or(wrong)).transpose()
}

impl Parameters<'_> {
    fn spec(&self, dim: usize) -> Result<RopeSpec> {
        let beside = self.fields.optional_number(self.of.theta)?;
        let theta = self.number("rope_theta")?.or(beside).unwrap_or(self.of.default_theta);
        if !theta.is_finite() || theta <= 0.0 {
            return Err(LoadError::Field { field: self.of.theta, expected: "a positive number" });
        }
        self.scaled(theta, self.rotated(dim)?)
    }

    /// Elements of a head that are rotated.
    fn rotated(&self, dim: usize) -> Result<usize> {
        let field = "partial_rotary_factor";
        let nested = self.number(field)?;
        let Some((own, default)) = self.of.partial else {
            return match nested {
                None | Some(1.0) => Ok(dim),
                Some(_) => Err(unsupported(field, &self.nested[field], "1")),
            };
        };
        let share = nested.or(self.fields.optional_number(own)?).unwrap_or(default);
        let rotated = (dim as f64 * share) as usize;
        if share > 0.0 && rotated > 0 && rotated <= dim && rotated.is_multiple_of(2) {
            Ok(rotated)
        } else {
            Err(LoadError::Field {
                field: own,
                expected: "a share of each head that is an even number of elements",
            })
        }
    }

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
        let beside = self.fields.optional_number(field)?.or(self.of.original);
        let original = match beside {
            Some(original) => original,
            None => self.number(field)?.unwrap_or(self.max_positions as f64),
        };
        let wrong = LoadError::Field { field, expected: "a positive number" };
        if original > 0.0 && original <= f64::from(u32::MAX) { Ok(original) } else { Err(wrong) }
    }

    /// The factor, or else how much longer the longest sequence is than the original context.
    fn factor_from(&self, original: f64) -> Result<f64> {
        if self.get("factor").is_some() { self.factor() } else { Ok(self.max_positions as f64 / original) }
    }

    /// The scaling, and its name.
    fn scaling(&self) -> Result<Scaling> {
        let (name, kind) = match (self.get("rope_type"), self.get("type")) {
            (Some(kind), _) => ("rope_type", kind),
            (None, Some(kind)) => ("type", kind),
            (None, None) => return Ok(Scaling::Default),
        };
        let known = self.of.scalings.iter().find(|(known, _)| kind == known);
        let names = || self.of.scalings.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        known.map(|(_, scaling)| *scaling).ok_or_else(|| unsupported(name, kind, names()))
    }

    fn scaled(&self, theta: f64, dim: usize) -> Result<RopeSpec> {
        let (rope, positions) = (Rope::plain(theta as f32, dim), self.max_positions);
        let rope = match self.scaling()? {
            Scaling::Default => match self.number("factor")? {
                None | Some(1.0) => rope,
                // A factor of nothing: transformers passes over it, or fails, depending on its version.
                Some(_) => {
                    return Err(unsupported("factor", &self.nested["factor"], "factors of a rope_type"));
                }
            },
            Scaling::Linear => {
                let factor = self.factor()?;
                return Ok(rope
                    .linear(factor as f32)
                    .spec(reach(self.max_positions, self.original()?, factor), Stretch::None));
            }
            Scaling::Dynamic => {
                let (original, factor) = (positions as u32, self.factor()?);
                let longest = reach(self.max_positions, f64::from(original), factor);
                return Ok(rope.spec(longest, Stretch::Dynamic { original, factor: factor as f32 }));
            }
            Scaling::Yarn => {
                let original = self.original()?;
                let factor = self.factor_from(original)?;
                let rope = self.yarn(rope, (theta, dim as f64), (original, factor))?;
                return Ok(rope.spec(reach(self.max_positions, original, factor), Stretch::None));
            }
            Scaling::Llama3 => rope.llama3(&Llama3 {
                factor: self.factor()? as f32,
                low: self.required("low_freq_factor")? as f32,
                high: self.required("high_freq_factor")? as f32,
                original: self.original()? as f32,
            }),
            Scaling::LongRope => return self.long_rope(rope, dim),
        };
        Ok(rope.spec(positions, Stretch::None))
    }

    /// LongRoPE: a list of divisors for sequences up to the original context, and one for longer ones.
    fn long_rope(&self, rope: Rope, dim: usize) -> Result<RopeSpec> {
        let [short, long] = [self.divisors("short_factor", dim / 2)?, self.divisors("long_factor", dim / 2)?];
        let original = self.original()?;
        let factor = self.factor_from(original)?;
        let attention_factor = match self.number("attention_factor")? {
            Some(attention_factor) => attention_factor,
            None => long_rope_attention_factor(factor, original),
        };
        let inv_freq = rope.clone().divided_by(&long).spec(0, Stretch::None).inv_freq;
        let stretch = Stretch::Long { original: original as u32, inv_freq };
        let rope = rope.divided_by(&short).with_attention_factor(attention_factor as f32);
        Ok(rope.spec(self.max_positions, stretch))
    }

    /// Positive numbers, one for each pair of elements.
    fn divisors(&self, field: &'static str, pairs: usize) -> Result<Vec<f32>> {
        let list = self.get(field).and_then(Value::as_array).filter(|list| list.len() == pairs);
        let numbers =
            list.and_then(|list| list.iter().map(|x| Some(x.as_f64()? as f32)).collect::<Option<Vec<_>>>());
        let positive = numbers.filter(|list| list.iter().all(|x| *x > 0.0));
        positive.ok_or(LoadError::Field {
            field,
            expected: "a list of positive numbers, one for each rotated pair",
        })
    }

    /// YaRN, with its constants where the parameters have none: full rotations from 32 on are kept, up to 1 are
    /// interpolated.
    fn yarn(&self, rope: Rope, (theta, dim): (f64, f64), (original, factor): (f64, f64)) -> Result<Rope> {
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
