//! GGUF files as a converter writes them.

use std::{collections::BTreeMap, fs, path::Path};

use model::testing::Tensor;

/// Elements of a head of [`model::testing::model`].
pub(crate) const DIM: usize = 8;

/// A metadata value.
#[derive(Debug, Clone)]
pub(crate) enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Str(&'static str),
    Ints(Vec<i32>),
    Strs(Vec<&'static str>),
    /// No such key, though a file would usually have it.
    Absent,
}

impl Meta {
    /// A key with this value.
    pub(crate) fn pair(&self, to: &mut Vec<u8>, key: &str) {
        text(to, key);
        self.write(to);
    }

    /// Code of the type and the value, as they are in a file.
    fn write(&self, to: &mut Vec<u8>) {
        match self {
            Meta::U32(x) => to.extend([4, *x].map(u32::to_le_bytes).concat()),
            Meta::F32(x) => to.extend([6, x.to_bits()].map(u32::to_le_bytes).concat()),
            Meta::Bool(x) => to.extend([&7u32.to_le_bytes()[..], &[(*x).into()]].concat()),
            Meta::Str(x) => {
                to.extend(8u32.to_le_bytes());
                text(to, x);
            }
            Meta::Ints(items) => {
                to.extend([9u32, 5].map(u32::to_le_bytes).concat());
                to.extend((items.len() as u64).to_le_bytes());
                items.iter().for_each(|x| to.extend(x.to_le_bytes()));
            }
            Meta::Strs(items) => {
                to.extend([9u32, 8].map(u32::to_le_bytes).concat());
                to.extend((items.len() as u64).to_le_bytes());
                items.iter().for_each(|x| text(to, x));
            }
            Meta::Absent => {}
        }
    }
}

fn text(to: &mut Vec<u8>, text: &str) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}

/// The converter's order of the outputs of q and k: the halves of every head interleaved.
fn permute(tensor: &Tensor) -> Tensor {
    let width = tensor.data.len() / tensor.shape[0];
    let source = |row: usize| row / DIM * DIM + row % 2 * (DIM / 2) + row % DIM / 2;
    let rows = (0..tensor.shape[0]).flat_map(|row| &tensor.data[source(row) * width..][..width]);
    Tensor { shape: tensor.shape.clone(), data: rows.copied().collect() }
}

/// A tensor as the converter writes it.
pub(crate) fn converted(name: &str, tensor: &Tensor) -> (String, Tensor) {
    let mut ggml = name.replace("model.layers.", "blk.");
    for (part, renamed) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ] {
        ggml = ggml.replace(part, renamed);
    }
    let permuted = ggml.contains("attn_q") || ggml.contains("attn_k");
    (ggml, if permuted { permute(tensor) } else { tensor.clone() })
}

/// Writes a model of the sizes of [`model::testing::model`] with these tensors, which have the file's names, and with
/// metadata besides, or in place of, the usual.
pub(crate) fn write(path: &Path, tensors: &[(String, Tensor)], changes: &[(&str, Meta)]) {
    let usual = [
        ("general.architecture", Meta::Str("llama")),
        ("llama.embedding_length", Meta::U32(32)),
        ("llama.attention.head_count", Meta::U32(4)),
        ("llama.attention.head_count_kv", Meta::U32(2)),
        ("llama.attention.key_length", Meta::U32(DIM as u32)),
        ("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
        ("llama.block_count", Meta::U32(2)),
        ("llama.feed_forward_length", Meta::U32(48)),
        ("llama.context_length", Meta::U32(256)),
        ("tokenizer.ggml.eos_token_id", Meta::U32(2)),
    ];
    let mut metadata: BTreeMap<&str, Meta> = usual.into_iter().chain(changes.iter().cloned()).collect();
    metadata.retain(|_, value| !matches!(value, Meta::Absent));
    let mut file = [&b"GGUF"[..], &3u32.to_le_bytes(), &(tensors.len() as u64).to_le_bytes()].concat();
    file.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut file, key);
        value.write(&mut file);
    }
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        text(&mut file, name);
        file.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|d| file.extend((*d as u64).to_le_bytes()));
        file.extend(0u32.to_le_bytes());
        file.extend((data.len() as u64).to_le_bytes());
        data.extend(tensor.data.iter().flat_map(|x| x.to_le_bytes()));
        data.resize(data.len().next_multiple_of(32), 0);
    }
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    fs::write(path, file).unwrap();
}
