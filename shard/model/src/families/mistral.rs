//! Mistral: a Llama without biases, whose layers may have a window. Nemo's heads have a size of their own.

use kernels::Span;
use serde_json::Value;

use super::{Family, fields::Fields, llama, outline::Outline};
use crate::{Decoder, Result};

pub(super) const FAMILY: Family = Family {
    model_type: "mistral",
    architectures: &["MistralForCausalLM", "MistralModel"],
    aliases: &[],
    page,
};

const OUTLINE: Outline =
    Outline { kv: Some(8), ffn: Some(14_336), max_positions: 131_072, whole_heads: false, ..llama::OUTLINE };

fn page(fields: &Fields) -> Result<Decoder> {
    let mut decoder = OUTLINE.decoder(fields)?;
    // Positions that a row sees: 4096 if the field is absent, all if it is null.
    if fields.raw("sliding_window") != Some(&Value::Null) {
        let window = fields.size("sliding_window", 4096)?;
        for layer in &mut decoder.layers {
            layer.attention.shape.span = Span::Window(window as u32);
        }
    }
    Ok(decoder)
}
