//! Gemma 2: a Gemma that also norms what its branches add to the stream, caps scores and logits, and whose every second
//! layer has a window.

use kernels::Activation;

use super::{Family, fields::Fields, gemma, llama, outline::Outline, spans};
use crate::{
    Decoder, LoadError, Result,
    decoder::{Names, Part, Wiring},
};

pub(super) const FAMILY: Family =
    Family { model_type: "gemma2", architectures: &["Gemma2ForCausalLM", "Gemma2Model"], aliases: &[], page };

pub(super) const NAMES: Names = Names {
    inner: &[
        (Part::AttentionNorm, "input_layernorm"),
        (Part::Q, "self_attn.q_proj"),
        (Part::K, "self_attn.k_proj"),
        (Part::V, "self_attn.v_proj"),
        (Part::QNorm, "self_attn.q_norm"),
        (Part::KNorm, "self_attn.k_norm"),
        (Part::Out, "self_attn.o_proj"),
        (Part::AttentionPost, "post_attention_layernorm"),
        (Part::MlpNorm, "pre_feedforward_layernorm"),
        (Part::Gate, "mlp.gate_proj"),
        (Part::Up, "mlp.up_proj"),
        (Part::Down, "mlp.down_proj"),
        (Part::MlpPost, "post_feedforward_layernorm"),
    ],
    ..llama::NAMES
};

pub(super) const OUTLINE: Outline = Outline {
    names: NAMES,
    hidden: 2304,
    layers: 26,
    query: 8,
    kv: Some(4),
    whole_heads: true,
    ffn: Some(9216),
    activation: ("hidden_activation", Activation::GeluTanh),
    ..gemma::OUTLINE
};

fn page(fields: &Fields) -> Result<Decoder> {
    let mut decoder = decoder(fields, &OUTLINE)?;
    let window = fields.size("sliding_window", 4096)?;
    spans::set(&mut decoder, fields, Some(window), |layer| layer.is_multiple_of(2))?;
    let softcap = fields.cap("attn_logit_softcapping", Some(50.0))?;
    decoder.layers.iter_mut().for_each(|layer| layer.attention.shape.softcap = softcap);
    decoder.head.shape.softcap = fields.cap("final_logit_softcapping", Some(30.0))?;
    Ok(decoder)
}

/// What Gemma 2 and 3 have in common.
pub(super) fn decoder(fields: &Fields, outline: &Outline) -> Result<Decoder> {
    let mut decoder = gemma::decoder(fields, outline)?;
    let field = "query_pre_attn_scalar";
    let scalar = fields.number(field, 256.0)?;
    if scalar <= 0.0 {
        return Err(LoadError::Field { field, expected: "a positive number" });
    }
    for layer in &mut decoder.layers {
        layer.wiring = Wiring::Sequential { post_norms: true };
        layer.attention.shape.scale = scalar.sqrt().recip();
    }
    Ok(decoder)
}
