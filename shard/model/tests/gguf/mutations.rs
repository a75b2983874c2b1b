//! Headers with a few numbers changed: whatever a file says, it is refused or read at once, and in little memory.

use std::{
    fs,
    time::{Duration, Instant},
};

use kernels::{DType, cpu::CpuBackend};
use model::{Model, testing};
use proptest::{
    prelude::{any, prop_oneof},
    strategy::{Just, Strategy, ValueTree},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use crate::{Meta, converted, gguf_logits_with, write};

/// Headers that are tried.
const MUTATIONS: u32 = 4000;
/// Time for one of them in a debug build on a busy machine; most take less than a millisecond.
const AT_ONCE: Duration = Duration::from_secs(2);

/// A whole file with keys of every type of value, and where its data begin.
fn file() -> (Vec<u8>, usize) {
    let path = tempfile::NamedTempFile::new().unwrap();
    let tensors: Vec<_> =
        testing::model().tensors.iter().map(|(name, tensor)| converted(name, tensor)).collect();
    let metadata = [
        ("llama.rope.scaling.type", Meta::Str("yarn")),
        ("llama.rope.scaling.factor", Meta::F32(4.0)),
        ("llama.rope.scaling.original_context_length", Meta::U32(64)),
        ("llama.attention.causal", Meta::Bool(true)),
        ("tokenizer.ggml.tokens", Meta::Strs(vec!["a", "</s>", "<|im_end|>"])),
        ("tokenizer.ggml.token_type", Meta::Ints(vec![1, 3, 3])),
    ];
    write(path.path(), &tensors, &metadata);
    let data: usize = tensors.iter().map(|(_, tensor)| (4 * tensor.data.len()).next_multiple_of(32)).sum();
    let bytes = fs::read(path.path()).unwrap();
    let header = bytes.len() - data;
    (bytes, header)
}

/// Bytes to write over a number: all lengths that the format has, mostly with the values at its edges.
fn number() -> impl Strategy<Value = Vec<u8>> {
    let edges =
        [0, 1, 2, 31, 255, 1 << 16, (1 << 31) - 2, 1 << 31, u32::MAX.into(), 1 << 40, 1 << 62, u64::MAX];
    let value = prop_oneof![proptest::sample::select(edges.to_vec()), any::<u64>(), 0u64..1 << 32];
    (value, prop_oneof![Just(1usize), Just(4), Just(8)])
        .prop_map(|(value, size)| value.to_le_bytes()[..size].to_vec())
}

#[test]
fn a_header_with_numbers_changed_is_refused_or_read_at_once() {
    let (whole, header) = file();
    let ops = CpuBackend::new(DType::F32, 1).unwrap();
    let path = tempfile::NamedTempFile::new().unwrap();
    let mut runner =
        TestRunner::new_with_rng(Config::default(), TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let changes = proptest::collection::vec((4..header - 8, number()), 1..3);
    let mut read = 0;
    for _ in 0..MUTATIONS {
        let changes = changes.new_tree(&mut runner).unwrap().current();
        let mut bytes = whole.clone();
        for (at, number) in &changes {
            bytes[*at..][..number.len()].copy_from_slice(number);
        }
        fs::write(path.path(), bytes).unwrap();
        let start = Instant::now();
        let loaded = Model::load(&ops, path.path(), &mut |_| {}).map(drop);
        let took = start.elapsed();
        assert!(took < AT_ONCE, "{changes:?} took {took:?}: {:?}", loaded.err());
        read += u32::from(loaded.is_ok());
    }
    assert!((1..MUTATIONS / 2).contains(&read), "{read} of {MUTATIONS} were read");
}

/// Tables are made of some sizes before the tensors are there to contradict.
#[test]
fn sizes_that_no_model_has_are_refused() {
    let refusal = |metadata: &[(&str, Meta)]| gguf_logits_with(&testing::model(), &[], metadata).unwrap_err();
    for dim in [4098, 1 << 20, 1 << 31, u32::MAX - 1] {
        let refused = refusal(&[("llama.attention.key_length", Meta::U32(dim))]);
        assert_eq!(refused, "head_dim is missing or not a positive even integer up to 4096", "{dim}");
        let metadata =
            [("llama.attention.key_length", Meta::Absent), ("llama.embedding_length", Meta::U32(dim))];
        // A fourth of it for each head.
        assert_eq!(refusal(&metadata).starts_with("head_dim"), dim > 4 * 4096, "{dim}");
    }
}
