//! Llama, and what is called one: CodeLlama, Llama 2 and 3, SOLAR.

use kernels::{Activation, NormKind};

use super::{Family, fields::Fields, outline::Outline, rope::RopeFields};
use crate::{
    Decoder, Result,
    decoder::{Names, Part, QkvOrder, Stored},
};

pub(super) const FAMILY: Family =
    Family { model_type: "llama", architectures: &["LlamaForCausalLM", "LlamaModel"], aliases: &[], page };

/// Names that most families since have taken over. A Llama has no norms of queries and keys.
pub(super) const NAMES: Names = Names {
    stored: Stored::Folder,
    is_wrapped: false,
    base: "model",
    layers: "model.layers",
    outer: &[(Part::Embed, "model.embed_tokens"), (Part::Norm, "model.norm"), (Part::Head, "lm_head")],
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
    others: (&["model", "model.layers", "model.rotary_emb"], &["", "self_attn", "mlp", "mlp.act_fn"]),
    targets: &["q_proj", "v_proj"],
    renamed: &[],
    transposed: false,
    qkv_order: QkvOrder::ByKind,
    eps: "rms_norm_eps",
};

pub(super) const OUTLINE: Outline = Outline {
    names: NAMES,
    hidden: 4096,
    vocab: 32_000,
    layers: 32,
    query: 32,
    kv: None,
    head_dim: None,
    whole_heads: true,
    ffn: Some(11_008),
    gated: true,
    activation: ("hidden_act", Activation::Silu),
    norm: NormKind::Rms,
    eps: 1e-6,
    max_positions: 2_048,
    rope: Some(RopeFields::COMMON),
    tied: false,
    eos: Some(2),
};

fn page(fields: &Fields) -> Result<Decoder> {
    let mut decoder = OUTLINE.decoder(fields)?;
    let (attention, mlp) = (fields.flag("attention_bias", false)?, fields.flag("mlp_bias", false)?);
    for layer in &mut decoder.layers {
        (layer.attention.qkv_bias, layer.attention.out_bias, layer.mlp.bias) = (attention, attention, mlp);
    }
    Ok(decoder)
}
