//! The longest sequence of a model whose rotary embedding is scaled.

use serde_json::{Value, json};

use crate::read;

/// Qwen's published recipe for long texts: <https://huggingface.co/Qwen/Qwen2.5-7B-Instruct#processing-long-texts>.
fn qwen(max_positions: usize, scaling: Value) -> Value {
    json!({"model_type": "qwen2", "max_position_embeddings": max_positions, "rope_scaling": scaling})
}

fn llama(max_positions: usize, scaling: Value) -> Value {
    json!({"model_type": "llama", "max_position_embeddings": max_positions, "rope_scaling": scaling})
}

fn yarn(factor: f64, original: usize) -> Value {
    json!({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original})
}

/// What scales by a factor from the original context reaches as far as the factor says, as in vLLM
/// (`_get_and_verify_max_len` in `config/model.py`), and never less far than `max_position_embeddings`.
#[test]
fn scalings_reach_as_far_as_their_factor_says() {
    let llama3 = |factor: f64| {
        json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        })
    };
    let lists = json!({
        "rope_type": "longrope", "factor": 32.0, "original_max_position_embeddings": 4096,
        "short_factor": vec![1.0; 64], "long_factor": vec![2.0; 64],
    });
    for (config, longest) in [
        (qwen(32_768, yarn(4.0, 32_768)), 131_072),
        (qwen(40_960, yarn(4.0, 32_768)), 131_072),
        (qwen(131_072, yarn(4.0, 32_768)), 131_072),
        (qwen(32_768, json!({"type": "yarn", "factor": 4.0})), 131_072),
        (qwen(40_960, yarn(1.2, 32_768)), 40_960),
        (qwen(32_768, yarn(2.5, 32_768)), 81_920),
        (qwen(131_072, json!({"type": "yarn", "original_max_position_embeddings": 4096})), 131_072),
        (
            json!({
                "model_type": "qwen3", "max_position_embeddings": 40_960, "head_dim": 128,
                "rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0,
                    "original_max_position_embeddings": 32_768},
            }),
            131_072,
        ),
        (llama(4096, json!({"type": "linear", "factor": 8.0})), 32_768),
        (
            llama(16_384, json!({"type": "linear", "factor": 4.0, "original_max_position_embeddings": 4096})),
            16_384,
        ),
        (llama(4096, json!({"type": "linear", "factor": 0.5})), 4096),
        (llama(4096, json!({"type": "linear", "factor": 1e30})), 1 << 22),
        (llama(4096, json!({"type": "dynamic", "factor": 4.0})), 16_384),
        (llama(4096, json!({"type": "dynamic", "factor": 0.5})), 4096),
        // These say how far they reach in `max_position_embeddings`, whatever their factor is.
        (llama(131_072, llama3(8.0)), 131_072),
        (llama(131_072, llama3(32.0)), 131_072),
        (llama(131_072, lists), 131_072),
        (llama(4096, json!({"rope_type": "default"})), 4096),
        (
            json!({
                "model_type": "gemma3_text", "max_position_embeddings": 131_072,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            }),
            131_072,
        ),
    ] {
        let decoder = read(&config).unwrap();
        assert_eq!(decoder.max_positions, longest, "{config}");
        assert!(decoder.ropes.iter().all(|rope| rope.positions == longest), "{config}");
    }
}
