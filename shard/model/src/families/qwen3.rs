//! Qwen 3: a Qwen 2 without biases, whose queries and keys are normed head by head.

use kernels::NormSpan;

use super::{Family, fields::Fields, llama, outline::Outline, qwen2};
use crate::{
    Decoder, Result,
    decoder::{Names, Part},
};

pub(super) const FAMILY: Family =
    Family { model_type: "qwen3", architectures: &["Qwen3ForCausalLM", "Qwen3Model"], aliases: &[], page };

pub(super) const NAMES: Names = Names {
    inner: &[
        (Part::AttentionNorm, "input_layernorm"),
        (Part::Q, "self_attn.q_proj"),
        (Part::K, "self_attn.k_proj"),
        (Part::V, "self_attn.v_proj"),
        (Part::QNorm, "self_attn.q_norm"),
        (Part::KNorm, "self_attn.k_norm"),
        (Part::Out, "self_attn.o_proj"),
        (Part::MlpNorm, "post_attention_layernorm"),
        (Part::Gate, "mlp.gate_proj"),
        (Part::Up, "mlp.up_proj"),
        (Part::Down, "mlp.down_proj"),
    ],
    ..llama::NAMES
};

const OUTLINE: Outline = Outline { names: NAMES, head_dim: Some(128), ..qwen2::OUTLINE };

fn page(fields: &Fields) -> Result<Decoder> {
    let mut decoder = OUTLINE.decoder(fields)?;
    let bias = fields.flag("attention_bias", false)?;
    let norm = decoder.norm;
    for layer in &mut decoder.layers {
        layer.attention.norms = Some((norm, NormSpan::Head));
        (layer.attention.qkv_bias, layer.attention.out_bias) = (bias, bias);
    }
    qwen2::set_spans(fields, &mut decoder)?;
    Ok(decoder)
}
