//! Gemma 3, its language model: a Gemma 2 without caps, whose queries and keys are normed head by head, and whose layers
//! with a window (five of six) have a rotary embedding of their own.

use kernels::{NormSpan, Pairs, RopeSpec, Span};
use serde_json::{Map, Value};

use super::{
    Family,
    fields::{Fields, unsupported},
    gemma2,
    outline::Outline,
    rope::{self, RopeFields},
    spans,
};
use crate::{Decoder, Result};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma3_text",
    architectures: &["Gemma3ForCausalLM", "Gemma3TextModel"],
    aliases: &[],
    page,
};

/// Its rotary embeddings differ by layer, and are not those of the outline.
const OUTLINE: Outline = Outline { vocab: 262_208, max_positions: 131_072, rope: None, ..gemma2::OUTLINE };

/// The names of types of layers, with the base of each's frequencies: its field and its default.
const FULL: (&str, RopeFields) =
    ("full_attention", RopeFields { default_theta: 1_000_000.0, ..RopeFields::COMMON });
const WINDOWED: (&str, RopeFields) =
    ("sliding_attention", RopeFields { theta: "rope_local_base_freq", ..RopeFields::COMMON });

fn page(fields: &Fields) -> Result<Decoder> {
    let mut decoder = gemma2::decoder(fields, &OUTLINE)?;
    let window = fields.size("sliding_window", 4096)?;
    let pattern = fields.size("sliding_window_pattern", 6)?;
    spans::set(&mut decoder, fields, Some(window), |layer| !(layer + 1).is_multiple_of(pattern))?;
    decoder.head.shape.softcap = fields.cap("final_logit_softcapping", None)?;
    decoder.ropes = ropes(fields, decoder.heads().dim, decoder.max_positions)?;
    let norm = decoder.norm;
    for layer in &mut decoder.layers {
        let rope = usize::from(layer.attention.shape.span != Span::Causal);
        layer.attention.rope = Some((rope, Pairs::Halves));
        layer.attention.norms = Some((norm, NormSpan::Head));
    }
    Ok(decoder)
}

/// The rotary embeddings of layers without and with a window. `rope_parameters` has an object for each type of layers;
/// what the older `rope_scaling` says is of layers without one.
fn ropes(fields: &Fields, dim: usize, positions: usize) -> Result<Vec<RopeSpec>> {
    let none = Map::new();
    let by_type = rope::object(fields, "rope_parameters")?.unwrap_or(&none);
    if let Some((key, value)) = by_type.iter().find(|(key, _)| ![FULL.0, WINDOWED.0].contains(&key.as_str()))
    {
        return Err(unsupported(key, value, "rotary parameters for each type of layers"));
    }
    let older = rope::object(fields, "rope_scaling")?.unwrap_or(&none);
    let of = |(kind, of): (&'static str, RopeFields), more: &Map<String, Value>| {
        let given = match by_type.get(kind) {
            None | Some(Value::Null) => none.clone(),
            Some(Value::Object(given)) => given.clone(),
            Some(other) => return Err(unsupported(kind, other, "an object")),
        };
        let nested: Map<_, _> = given.into_iter().chain(more.clone()).collect();
        let rope = rope::rope_of(fields, &of, &nested, (dim, positions))?;
        // `max_position_embeddings` of a Gemma 3 counts positions after scaling.
        Ok(RopeSpec { positions, ..rope })
    };
    Ok(vec![of(FULL, older)?, of(WINDOWED, &none)?])
}
