//! Names of a Llama's tensors: Hugging Face's, and those of GGUF files.

use crate::Config;

/// Modules outside of the layers: by their Hugging Face names, and by a GGUF file's.
const OUTER: [(&str, &str); 3] =
    [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];
/// Norms of a layer.
const NORMS: [(&str, &str); 2] = [("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")];
/// Projections of a layer, which may have biases.
const PROJECTIONS: [(&str, &str); 7] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// A GGUF file's name of a tensor.
pub(super) fn ggml_name(name: &str) -> Option<String> {
    let (module, kind) = name.rsplit_once('.')?;
    let ggml = |pairs: &[(&str, &'static str)], module: &str| {
        pairs.iter().find(|(known, _)| *known == module).map(|(_, ggml)| *ggml)
    };
    if let Some(ggml) = ggml(&OUTER, module) {
        return Some(format!("{ggml}.{kind}"));
    }
    let (layer, part) = module.strip_prefix("model.layers.")?.split_once('.')?;
    let part = ggml(&NORMS, part).or(ggml(&PROJECTIONS, part))?;
    Some(format!("blk.{layer}.{part}.{kind}"))
}

/// Whether a model of so many layers has a use for a tensor of this name in a GGUF file.
pub(super) fn is_ggml_name(name: &str, layers: usize) -> bool {
    let has = |pairs: &[(&str, &str)], part: &str| pairs.iter().any(|(_, ggml)| *ggml == part);
    let Some((module, kind)) = name.rsplit_once('.') else { return false };
    let in_layer = module.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let (norm_or_outer, projection) = match in_layer {
        None => (has(&OUTER, module), false),
        Some((layer, part)) => {
            let exists = layer.parse().is_ok_and(|i: usize| i < layers && i.to_string() == layer);
            (exists && has(&NORMS, part), exists && has(&PROJECTIONS, part))
        }
    };
    match kind {
        "weight" => norm_or_outer || projection,
        "bias" => projection,
        _ => false,
    }
}

/// Whether a model of this configuration takes a tensor of this name.
pub(super) fn is_taken(name: &str, config: &Config) -> bool {
    let Some(ggml) = ggml_name(name).filter(|ggml| is_ggml_name(ggml, config.layers)) else { return false };
    let has_bias = if ggml.contains(".attn_") { config.attention_bias } else { config.mlp_bias };
    !ggml.ends_with(".bias") || has_bias
}
