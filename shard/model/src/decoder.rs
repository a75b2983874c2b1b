//! The description of a decoder as data, with a field for every feature in which families differ. The page of a family
//! fills it in, and everything else reads it. An encoder is described by the same fields: its layers attend to both sides.

mod modules;
mod names;
mod nesting;
mod share;
mod task;

use kernels::{
    Activation, AttentionShape, Heads, LogitShape, LoraSite, NormKind, NormSpan, Pairs, RopeSpec, Span,
};

use crate::{LoadError, Result};
pub use modules::{Kind, Module, RowOrder};
pub(crate) use modules::{LAYER_SITES, Modules};
pub(crate) use names::{Names, Part, QkvOrder, Stored};
pub(crate) use nesting::{Nesting, is_beside};
pub(crate) use share::Run;
pub use share::Share;
pub use task::{Classes, Classifier, Scores, Task};

/// The largest number of layers that is accepted.
pub(crate) const MAX_LAYERS: usize = 1 << 10;
/// The largest number of positions that is accepted: the longest context that a Llama was trained for.
pub(crate) const MAX_POSITIONS: usize = 1 << 22;

/// The number of tokens beyond those of the model that an adapter may have rows for.
pub const ADDED_TOKENS: usize = 256;

/// The largest head size that is accepted.
const MAX_HEAD_DIM: usize = 1 << 12;

/// Refuses a head size that no model has. It is the size of the table of rotary frequencies, which is computed before
/// any weight can contradict it.
pub(crate) fn check_head_dim(dim: usize) -> Result<usize> {
    let expected = "a positive even integer up to 4096";
    if dim > 0 && dim <= MAX_HEAD_DIM && dim.is_multiple_of(2) {
        Ok(dim)
    } else {
        Err(LoadError::Field { field: "head_dim", expected })
    }
}

/// A stack of layers: a decoder-only language model, or an encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoder {
    /// Width of the residual stream.
    pub hidden: usize,
    /// The number of rows of the embedding table. A tokenizer may have fewer tokens, where the table was padded, or
    /// more. [`Model::load`](crate::Model::load) refuses a table of another size.
    pub vocab: usize,
    /// Longest sequence.
    pub max_positions: usize,
    /// Tokens that end a sequence, sorted, all below `vocab`.
    pub eos: Vec<u32>,
    /// How tokens are embedded.
    pub embedding: Embedding,
    /// The layers, of equal sizes.
    pub layers: Vec<Layer>,
    /// The norm of the residual stream after the last layer. Layers that norm their sums have none behind them.
    pub norm: NormSpec,
    /// What is computed from the last hidden states.
    pub task: Task,
    /// The output projection, if tokens are generated.
    pub head: Head,
    /// The rotary embeddings, which layers refer to by index.
    pub ropes: Vec<RopeSpec>,
    /// Factor of everything that is added to the residual stream.
    pub residual_scale: f32,
    /// The names of the parts, and how files store them.
    pub(crate) names: Names,
}

/// How tokens are embedded.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding {
    /// Factor of the table's rows.
    pub scale: f32,
    /// Learned positions, which are added to the scaled rows.
    pub positions: Option<Positions>,
    /// The number of learned types of tokens. A vector for each is added to the rows; all tokens are of the first type.
    pub token_types: Option<usize>,
    /// The norm that is applied to the sum.
    pub norm: Option<NormSpec>,
}

/// A table of learned positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Positions {
    /// Rows of the table.
    pub rows: usize,
    /// The row of position 0.
    pub first: usize,
}

/// A norm without its weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    /// The formula.
    pub kind: NormKind,
    /// Epsilon, which is added under the root.
    pub eps: f32,
    /// Whether there is a bias.
    pub bias: bool,
    /// Whether files store w - 1, so that the loader adds 1.
    pub plus_one: bool,
}

impl NormSpec {
    /// An RMS norm whose weight is stored as it is.
    pub fn rms(eps: f32) -> NormSpec {
        NormSpec { kind: NormKind::Rms, eps, bias: false, plus_one: false }
    }

    /// A layer norm with a bias.
    pub fn layer(eps: f32) -> NormSpec {
        NormSpec { kind: NormKind::Layer, eps, bias: true, plus_one: false }
    }
}

/// One layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// The kind of its norms. `wiring` says which there are.
    pub norm: NormSpec,
    /// How its branches are connected to the residual stream.
    pub wiring: Wiring,
    /// Attention.
    pub attention: Attention,
    /// The feed-forward network.
    pub mlp: Mlp,
}

/// How the two branches of a layer, attention and the feed-forward network, are connected to the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wiring {
    /// The branches follow each other. Each reads the normed stream, and adds to it.
    Sequential {
        /// Whether the result of a branch is normed before it is added.
        post_norms: bool,
    },
    /// A parallel residual: both branches read the stream as it is before the layer.
    Parallel {
        /// Whether both branches have the same norm.
        shared_norm: bool,
    },
    /// The branches follow each other. Each reads the stream and adds to it, and the sum is normed: the norm replaces the
    /// stream (post-LN; Vaswani et al., 2017). The norm of embeddings comes before the first layer.
    PostNorm,
}

/// Attention of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// Heads, scale, span and softcap.
    pub shape: AttentionShape,
    /// The rotary embedding of queries and keys: an index into [`Decoder::ropes`], and how elements are paired.
    pub rope: Option<(usize, Pairs)>,
    /// The norm of queries and keys.
    pub norms: Option<(NormSpec, NormSpan)>,
    /// Whether the projections of queries, keys and values may have biases.
    pub qkv_bias: bool,
    /// Whether the projection of attention's output may have a bias.
    pub out_bias: bool,
    /// Queries, keys and values are clamped to ± this value.
    pub clamp: Option<f32>,
    /// Whether there are learned attention sinks.
    pub sinks: bool,
    /// The slope of every query head, with ALiBi.
    pub slopes: Option<Vec<f32>>,
}

