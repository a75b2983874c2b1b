//! Llama, and what is called one: CodeLlama, Llama 2 and 3, SOLAR.

use kernels::{Activation, Heads};

use super::{Family, fields::Fields, rope};
use crate::{
    Decoder, Result,
    decoder::{
        Attention, Embedding, Head, Layer, MAX_LAYERS, Mlp, Names, NormSpec, Part, QkvOrder, Stored, Wiring,
        check_head_dim,
    },
};

pub(super) const FAMILY: Family =
    Family { model_type: "llama", architectures: &["LlamaForCausalLM", "LlamaModel"], page };

/// Names that most families since have taken over.
pub(super) const NAMES: Names = Names {
    stored: Stored::Folder,
    base: "model",
    layers: "model.layers",
    outer: &[(Part::Embed, "model.embed_tokens"), (Part::Norm, "model.norm"), (Part::Head, "lm_head")],
    inner: &[
        (Part::AttentionNorm, "input_layernorm"),
        (Part::Q, "self_attn.q_proj"),
        (Part::K, "self_attn.k_proj"),
        (Part::V, "self_attn.v_proj"),
        (Part::Out, "self_attn.o_proj"),
        (Part::MlpNorm, "post_attention_layernorm"),
        (Part::Gate, "mlp.gate_proj"),
        (Part::Up, "mlp.up_proj"),
        (Part::Down, "mlp.down_proj"),
    ],
    others: (&["model", "model.layers", "model.rotary_emb"], &["", "self_attn", "mlp", "mlp.act_fn"]),
    targets: &["q_proj", "v_proj"],
    transposed: false,
    qkv_order: QkvOrder::ByKind,
    eps: "rms_norm_eps",
};

fn page(fields: &Fields) -> Result<Decoder> {
    let query = fields.size("num_attention_heads", 32)?;
    let sizes = Sizes { query, kv: query, ffn: 11_008, max_positions: 2_048 };
    decoder(
        fields,
        &sizes,
        Biases { attention: fields.flag("attention_bias", false)?, mlp: fields.flag("mlp_bias", false)? },
    )
}

/// Sizes of a configuration that does not tell them.
pub(super) struct Sizes {
    pub(super) query: usize,
    pub(super) kv: usize,
    pub(super) ffn: usize,
    pub(super) max_positions: usize,
}

/// Which projections may have biases.
pub(super) struct Biases {
    pub(super) attention: bool,
    pub(super) mlp: bool,
}

/// A decoder of Llama's kind.
pub(super) fn decoder(fields: &Fields, sizes: &Sizes, biases: Biases) -> Result<Decoder> {
    let hidden = fields.size("hidden_size", 4096)?;
    let kv = fields.size_or_null("num_key_value_heads", sizes.kv)?;
    let dim = check_head_dim(fields.size_or_null("head_dim", hidden / sizes.query)?)?;
    let max_positions = fields.size("max_position_embeddings", sizes.max_positions)?;
    let norm = NormSpec::rms(fields.number("rms_norm_eps", 1e-6)?);
    let mut attention = Attention::causal(Heads { query: sizes.query, kv, dim });
    (attention.qkv_bias, attention.out_bias) = (biases.attention, biases.attention);
    let mlp = Mlp {
        width: fields.size("intermediate_size", sizes.ffn)?,
        activation: fields.activation("hidden_act", Activation::Silu)?,
        gated: true,
        bias: biases.mlp,
    };
    let layer = Layer { norm, wiring: Wiring::Sequential { post_norms: false }, attention, mlp };
    let rope = rope::rope(fields, dim, max_positions)?;
    Ok(Decoder {
        hidden,
        vocab: fields.size("vocab_size", 32_000)?,
        max_positions: rope.positions,
        eos: Vec::new(),
        embedding: Embedding { scale: 1.0, positions: None, norm: None },
        layers: vec![layer; fields.size("num_hidden_layers", 32)?.min(MAX_LAYERS + 1)],
        norm,
        head: Head::plain(fields.flag("tie_word_embeddings", false)?),
        ropes: vec![rope],
        residual_scale: 1.0,
        names: NAMES,
    })
}
