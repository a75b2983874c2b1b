//! The architectures of GGUF files, each with what it has besides a Llama's layers. Norms of Gemma are stored with 1 added.

use kernels::{Activation, NormKind, NormSpan, Pairs, Span};

use super::{Architecture, Metadata, refused, rope};
use crate::{
    Decoder, Result,
    decoder::{Positions, Wiring},
    families::{gemma2, gpt2, llama, phi3},
};

const LLAMA: Architecture = Architecture {
    name: "llama",
    names: llama::NAMES,
    norm: NormKind::Rms,
    activation: Activation::Silu,
    gated: true,
    rotates: true,
    permuted: true,
    factors: &[rope::FACTORS],
    keys: &[],
    page: |_, _| Ok(()),
};

const QWEN2: Architecture = Architecture { name: "qwen2", permuted: false, factors: &[], ..LLAMA };

const GEMMA: Architecture =
    Architecture { name: "gemma", activation: Activation::GeluTanh, page: scale_embeddings, ..QWEN2 };

/// All architectures.
pub(super) const ARCHITECTURES: [Architecture; 8] = [
    LLAMA,
    QWEN2,
    Architecture { name: "qwen3", page: norm_heads, ..QWEN2 },
    GEMMA,
    Architecture {
        name: "gemma2",
        names: gemma2::NAMES,
        keys: &[
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        ],
        page: gemma2,
        ..GEMMA
    },
    Architecture {
        name: "gemma3",
        names: gemma2::NAMES,
        keys: &[
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "final_logit_softcapping",
            "rope.freq_base_swa",
        ],
        page: gemma3,
        ..GEMMA
    },
    Architecture {
        name: "phi3",
        names: phi3::NAMES,
        factors: &rope::LONG_FACTORS,
        keys: &["attention.sliding_window", "rope.dimension_count"],
        page: phi3,
        ..QWEN2
    },
    Architecture {
        name: "gpt2",
        names: gpt2::NAMES,
        norm: NormKind::Layer,
        activation: Activation::GeluTanh,
        gated: false,
        rotates: false,
        page: gpt2,
        ..QWEN2
    },
];

fn scale_embeddings(_: &Metadata<'_>, decoder: &mut Decoder) -> Result<()> {
    decoder.embedding.scale = (decoder.hidden as f32).sqrt();
    Ok(())
}

fn norm_heads(_: &Metadata<'_>, decoder: &mut Decoder) -> Result<()> {
    let norms = Some((decoder.norm, NormSpan::Head));
    decoder.layers.iter_mut().for_each(|layer| layer.attention.norms = norms);
    Ok(())
}

/// Gemma 2 and 3: norms behind both branches, and windows in all layers but every `period`-th. The scale of scores follows
/// from the size of heads, but for the largest model, which is known by its number of layers.
fn gemma_layers(of: &Metadata<'_>, decoder: &mut Decoder, (largest, period): (usize, u32)) -> Result<()> {
    scale_embeddings(of, decoder)?;
    let key = "attention.sliding_window_pattern";
    let period = of.optional::<u32>(key)?.unwrap_or(period) as usize;
    if period == 0 {
        return Err(refused(of, key, period, "positive integers"));
    }
    let window = of.optional::<u32>("attention.sliding_window")?.unwrap_or(4096);
    let (hidden, is_largest) = (decoder.hidden, decoder.layers.len() == largest);
    for (i, layer) in decoder.layers.iter_mut().enumerate() {
        layer.wiring = Wiring::Sequential { post_norms: true };
        let shape = &mut layer.attention.shape;
        if is_largest {
            shape.scale = ((hidden / shape.heads.query) as f32).sqrt().recip();
        }
        if window > 0 && (i + 1) % period != 0 {
            shape.span = Span::Window(window);
        }
    }
    Ok(())
}

fn gemma2(of: &Metadata<'_>, decoder: &mut Decoder) -> Result<()> {
    gemma_layers(of, decoder, (46, 2))?;
    let softcap = Some(of.positive("attn_logit_softcapping", 50.0)?);
    decoder.layers.iter_mut().for_each(|layer| layer.attention.shape.softcap = softcap);
    decoder.head.shape.softcap = Some(of.positive("final_logit_softcapping", 30.0)?);
    Ok(())
}

fn gemma3(of: &Metadata<'_>, decoder: &mut Decoder) -> Result<()> {
    gemma_layers(of, decoder, (62, 6))?;
    norm_heads(of, decoder)?;
    let softcap = of.optional::<f32>("final_logit_softcapping")?.filter(|cap| *cap != 0.0);
    decoder.head.shape.softcap = softcap.map(|_| of.positive("final_logit_softcapping", 30.0)).transpose()?;
    let kind = of.optional::<&str>("rope.scaling.type")?.unwrap_or("linear");
    if !["none", "linear"].contains(&kind) {
        return Err(refused(of, "rope.scaling.type", kind, "none, linear"));
    }
    // `context_length` of a Gemma 3 counts positions after scaling.
    let context = of.size("context_length")?;
    decoder.max_positions = context;
    decoder.ropes.iter_mut().for_each(|rope| rope.positions = context);
    decoder.ropes.push(rope::unscaled(of, decoder.heads().dim, context)?);
    for layer in &mut decoder.layers {
        let rope = usize::from(layer.attention.shape.span != Span::Causal);
        layer.attention.rope = Some((rope, Pairs::Halves));
    }
    Ok(())
}

/// llama.cpp passes over a Phi 3's window, and says that this is wrong: the model was trained with it.
fn phi3(of: &Metadata<'_>, decoder: &mut Decoder) -> Result<()> {
    if let Some(window) = of.optional::<u32>("attention.sliding_window")?.filter(|window| *window > 0) {
        decoder.layers.iter_mut().for_each(|layer| layer.attention.shape.span = Span::Window(window));
    }
    Ok(())
}

fn gpt2(_: &Metadata<'_>, decoder: &mut Decoder) -> Result<()> {
    decoder.embedding.positions = Some(Positions { rows: decoder.max_positions, first: 0 });
    Ok(())
}
