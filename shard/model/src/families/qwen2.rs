//! Qwen 2 and 2.5: a Llama with biases of queries, keys and values, whose upper layers may have a window.

use super::{Family, fields::Fields, llama, outline::Outline, spans};
use crate::{Decoder, Result};

pub(super) const FAMILY: Family =
    Family { model_type: "qwen2", architectures: &["Qwen2ForCausalLM", "Qwen2Model"], aliases: &[], page };

pub(super) const OUTLINE: Outline = Outline {
    vocab: 151_936,
    kv: Some(32),
    ffn: Some(22_016),
    max_positions: 32_768,
    whole_heads: false,
    eos: None,
    ..llama::OUTLINE
};

fn page(fields: &Fields) -> Result<Decoder> {
    let mut decoder = OUTLINE.decoder(fields)?;
    decoder.layers.iter_mut().for_each(|layer| layer.attention.qkv_bias = true);
    set_spans(fields, &mut decoder)?;
    Ok(decoder)
}

/// Windows are switched on by a field of their own; layers from `max_window_layers` on have one.
pub(super) fn set_spans(fields: &Fields, decoder: &mut Decoder) -> Result<()> {
    let used = fields.flag("use_sliding_window", false)?;
    let window = match fields.raw("sliding_window") {
        Some(value) if value.is_null() => None,
        _ => Some(fields.size("sliding_window", 4096)?),
    };
    let first = fields.count("max_window_layers", 28)?;
    spans::set(decoder, fields, window.filter(|_| used), |layer| layer >= first)
}
