//! Mistral: a Llama without biases, whose layers may have a window.

use kernels::Span;
use serde_json::Value;

use super::{
    Family,
    fields::Fields,
    llama::{self, Biases, Sizes},
};
use crate::{Decoder, Result};

pub(super) const FAMILY: Family =
    Family { model_type: "mistral", architectures: &["MistralForCausalLM", "MistralModel"], page };

fn page(fields: &Fields) -> Result<Decoder> {
    let query = fields.size("num_attention_heads", 32)?;
    // One whose field is null has as many key heads as queries; one without the field has 8.
    let kv = if fields.raw("num_key_value_heads").is_some() { query } else { 8 };
    let sizes = Sizes { query, kv, ffn: 14_336, max_positions: 131_072 };
    let mut decoder = llama::decoder(fields, &sizes, Biases { attention: false, mlp: false })?;
    if let Some(window) = window(fields)? {
        for layer in &mut decoder.layers {
            layer.attention.shape.span = Span::Window(window);
        }
    }
    Ok(decoder)
}

/// Positions that a row sees: 4096 if the field is absent, all if it is null.
fn window(fields: &Fields) -> Result<Option<u32>> {
    match fields.raw("sliding_window") {
        Some(Value::Null) => Ok(None),
        _ => Ok(Some(fields.size("sliding_window", 4096)? as u32)),
    }
}
