//! Qwen 3: a Qwen 2 without biases, whose queries and keys are normed head by head.

use kernels::NormSpan;

use super::{Family, fields::Fields, outline::Outline, qwen2};
use crate::{Decoder, Result};

pub(super) const FAMILY: Family =
    Family { model_type: "qwen3", architectures: &["Qwen3ForCausalLM", "Qwen3Model"], aliases: &[], page };

const OUTLINE: Outline = Outline { head_dim: Some(128), ..qwen2::OUTLINE };

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
