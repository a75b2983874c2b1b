//! The tokens that end a text, as llama.cpp gathers them.

use kernels::{DType, cpu::CpuBackend};
use model::{Model, testing};

use crate::{Meta, converted, write};

const CONTROL: i32 = 3;

/// The ends that a model with this metadata has.
fn ends(metadata: &[(&str, Meta)]) -> Vec<u32> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let tensors: Vec<_> =
        testing::model().tensors.iter().map(|(name, tensor)| converted(name, tensor)).collect();
    write(file.path(), &tensors, metadata);
    let ops = CpuBackend::new(DType::F32, 1).unwrap();
    let model = Model::load(&ops, file.path(), &mut |_| {}).unwrap();
    // However few tokens the file lists, each row of the table is one of the model's.
    assert_eq!(model.decoder().vocab, 96);
    model.decoder().eos.clone()
}

/// The ends of a model whose first tokens are these, of one type, and whose key names token 0.
fn ends_among(tokens: &[&'static str], kind: i32) -> Vec<u32> {
    let tokens: Vec<&str> = ["the key's"].into_iter().chain(tokens.iter().copied()).collect();
    ends(&[
        ("tokenizer.ggml.eos_token_id", Meta::U32(0)),
        ("tokenizer.ggml.token_type", Meta::Ints(vec![kind; tokens.len()])),
        ("tokenizer.ggml.tokens", Meta::Strs(tokens)),
    ])
}

#[test]
fn keys_name_ends() {
    for (key, ends_expected) in [
        ("tokenizer.ggml.eot_token_id", &[2, 7][..]),
        ("tokenizer.ggml.eom_token_id", &[2, 7]),
        ("tokenizer.ggml.fim_pad_token_id", &[2, 7]),
        ("tokenizer.ggml.fim_rep_token_id", &[2, 7]),
        ("tokenizer.ggml.fim_sep_token_id", &[2, 7]),
        ("tokenizer.ggml.eos_token_id", &[7]),
        ("tokenizer.ggml.bos_token_id", &[2]),
        ("tokenizer.ggml.padding_token_id", &[2]),
        ("tokenizer.ggml.fim_pre_token_id", &[2]),
    ] {
        assert_eq!(ends(&[(key, Meta::U32(7))]), ends_expected, "{key}");
    }
    assert_eq!(ends(&[("tokenizer.ggml.eot_token_id", Meta::U32(96))]), [2], "there is no such row");
}

#[test]
fn tokens_with_known_names_are_ends() {
    for name in [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
        "<|fim_pad|>",
        "<fim-pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<|file_sep|>",
    ] {
        assert_eq!(ends_among(&["a", name, "b"], CONTROL), [0, 2], "{name}");
    }
    for name in [
        "<|im_start|>",
        "<|eot|>",
        "<|EOT_ID|>",
        " </s>",
        "<s>",
        "<|fim_prefix|>",
        "<pad>",
        "<|start|>",
        "eos",
    ] {
        assert_eq!(ends_among(&["a", name, "b"], CONTROL), [0], "{name}");
    }
}

#[test]
fn all_names_count_at_once() {
    assert_eq!(ends_among(&["<|endoftext|>", "<|im_end|>", "x", "<|eot_id|>"], CONTROL), [0, 1, 2, 4]);
}

#[test]
fn types_of_tokens_have_no_say() {
    for kind in [1, 2, CONTROL, 4, 5, 6] {
        for name in ["</s>", "<|im_end|>", "<|eot_id|>", "<|file_sep|>"] {
            assert_eq!(ends_among(&[name], kind), [0, 1], "{name} of type {kind}");
        }
    }
    let untyped = [("tokenizer.ggml.tokens", Meta::Strs(vec!["a", "<|im_end|>"]))];
    assert_eq!(ends(&untyped), [1, 2]);
}

#[test]
fn a_key_for_files_takes_the_place_of_names() {
    let with = |key: &'static str, name: &'static str| {
        ends(&[
            (key, Meta::U32(9)),
            ("tokenizer.ggml.tokens", Meta::Strs(vec!["a", name])),
            ("tokenizer.ggml.token_type", Meta::Ints(vec![CONTROL; 2])),
        ])
    };
    assert_eq!(with("tokenizer.ggml.fim_pad_token_id", "<|fim_pad|>"), [2, 9]);
    assert_eq!(with("tokenizer.ggml.fim_sep_token_id", "<|fim_pad|>"), [1, 2, 9]);
}

#[test]
fn ends_of_messages_are_no_ends_of_turns() {
    assert_eq!(ends_among(&["<|return|>", "<|call|>", "<|end|>"], CONTROL), [0, 1, 2]);
    assert_eq!(ends_among(&["<|flush|>", "<|calls|>", "<|end|>"], CONTROL), [0, 1, 2]);
    assert_eq!(ends_among(&["<|return|>", "<|end|>"], CONTROL), [0, 1, 2]);
    assert_eq!(ends_among(&["<|call|>", "<|end|>"], CONTROL), [0, 1, 2]);
    assert_eq!(ends_among(&["<|tool_response>", "</s>"], CONTROL), [0, 1]);
}

#[test]
fn a_sentencepiece_model_without_the_key_ends_with_2() {
    let without = ("tokenizer.ggml.eos_token_id", Meta::Absent);
    assert_eq!(ends(&[without.clone(), ("tokenizer.ggml.model", Meta::Str("llama"))]), [2]);
    assert_eq!(ends(&[without.clone(), ("tokenizer.ggml.model", Meta::Str("gpt2"))]), [0u32; 0]);
    let metadata = [
        without,
        ("tokenizer.ggml.model", Meta::Str("llama")),
        ("tokenizer.ggml.eot_token_id", Meta::U32(5)),
    ];
    assert_eq!(ends(&metadata), [2, 5]);
}
