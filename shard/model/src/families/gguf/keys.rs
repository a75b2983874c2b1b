//! Every metadata key of a GGUF file, and what is made of it. The keys are those of llama.cpp (`LLM_KV_NAMES` in
//! `src/llama-arch.cpp`). One that would change the output is read, or refused unless its value is the neutral one.

use gguf::{Gguf, Value};
use kernels::Activation;

use super::Metadata;
use crate::{Decoder, LoadError, Result};

/// Refuses a file that is no whole model, or asks for something that is not computed whatever the architecture is.
pub(super) fn check_file(file: &Gguf) -> Result<()> {
    check(file, |key, value| match key.split_once('.') {
        Some(("general", key)) => of_file(key, value),
        // Part of a model whose other parts are in other files.
        Some(("split", "count")) => number(value).is_some_and(|count| count <= 1.0),
        // Not a model, but something to apply to one.
        Some(("adapter" | "controlvector", _)) => false,
        // Tokens that are never to be generated. All other keys of a tokenizer tell how texts become tokens.
        Some(("tokenizer", "ggml.suppress_tokens")) => is_off(value),
        _ => true,
    })
}

/// Refuses what the file asks of its architecture and is not computed.
pub(super) fn check_architecture(of: &Metadata<'_>, decoder: &Decoder) -> Result<()> {
    let prefix = of.key("");
    let theta = of.optional::<f32>("rope.freq_base")?.unwrap_or(10_000.0);
    check(of.file, |key, value| match key.strip_prefix(&prefix) {
        Some(key) if of.architecture.keys.contains(&key) => true,
        // The base of layers that have a window. A file that gives one means it, unless it is that of all layers.
        Some("rope.freq_base_swa") => number(value) == Some(theta.into()),
        Some(key) => of_architecture(key, value, decoder),
        None => true,
    })
}

fn check(file: &Gguf, is_neutral: impl Fn(&str, &Value) -> bool) -> Result<()> {
    let refused = file.metadata().filter(|(key, value)| !is_neutral(key, value));
    // Of several faults, the same one is reported every time.
    match refused.min_by_key(|(key, _)| *key) {
        None => Ok(()),
        Some((key, value)) => {
            Err(LoadError::Unsupported { field: key.into(), value: value.to_string(), known: String::new() })
        }
    }
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Int(x) => Some(*x as f64),
        Value::Float(x) => Some(*x),
        _ => None,
    }
}

/// Whether a value is that of a feature that a model does not have: llama.cpp's own default for nearly all of them.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Int(x) => *x == 0,
        Value::Float(x) => *x == 0.0,
        Value::Bool(x) => !x,
        Value::Str(x) => x.is_empty(),
        Value::Ints(x) => x.iter().all(|x| *x == 0),
        Value::Floats(x) => x.iter().all(|x| *x == 0.0),
        Value::Bools(x) => !x.contains(&true),
        Value::Strs(x) => x.is_empty(),
    }
}

/// Keys of the namespace `general`.
fn of_file(key: &str, value: &Value) -> bool {
    match key {
        // Other types are adapters, projectors, importance matrices.
        "type" => matches!(value, Value::Str(kind) if kind == "model"),
        // Blocks of quantized types had another layout before this version.
        "quantization_version" => number(value) == Some(2.0),
        // Per-tensor precisions of activations.
        "tensor_extra.name" | "tensor_extra.prec_a4" => is_off(value),
        // Names, licences, sources, and the defaults of llama.cpp's own sampler: requests to us say how to sample.
        _ => true,
    }
}

/// Keys of the architecture's namespace.
fn of_architecture(key: &str, value: &Value, decoder: &Decoder) -> bool {
    let is = |expected: f64| number(value).is_some_and(|x| (x - expected).abs() <= 1e-6 * expected.abs());
    let dim = decoder.heads().dim as f64;
    let scale = decoder.layers[0].attention.shape.scale;
    let activation = match decoder.layers[0].mlp.activation {
        Activation::Silu => "silu",
        _ => "gelu_pytorch_tanh",
    };
    match key {
        // Rotary embeddings of a decoder that has none.
        rope if rope.starts_with("rope.") && decoder.ropes.is_empty() => is_off(value),

        // Read where the configuration is.
        "context_length"
        | "embedding_length"
        | "block_count"
        | "feed_forward_length"
        | "attention.head_count"
        | "attention.head_count_kv"
        | "attention.key_length"
        | "rope.freq_base"
        | "rope.scale_linear"
        | "rope.scaling.type"
        | "rope.scaling.factor"
        | "rope.scaling.attn_factor"
        | "rope.scaling.original_context_length" => true,
        // Tells what was done to the model, not what to compute.
        "rope.scaling.finetuned" => true,
        // The embedding table has as many rows as it has.
        "vocab_size" => true,
        // Read, or of the other kind of norm, which this architecture does not have.
        "attention.layer_norm_rms_epsilon" | "attention.layer_norm_epsilon" => true,
        // Sizes that must be the ones computed with.
        "attention.value_length" | "rope.dimension_count" => is(dim),
        "embedding_length_out" => is_off(value) || is(decoder.hidden as f64),
        // Llama's own order of the rows of q and k; the converter's, too.
        "tensor_data_layout" => matches!(value, Value::Str(layout) if layout == "Meta AI original pth"),
        "attention.causal" => matches!(value, Value::Bool(true)),
        "attention.scale" => is_off(value) || is(scale.into()),
        // Factors: 0 is "not set".
        "logit_scale"
        | "residual_scale"
        | "embedding_scale"
        | "attention.output_scale"
        | "attention.value_scale"
        | "expert_weights_scale" => is_off(value) || is(1.0),
        "hidden_activation" => matches!(value, Value::Str(name) if name == activation),
        // A window that covers every sequence is none.
        "attention.sliding_window" => {
            is_off(value) || number(value).is_some_and(|window| window >= decoder.max_positions as f64)
        }
        // YaRN's constants, which llama.cpp does not read for a Llama: they must be the ones that it takes instead.
        "rope.scaling.yarn_beta_fast" => is(32.0),
        "rope.scaling.yarn_beta_slow" | "rope.scaling.yarn_ext_factor" | "rope.scaling.yarn_attn_factor" => {
            is(1.0)
        }
        // Anything else belongs to other architectures, or is newer than this list.
        _ => is_off(value),
    }
}