impl Attention {
    /// Causal attention with the first rotary embedding, and with no other feature.
    pub fn causal(heads: Heads) -> Attention {
        Attention {
            shape: AttentionShape::causal(heads),
            rope: Some((0, Pairs::Halves)),
            norms: None,
            qkv_bias: false,
            out_bias: false,
            clamp: None,
            sinks: false,
            slopes: None,
        }
    }
}

/// The feed-forward network of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mlp {
    /// Its width.
    pub width: usize,
    /// Its activation.
    pub activation: Activation,
    /// Whether it is gated: the activation of one projection is multiplied with another projection.
    pub gated: bool,
    /// Whether its projections may have biases.
    pub bias: bool,
}

/// The output projection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Head {
    /// Whether it is the embedding table.
    pub tied: bool,
    /// Whether it has a bias.
    pub bias: bool,
    /// How its products are scaled and capped.
    pub shape: LogitShape,
}

impl Head {
    /// An output projection without a bias, whose products are the logits.
    pub fn plain(tied: bool) -> Head {
        Head { tied, bias: false, shape: LogitShape::PLAIN }
    }
}

impl Decoder {
    /// The number of columns of the logits: tokens, including those that only adapters have, or classes.
    pub fn logit_columns(&self) -> usize {
        match &self.task {
            Task::Generate => self.vocab + ADDED_TOKENS,
            Task::Embed => 0,
            Task::Classify(classifier) => classifier.labels.len(),
        }
    }

    /// Whether rows attend to rows behind them, so that all rows of a sequence must be in one step.
    pub fn is_bidirectional(&self) -> bool {
        self.layers.iter().any(|layer| layer.attention.shape.span == Span::Bidirectional)
    }

    /// The sites of what is computed from the last hidden states, which follow those of the layers: the output projection,
    /// or the classifier and the projection in front of it.
    pub(crate) fn output_site(&self) -> usize {
        self.layers.len() * LAYER_SITES
    }

    /// The site of the embedding table, which is the last one.
    pub(crate) fn table_site(&self) -> usize {
        self.output_site()
            + match &self.task {
                Task::Generate => 1,
                Task::Embed => 0,
                Task::Classify(classifier) => 1 + usize::from(classifier.dense.is_some()),
            }
    }

    /// The heads, which are the same in all layers.
    pub fn heads(&self) -> Heads {
        self.layers[0].attention.shape.heads
    }

    /// The distinct attention spans of all layers.
    pub fn spans(&self) -> Vec<Span> {
        let mut spans: Vec<Span> = Vec::new();
        for layer in &self.layers {
            if !spans.contains(&layer.attention.shape.span) {
                spans.push(layer.attention.shape.span);
            }
        }
        spans
    }

    /// The largest window of all layers: keys and values before the last so many positions are never read again. `None`
    /// if some layer has no window.
    pub fn lookback(&self) -> Option<u32> {
        let windows = self.layers.iter().map(|layer| match layer.attention.shape.span {
            Span::Window(window) => Some(window),
            Span::Causal | Span::Bidirectional => None,
        });
        windows.collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    /// The sites at which adapters can attach. Each layer has four, for q k v, o, and both halves of the feed-forward
    /// network. The output projection or the classifier, and the embedding table, follow.
    pub fn sites(&self) -> Vec<LoraSite> {
        Modules::of(self).sites(self, Share::WHOLE)
    }

    /// Lowers the longest sequence to `longest`, unless it is shorter anyway.
    pub(crate) fn serve_up_to(&mut self, longest: usize) {
        self.max_positions = self.max_positions.min(longest);
        self.ropes.iter_mut().for_each(|rope| rope.positions = rope.positions.min(longest));
    }

    /// Refuses sizes that contradict each other, and removes end tokens that the model has no row for.
    pub(crate) fn check(mut self) -> Result<Decoder> {
        let inconsistent = |what, got, expected| Err(LoadError::Inconsistent { what, got, expected });
        let field = |field, expected| Err(LoadError::Field { field, expected });
        // Memory is allocated by these numbers before any weight can contradict them.
        if self.layers.len() > MAX_LAYERS {
            return field("num_hidden_layers", "a positive integer up to 1024");
        }
        if self.max_positions > MAX_POSITIONS {
            return field("max_position_embeddings", "a positive integer up to 4194304");
        }
        let Some(first) = self.layers.first() else { return inconsistent("num_hidden_layers", 0, 1) };
        let Heads { query, kv, .. } = first.attention.shape.heads;
        if kv == 0 || !query.is_multiple_of(kv) {
            return inconsistent("num_attention_heads, a multiple of num_key_value_heads", query, kv);
        }
        if self.vocab == 0 || first.mlp.width == 0 || self.max_positions == 0 || self.hidden == 0 {
            return inconsistent("a size of the model", 0, 1);
        }
        let norms = self.layers.iter().map(|layer| layer.norm).chain([self.norm]);
        if norms.into_iter().any(|norm| !norm.eps.is_finite()) {
            return field(self.names.eps, "a finite number");
        }
        for rope in &self.ropes {
            let numbers = rope.inv_freq.iter().chain([&rope.scale]);
            if !numbers.into_iter().all(|x| x.is_finite() && *x >= 0.0) {
                return field("rope_parameters", "parameters that give finite rotary frequencies");
            }
        }
        self.eos.retain(|id| (*id as usize) < self.vocab);
        self.eos.sort_unstable();
        self.eos.dedup();
        Ok(self)
    }
}
