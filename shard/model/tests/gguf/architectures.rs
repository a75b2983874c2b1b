//! Keys of every architecture: read, neutral, or refused by their names. The files are the seeded models of
//! `integration-tests/fixtures/families`, each with one key more.

use std::{fs, path::Path};

use kernels::{DType, Span, cpu::CpuBackend};
use model::{Decoder, Model};

use crate::writer::Meta;

/// The alignment of a file's tensors: what is put in front of them must not move them within it.
const ALIGNMENT: usize = 32;
const PADDING: &str = "                                ";
/// Where metadata begins: behind the magic number, the version, and the counts of tensors and of pairs.
const METADATA: usize = 24;

/// The decoder of a fixture's file with one key more, or why it is refused.
fn with(fixture: &str, key: &str, value: &Meta) -> Result<Decoder, String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/families");
    let mut file = fs::read(folder.join(fixture).join("model.gguf")).unwrap();
    let mut more = Vec::new();
    value.pair(&mut more, key);
    let mut filled = more.clone();
    Meta::Str("").pair(&mut filled, "filler");
    let padding = filled.len().next_multiple_of(ALIGNMENT) - filled.len();
    Meta::Str(&PADDING[..padding]).pair(&mut more, "filler");
    let pairs = u64::from_le_bytes(file[16..METADATA].try_into().unwrap());
    file[16..METADATA].copy_from_slice(&(pairs + 2).to_le_bytes());
    file.splice(METADATA..METADATA, more);
    let written = tempfile::NamedTempFile::new().unwrap();
    fs::write(written.path(), file).unwrap();
    let ops = CpuBackend::new(DType::F32, 1).unwrap();
    let model = Model::load(&ops, written.path(), &mut |_| {}).map_err(|error| error.to_string())?;
    Ok(model.decoder().clone())
}

#[test]
fn keys_of_other_architectures_are_refused_by_name() {
    for (fixture, key, value) in [
        ("qwen2-full", "qwen2.attn_logit_softcapping", Meta::F32(50.0)),
        ("qwen2-full", "qwen2.attention.sliding_window", Meta::U32(64)),
        ("qwen2-full", "qwen2.rope.scaling.type", Meta::Str("longrope")),
        ("qwen2-full", "qwen2.rope.dimension_count", Meta::U32(8)),
        ("qwen3", "qwen3.attention.sliding_window_pattern", Meta::U32(4)),
        ("qwen3", "qwen3.expert_count", Meta::U32(8)),
        ("gemma", "gemma.final_logit_softcapping", Meta::F32(30.0)),
        ("gemma", "gemma.hidden_activation", Meta::Str("silu")),
        ("gemma2-usual", "gemma2.rope.freq_base_swa", Meta::F32(500.0)),
        ("gemma2-usual", "gemma2.rope.dimension_count", Meta::U32(16)),
        ("gemma2-usual", "gemma2.attention.scale", Meta::F32(0.5)),
        ("gemma2-usual", "gemma2.attention.sliding_window_pattern", Meta::U32(0)),
        ("gemma3-usual", "gemma3.attn_logit_softcapping", Meta::F32(50.0)),
        ("gemma3-usual", "gemma3.rope.freq_base_swa", Meta::F32(-1.0)),
        ("gemma3-usual", "gemma3.final_logit_softcapping", Meta::F32(f32::NAN)),
        ("phi4", "phi3.rope.freq_base_swa", Meta::F32(500.0)),
        ("phi4", "phi3.expert_count", Meta::U32(16)),
        ("phi4-mini", "phi3.rope.scaling.type", Meta::Str("longrope")),
        ("gpt2", "gpt2.rope.freq_base", Meta::F32(10_000.0)),
        ("gpt2", "gpt2.attention.max_alibi_bias", Meta::F32(8.0)),
        ("gpt2", "gpt2.hidden_activation", Meta::Str("silu")),
    ] {
        let refusal = with(fixture, key, &value).expect_err(&format!("{key} = {value:?}"));
        assert!(refusal.starts_with(key), "{key} = {value:?}: {refusal}");
    }
}

#[test]
fn neutral_keys_change_nothing() {
    let scale = 1.0 / 32_f32.sqrt();
    for (fixture, key, value) in [
        ("qwen2-full", "qwen2.attention.sliding_window", Meta::U32(0)),
        ("qwen3", "qwen3.attention.scale", Meta::F32(scale)),
        ("gemma", "gemma.hidden_activation", Meta::Str("gelu_pytorch_tanh")),
        ("gemma", "gemma.rope.freq_base", Meta::F32(10_000.0)),
        ("gemma2-usual", "gemma2.rope.freq_base_swa", Meta::F32(10_000.0)),
        ("gemma2-usual", "gemma2.rope.dimension_count", Meta::U32(32)),
        ("gemma2-usual", "gemma2.attention.sliding_window_pattern", Meta::U32(2)),
        ("gemma3-usual", "gemma3.rope.freq_base_swa", Meta::F32(10_000.0)),
        ("gemma3-usual", "gemma3.final_logit_softcapping", Meta::F32(0.0)),
        ("phi4-mini", "phi3.rope.scaling.type", Meta::Str("none")),
        ("gpt2", "gpt2.rope.dimension_count", Meta::U32(0)),
    ] {
        let plain = with(fixture, "general.comment", &Meta::Str("any")).unwrap();
        assert_eq!(with(fixture, key, &value).unwrap(), plain, "{key} = {value:?}");
    }
}

#[test]
fn keys_of_gemmas_are_read() {
    let windows = |decoder: &Decoder| {
        let spans = decoder.layers.iter().map(|layer| layer.attention.shape.span != Span::Causal);
        spans.collect::<Vec<_>>()
    };
    let pattern = "attention.sliding_window_pattern";
    let gemma2 = with("gemma2-usual", &format!("gemma2.{pattern}"), &Meta::U32(3)).unwrap();
    assert_eq!(windows(&gemma2), [true, true, false]);
    let gemma3 = with("gemma3-usual", &format!("gemma3.{pattern}"), &Meta::U32(3)).unwrap();
    assert_eq!(windows(&gemma3), [true, true, false, true, true, false, true]);
    let gemma3 = with("gemma3-usual", "gemma3.rope.freq_base_swa", &Meta::F32(1e8)).unwrap();
    let [full, windowed] = [0, 1].map(|rope| gemma3.ropes[rope].inv_freq[8]);
    assert!((full - 1e-3 / 8.0).abs() < 1e-9 && (windowed - 1e-4).abs() < 1e-10, "{full} {windowed}");
    let gemma3 = with("gemma3-usual", "gemma3.final_logit_softcapping", &Meta::F32(20.0)).unwrap();
    assert_eq!(gemma3.head.shape.softcap, Some(20.0));
}
