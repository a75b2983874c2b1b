//! GPT-NeoX and Pythia: q, k and v of each head side by side in one matrix, layer norms, a part of each head rotated, and
//! both branches of a layer side by side, unless a field says otherwise.

use kernels::{Activation, NormKind};

use super::{Family, fields::Fields, llama, outline::Outline, rope::RopeFields};
use crate::{
    Decoder, Result,
    decoder::{Names, Part, QkvOrder, Wiring},
};

pub(super) const FAMILY: Family = Family {
    model_type: "gpt_neox",
    architectures: &["GPTNeoXForCausalLM", "GPTNeoXModel"],
    aliases: &[],
    page,
};

const NAMES: Names = Names {
    base: "gpt_neox",
    layers: "gpt_neox.layers",
    outer: &[
        (Part::Embed, "gpt_neox.embed_in"),
        (Part::Norm, "gpt_neox.final_layer_norm"),
        (Part::Head, "lm_head"),
    ],
    inner: &[
        (Part::AttentionNorm, "input_layernorm"),
        (Part::Qkv, "attention.query_key_value"),
        (Part::Out, "attention.dense"),
        (Part::MlpNorm, "post_attention_layernorm"),
        (Part::Up, "mlp.dense_h_to_4h"),
        (Part::Down, "mlp.dense_4h_to_h"),
    ],
    others: (
        &["gpt_neox", "gpt_neox.emb_dropout", "gpt_neox.layers", "gpt_neox.rotary_emb"],
        &["", "attention", "mlp", "mlp.act", "post_attention_dropout", "post_mlp_dropout"],
    ),
    targets: &["query_key_value"],
    // Files have the head's older name.
    renamed: &[("embed_out", "lm_head")],
    qkv_order: QkvOrder::ByHead,
    eps: "layer_norm_eps",
    ..llama::NAMES
};

const OUTLINE: Outline = Outline {
    names: NAMES,
    hidden: 6144,
    vocab: 50_432,
    layers: 44,
    query: 64,
    ffn: Some(24_576),
    gated: false,
    activation: ("hidden_act", Activation::Gelu),
    norm: NormKind::Layer,
    eps: 1e-5,
    rope: Some(RopeFields {
        theta: "rotary_emb_base",
        partial: Some(("rotary_pct", 0.25)),
        ..RopeFields::COMMON
    }),
    ..llama::OUTLINE
};

fn page(fields: &Fields) -> Result<Decoder> {
    // Files that transformers 4.4x has saved repeat `rotary_pct` under this name, which the family does not read.
    let _ = fields.raw("partial_rotary_factor");
    let mut decoder = OUTLINE.decoder(fields)?;
    let bias = fields.flag("attention_bias", true)?;
    let parallel = fields.flag("use_parallel_residual", true)?;
    for layer in &mut decoder.layers {
        if parallel {
            layer.wiring = Wiring::Parallel { shared_norm: false };
        }
        (layer.attention.qkv_bias, layer.attention.out_bias, layer.mlp.bias) = (bias, bias, true);
    }
    Ok(decoder)
}
