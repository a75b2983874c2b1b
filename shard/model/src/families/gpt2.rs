//! GPT-2: learned positions, layer norms, one matrix of q, k and v, and projections that are stored `[in, out]`.

use kernels::{Activation, NormKind};

use super::{Family, fields::Fields, llama, outline::Outline};
use crate::{
    Decoder, Result,
    decoder::{Names, Part, Positions},
};

pub(super) const FAMILY: Family = Family {
    model_type: "gpt2",
    architectures: &["GPT2LMHeadModel", "GPT2Model"],
    aliases: &[
        ("hidden_size", "n_embd"),
        ("num_hidden_layers", "n_layer"),
        ("num_attention_heads", "n_head"),
        ("max_position_embeddings", "n_positions"),
        ("intermediate_size", "n_inner"),
    ],
    page,
};

pub(super) const NAMES: Names = Names {
    base: "transformer",
    layers: "transformer.h",
    outer: &[
        (Part::Embed, "transformer.wte"),
        (Part::Positions, "transformer.wpe"),
        (Part::Norm, "transformer.ln_f"),
        (Part::Head, "lm_head"),
    ],
    inner: &[
        (Part::AttentionNorm, "ln_1"),
        (Part::Qkv, "attn.c_attn"),
        (Part::Out, "attn.c_proj"),
        (Part::MlpNorm, "ln_2"),
        (Part::Up, "mlp.c_fc"),
        (Part::Down, "mlp.c_proj"),
    ],
    others: (
        &["transformer", "transformer.drop", "transformer.h"],
        &["", "attn", "attn.attn_dropout", "attn.resid_dropout", "mlp", "mlp.act", "mlp.dropout"],
    ),
    targets: &["c_attn"],
    transposed: true,
    eps: "layer_norm_epsilon",
    ..llama::NAMES
};

const OUTLINE: Outline = Outline {
    names: NAMES,
    hidden: 768,
    vocab: 50_257,
    layers: 12,
    query: 12,
    ffn: None,
    gated: false,
    activation: ("activation_function", Activation::GeluTanh),
    norm: NormKind::Layer,
    eps: 1e-5,
    max_positions: 1_024,
    rope: None,
    tied: true,
    eos: Some(50_256),
    ..llama::OUTLINE
};

fn page(fields: &Fields) -> Result<Decoder> {
    let mut decoder = OUTLINE.decoder(fields)?;
    decoder.embedding.positions = Some(Positions { rows: decoder.max_positions, first: 0 });
    let scales = fields.flag("scale_attn_weights", true)?;
    let scales_by_layer = fields.flag("scale_attn_by_inverse_layer_idx", false)?;
    for (i, layer) in decoder.layers.iter_mut().enumerate() {
        let scale = &mut layer.attention.shape.scale;
        *scale = if scales { *scale } else { 1.0 };
        *scale /= if scales_by_layer { (i + 1) as f32 } else { 1.0 };
        (layer.attention.qkv_bias, layer.attention.out_bias, layer.mlp.bias) = (true, true, true);
    }
    Ok(decoder)
}
