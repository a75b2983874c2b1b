//! Which layers have a window: a list of the layers' types, or a pattern where there is none.

use kernels::Span;
use serde_json::Value;

use super::fields::{Fields, unsupported};
use crate::{Decoder, LoadError, Result};

/// Gives the layers a window of so many positions, if there is one: those that `layer_types` names, or else those of
/// the pattern.
pub(super) fn set(
    decoder: &mut Decoder,
    fields: &Fields,
    window: Option<usize>,
    pattern: impl Fn(usize) -> bool,
) -> Result<()> {
    let count = decoder.layers.len();
    let windowed = match fields.get("layer_types") {
        Some(types) => listed(types, count, window.is_some())?,
        None => (0..count).map(pattern).collect(),
    };
    let span = window.map_or(Span::Causal, |window| Span::Window(window as u32));
    for (layer, _) in decoder.layers.iter_mut().zip(windowed).filter(|(_, windowed)| *windowed) {
        layer.attention.shape.span = span;
    }
    Ok(())
}

/// Which layers a list says to have a window, one for each layer.
fn listed(types: &Value, count: usize, has_window: bool) -> Result<Vec<bool>> {
    let field = "layer_types";
    let list = types.as_array().ok_or(LoadError::Field { field, expected: "a list" })?;
    if list.len() != count {
        return Err(LoadError::Inconsistent { what: "layer_types", got: list.len(), expected: count });
    }
    let windowed = list.iter().map(|kind| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") if has_window => Ok(true),
        Some("sliding_attention") => Err(unsupported(field, kind, "full_attention without sliding_window")),
        _ => Err(unsupported(field, kind, "full_attention, sliding_attention")),
    });
    windowed.collect()
}
