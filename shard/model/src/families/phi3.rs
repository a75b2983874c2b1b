//! Phi 3, 3.5, 4 and 4-mini: a Llama whose q, k and v are one matrix, as are gate and up; it may have a window, LongRoPE
//! and heads that are rotated in part.

use kernels::Span;

use super::{
    Family,
    fields::Fields,
    llama,
    outline::Outline,
    rope::{RopeFields, Scaling},
};
use crate::{
    Decoder, Result,
    decoder::{Names, Part},
};

pub(super) const FAMILY: Family =
    Family { model_type: "phi3", architectures: &["Phi3ForCausalLM", "Phi3Model"], aliases: &[], page };

pub(super) const NAMES: Names = Names {
    inner: &[
        (Part::AttentionNorm, "input_layernorm"),
        (Part::Qkv, "self_attn.qkv_proj"),
        (Part::Out, "self_attn.o_proj"),
        (Part::MlpNorm, "post_attention_layernorm"),
        (Part::GateUp, "mlp.gate_up_proj"),
        (Part::Down, "mlp.down_proj"),
    ],
    others: (
        &["model", "model.layers", "model.rotary_emb"],
        &["", "self_attn", "mlp", "mlp.activation_fn", "resid_attn_dropout", "resid_mlp_dropout"],
    ),
    // PEFT knows none.
    targets: &[],
    ..llama::NAMES
};

const OUTLINE: Outline = Outline {
    names: NAMES,
    hidden: 3072,
    vocab: 32_064,
    whole_heads: false,
    ffn: Some(8192),
    eps: 1e-5,
    max_positions: 4_096,
    eos: Some(32_000),
    rope: Some(RopeFields {
        partial: Some(("partial_rotary_factor", 1.0)),
        original: Some(4_096.0),
        // Older files have the other names for LongRoPE.
        scalings: &[
            ("default", Scaling::Default),
            ("longrope", Scaling::LongRope),
            ("su", Scaling::LongRope),
            ("yarn", Scaling::LongRope),
        ],
        ..RopeFields::COMMON
    }),
    ..llama::OUTLINE
};

fn page(fields: &Fields) -> Result<Decoder> {
    let mut decoder = OUTLINE.decoder(fields)?;
    if let Some(window) = fields.optional_size("sliding_window")? {
        for layer in &mut decoder.layers {
            layer.attention.shape.span = Span::Window(window as u32);
        }
    }
    Ok(decoder)
}
