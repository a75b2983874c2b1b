//! The names of a decoder's parts: those of Hugging Face, which differ between families, and those of GGUF files, which
//! do not.

/// A part of a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Part {
    /// The embedding table.
    Embed,
    /// The table of learned positions.
    Positions,
    /// The table of learned types of tokens.
    TokenTypes,
    /// The norm of embeddings.
    EmbedNorm,
    /// The norm after the last layer.
    Norm,
    /// The output projection.
    Head,
    /// The projection in front of the classifier.
    Dense,
    /// The projection to classes.
    Classifier,
    /// The norm before attention, or before both branches.
    AttentionNorm,
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Queries, keys and values in one matrix.
    Qkv,
    /// The norm of queries.
    QNorm,
    /// The norm of keys.
    KNorm,
    /// Attention sinks.
    Sinks,
    /// The output of attention.
    Out,
    /// The norm of attention's result before it is added to the stream.
    AttentionPost,
    /// The norm before the feed-forward network. If layers norm their sums, it is that of the first sum.
    MlpNorm,
    /// The projection of a gated network that the activation is applied to.
    Gate,
    /// The projection that is gated or, without a gate, the one that the activation is applied to.
    Up,
    /// Gate and up in one matrix.
    GateUp,
    /// The projection back to the residual stream.
    Down,
    /// The norm of the feed-forward network's result before it is added to the stream.
    MlpPost,
    /// The norm of a layer's last sum, if layers norm their sums.
    OutputNorm,
}

/// The names of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Names {
    /// What the files are.
    pub(crate) stored: Stored,
    /// Whether the decoder is a part of a larger model, whose files name it by any [`Nesting`](super::Nesting).
    pub(crate) is_wrapped: bool,
    /// The module that holds everything but the output projection: in front of names, or left out by some files.
    pub(crate) base: &'static str,
    /// The list of layers.
    pub(crate) layers: &'static str,
    /// Modules outside of layers, by their whole paths.
    pub(crate) outer: &'static [(Part, &'static str)],
    /// Modules of a layer.
    pub(crate) inner: &'static [(Part, &'static str)],
    /// Modules without weights of their own, outside of layers and in a layer (the layer itself is the empty path):
    /// PEFT looks at them, too.
    pub(crate) others: (&'static [&'static str], &'static [&'static str]),
    /// What PEFT targets if a configuration does not tell.
    pub(crate) targets: &'static [&'static str],
    /// Modules that files may call by another name: theirs, and the one they are meant by.
    pub(crate) renamed: &'static [(&'static str, &'static str)],
    /// Weights of projections are stored `[in, out]`.
    pub(crate) transposed: bool,
    /// How the rows of a fused q, k, v matrix follow each other.
    pub(crate) qkv_order: QkvOrder,
    /// The field with what norms add below their root.
    pub(crate) eps: &'static str,
}

/// What the files of a model are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    /// A folder in Hugging Face layout.
    Folder,
    /// A GGUF file.
    Gguf {
        /// Whether the converter interleaved the halves of q and k heads.
        permuted: bool,
        /// Tensors of factors of rotary frequencies, which belong to no module.
        factors: &'static [&'static str],
    },
}

/// How the rows of a fused q, k, v matrix follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QkvOrder {
    /// All queries, all keys, all values.
    ByKind,
    /// Query, key and value of the first head, then of the next.
    ByHead,
}

/// Names of GGUF files (llama.cpp, `src/llama-arch.cpp`).
const GGML: [(Part, &str); 21] = [
    (Part::Embed, "token_embd"),
    (Part::Positions, "position_embd"),
    (Part::EmbedNorm, "token_embd_norm"),
    (Part::Norm, "output_norm"),
    (Part::Head, "output"),
    (Part::AttentionNorm, "attn_norm"),
    (Part::Q, "attn_q"),
    (Part::K, "attn_k"),
    (Part::V, "attn_v"),
    (Part::Qkv, "attn_qkv"),
    (Part::QNorm, "attn_q_norm"),
    (Part::KNorm, "attn_k_norm"),
    (Part::Sinks, "attn_sinks"),
    (Part::Out, "attn_output"),
    (Part::AttentionPost, "post_attention_norm"),
    (Part::MlpNorm, "ffn_norm"),
    (Part::Gate, "ffn_gate"),
    (Part::Up, "ffn_up"),
    (Part::GateUp, "ffn_up"),
    (Part::Down, "ffn_down"),
    (Part::MlpPost, "post_ffw_norm"),
];

impl Names {
    /// The path of a part, if this family has it; of a layer's part, that within the layer.
    pub(crate) fn find(&self, part: Part) -> Option<&'static str> {
        let named = self.outer.iter().chain(self.inner).find(|(named, _)| *named == part);
        named.map(|(_, path)| *path)
    }

    /// The path of a part of layer `layer`, or of one outside of the layers.
    pub(crate) fn path(&self, layer: Option<usize>, part: Part) -> String {
        let name = self.find(part).unwrap_or_default();
        match layer {
            Some(layer) => format!("{}.{layer}.{name}", self.layers),
            None => name.into(),
        }
    }

    /// A GGUF file's path of a part.
    pub(crate) fn ggml(layer: Option<usize>, part: Part) -> String {
        let name = GGML.iter().find(|(named, _)| *named == part).map_or("", |(_, name)| name);
        match layer {
            Some(layer) => format!("blk.{layer}.{name}"),
            None => name.into(),
        }
    }
}
