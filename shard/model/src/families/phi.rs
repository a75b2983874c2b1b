//! Phi 1, 1.5 and 2: biases everywhere, layer norms, a part of each head rotated, and both branches of a layer behind the
//! same norm.

use kernels::{Activation, NormKind, NormSpan};

use super::{Family, fields::Fields, llama, outline::Outline, rope::RopeFields};
use crate::{
    Decoder, Result,
    decoder::{Names, Part, Wiring},
};

pub(super) const FAMILY: Family =
    Family { model_type: "phi", architectures: &["PhiForCausalLM", "PhiModel"], aliases: &[], page };

const NAMES: Names = Names {
    outer: &[
        (Part::Embed, "model.embed_tokens"),
        (Part::Norm, "model.final_layernorm"),
        (Part::Head, "lm_head"),
    ],
    inner: &[
        (Part::AttentionNorm, "input_layernorm"),
        (Part::Q, "self_attn.q_proj"),
        (Part::K, "self_attn.k_proj"),
        (Part::V, "self_attn.v_proj"),
        (Part::QNorm, "self_attn.q_layernorm"),
        (Part::KNorm, "self_attn.k_layernorm"),
        (Part::Out, "self_attn.dense"),
        (Part::Up, "mlp.fc1"),
        (Part::Down, "mlp.fc2"),
    ],
    others: (
        &["model", "model.layers", "model.rotary_emb", "model.embed_dropout"],
        &["", "self_attn", "mlp", "mlp.activation_fn", "resid_dropout"],
    ),
    targets: &["q_proj", "v_proj", "fc1", "fc2"],
    eps: "layer_norm_eps",
    ..llama::NAMES
};

const OUTLINE: Outline = Outline {
    names: NAMES,
    hidden: 2048,
    vocab: 51_200,
    layers: 24,
    whole_heads: false,
    ffn: Some(8192),
    gated: false,
    activation: ("hidden_act", Activation::GeluTanh),
    norm: NormKind::Layer,
    eps: 1e-5,
    rope: Some(RopeFields { partial: Some(("partial_rotary_factor", 0.5)), ..RopeFields::COMMON }),
    ..llama::OUTLINE
};

fn page(fields: &Fields) -> Result<Decoder> {
    let mut decoder = OUTLINE.decoder(fields)?;
    let norms = fields.flag("qk_layernorm", false)?.then_some((decoder.norm, NormSpan::Head));
    for layer in &mut decoder.layers {
        layer.wiring = Wiring::Parallel { shared_norm: true };
        layer.attention.norms = norms;
        (layer.attention.qkv_bias, layer.attention.out_bias, layer.mlp.bias) = (true, true, true);
    }
    decoder.head.bias = true;
    Ok(decoder)
}
