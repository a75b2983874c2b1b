//! Gemma: a Llama whose embeddings are multiplied by the root of the hidden size, whose norms store `w - 1`, and whose
//! gates are GELU.

use kernels::Activation;
use serde_json::Value;

use super::{Family, fields::Fields, llama, outline::Outline};
use crate::{Decoder, Result};

pub(super) const FAMILY: Family =
    Family { model_type: "gemma", architectures: &["GemmaForCausalLM", "GemmaModel"], aliases: &[], page };

pub(super) const OUTLINE: Outline = Outline {
    hidden: 3072,
    vocab: 256_000,
    layers: 28,
    query: 16,
    kv: Some(16),
    head_dim: Some(256),
    whole_heads: false,
    ffn: Some(24_576),
    activation: ("hidden_act", Activation::GeluTanh),
    max_positions: 8_192,
    tied: true,
    eos: Some(1),
    ..llama::OUTLINE
};

fn page(fields: &Fields) -> Result<Decoder> {
    let mut decoder = decoder(fields, &OUTLINE)?;
    // Files of the first release say so, but mean the approximation; transformers knows.
    if fields.raw("hidden_act") == Some(&Value::from("gelu")) {
        decoder.layers.iter_mut().for_each(|layer| layer.mlp.activation = Activation::GeluTanh);
    }
    Ok(decoder)
}

/// What all Gemmas have in common.
pub(super) fn decoder(fields: &Fields, outline: &Outline) -> Result<Decoder> {
    let mut decoder = outline.decoder(fields)?;
    decoder.embedding.scale = (decoder.hidden as f32).sqrt();
    decoder.norm.plus_one = true;
    let bias = fields.flag("attention_bias", false)?;
    for layer in &mut decoder.layers {
        layer.norm.plus_one = true;
        (layer.attention.qkv_bias, layer.attention.out_bias) = (bias, bias);
    }
    Ok(decoder)
}
