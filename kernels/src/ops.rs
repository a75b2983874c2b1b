//! What the operations of a [`Backend`](crate::Backend) are told besides their matrices: the features in which
//! architectures differ, as data.

use crate::{Adapters, Memory, RowSet};

/// Attention heads of this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads; a multiple of `kv`.
    pub query: usize,
    /// Key and value heads.
    pub kv: usize,
    /// Elements of one head.
    pub dim: usize,
}

impl Heads {
    /// Columns of a fused q, k, v projection: `(query + 2 · kv) · dim`.
    pub fn qkv_cols(self) -> usize {
        (self.query + 2 * self.kv) * self.dim
    }
}

/// Which mean a norm takes out of a row, and which one it divides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `w · x / √(mean(x²) + eps) + b` (Zhang and Sennrich, 2019).
    Rms,
    /// `w · (x - mean(x)) / √(var(x) + eps) + b` (Ba et al., 2016).
    Layer,
}

/// A norm of rows. Models that store `w - 1` have 1 added when they are loaded.
pub struct Norm<'a, B: Memory> {
    /// The formula.
    pub kind: NormKind,
    /// w, one element for each column.
    pub weight: &'a B::Vector,
    /// b, one element for each column.
    pub bias: Option<&'a B::Vector>,
    /// Added below the root.
    pub eps: f32,
}

/// A function of one element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x / (1 + e⁻ˣ)` (Elfwing et al., 2018).
    Silu,
    /// `x · Φ(x)` with the normal distribution's Φ (Hendrycks and Gimpel, 2016).
    Gelu,
    /// The approximation `x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))` of the same paper.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// What rows are multiplied with: W, and what is added to the products.
pub struct Projection<'a, B: Adapters> {
    /// W.
    pub weight: &'a B::Weight,
    /// Added to every row, one element for each output.
    pub bias: Option<&'a B::Vector>,
    /// Of the rows that have an adapter.
    pub lora: Option<LinearLora<'a, B>>,
}

impl<'a, B: Adapters> Projection<'a, B> {
    /// One without a bias.
    pub fn new(weight: &'a B::Weight, lora: Option<LinearLora<'a, B>>) -> Projection<'a, B> {
        Projection { weight, bias: None, lora }
    }
}

/// The deltas of one [`Projection`]: the resident adapters, the site, and the rows that `x` holds.
pub struct LinearLora<'a, B: Adapters> {
    /// All resident adapters.
    pub slots: &'a B::LoraSlots,
    /// Index of the site among those that the slots were made for.
    pub site: usize,
    /// The step.
    pub batch: &'a B::Batch,
    /// Which of the step's rows `x` holds; picks the segments.
    pub rows: RowSet,
}

/// Where the products of [`Ops::linear`](crate::Ops::linear) go, and what is done to them on the way.
pub enum Output<'a, B: Adapters> {
    /// `y = x · Wᵀ + …`
    Store(&'a mut B::Mat),
    /// `y = f(x · Wᵀ + …)`
    Activate {
        /// f.
        activation: Activation,
        /// Room for the products, `[rows, n]`. What it holds afterwards is unspecified.
        products: &'a mut B::Mat,
        /// The result, `[rows, n]`.
        y: &'a mut B::Mat,
    },
    /// `y = f(gate) · up`, where the projection gives a gate and an up half side by side.
    Gate {
        /// f.
        activation: Activation,
        /// Room for both halves, `[rows, 2n]`. What it holds afterwards is unspecified.
        products: &'a mut B::Mat,
        /// The result, `[rows, n]`.
        y: &'a mut B::Mat,
    },
    /// Adds to the residual stream, and norms it.
    Residual(Residual<'a, B>),
    /// The logits of the output projection, `[rows, vocabulary]` in f32: `y = cap(scale · (x · Wᵀ + …))`, and -∞ where there
    /// is no row for a token; see [`Ops::logits`](crate::Ops::logits).
    Logits {
        /// The result, a [`Memory::wide_mat`](crate::Memory::wide_mat).
        y: &'a mut B::Mat,
        /// How they are scaled and capped.
        shape: LogitShape,
    },
}

/// What happens to logits before anybody reads them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitShape {
    /// Factor of all logits.
    pub scale: f32,
    /// Logits become `c · tanh(logit / c)`, after they were scaled.
    pub softcap: Option<f32>,
}

impl LogitShape {
    /// Logits as they are.
    pub const PLAIN: LogitShape = LogitShape { scale: 1.0, softcap: None };
}

/// A projection onto the residual stream: `stream += scale · post(x · Wᵀ + …)`, summed over all ranks, and then
/// `y = norm(stream)` for whoever reads the stream next.
pub struct Residual<'a, B: Adapters> {
    /// The residual stream, a [`Memory::wide_mat`](crate::Memory::wide_mat) of as many rows as x.
    pub stream: &'a mut B::Mat,
    /// Room for products that cannot be added to the stream as they come: a [`Memory::wide_mat`](crate::Memory::wide_mat) of its width.
    pub products: &'a mut B::Mat,
    /// Norms the products before they are added.
    pub post: Option<Norm<'a, B>>,
    /// Factor of what is added.
    pub scale: f32,
    /// Whether another projection of the same input follows, whose sum is taken over all ranks together with this one's:
    /// the first branch of a parallel residual.
    pub more: bool,
    /// The next norm of the stream, and its result. None where `more` follows.
    pub next: Option<(Norm<'a, B>, &'a mut B::Mat)>,
}

/// The residual stream's first value.
pub struct Embedding<'a, B: Adapters> {
    /// Rows by token, `[vocabulary, columns]`.
    pub table: &'a B::Weight,
    /// Factor of the table's rows.
    pub scale: f32,
    /// Learned positions that are added: the table, and which of its rows position 0 has.
    pub positions: Option<(&'a B::Weight, usize)>,
    /// Deltas and replacements of the table's rows. `rows` is [`RowSet::All`].
    pub lora: Option<LinearLora<'a, B>>,
}

/// What happens to queries, keys and values between their projection and attention.
pub struct Qkv<'a, B: Memory> {
    /// The heads of this rank.
    pub heads: Heads,
    /// All elements are cut off at ±this first.
    pub clamp: Option<f32>,
    /// Norm of queries and of keys, before they are rotated.
    pub norms: Option<QkNorms<'a, B>>,
    /// Rotation of queries and keys.
    pub rope: Option<Rotation<'a, B>>,
}

/// Norms of queries and keys.
pub struct QkNorms<'a, B: Memory> {
    /// Of queries.
    pub query: Norm<'a, B>,
    /// Of keys.
    pub key: Norm<'a, B>,
    /// What is normed at a time.
    pub over: NormSpan,
}

/// What a norm of queries or keys takes together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormSpan {
    /// Each head. The weight has `dim` elements, which all heads share, or those of all heads.
    Head,
    /// All heads of the row. The weight has the elements of all heads.
    Row,
}

/// The rotation of queries and keys by their positions.
pub struct Rotation<'a, B: Memory> {
    /// The angles. Only the first `2 · pairs` elements of a head are rotated.
    pub table: &'a B::Rope,
    /// Which elements make a pair.
    pub pairs: Pairs,
}

/// Which elements of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// Element j with j + n of 2n that are rotated.
    Halves,
    /// Element 2j with 2j + 1.
    Neighbours,
}

/// The angles of a rotary embedding: pair j at position p turns by `p · inv_freq[j]`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Radians per position of each pair.
    pub inv_freq: Vec<f32>,
    /// Factor of all cosines and sines.
    pub scale: f32,
    /// Positions that there are.
    pub positions: usize,
    /// How angles depend on the length of the sequence.
    pub stretch: Stretch,
}

/// How the angles of a row depend on its [`Batch::lengths`](crate::Batch::lengths).
#[derive(Debug, Clone, PartialEq)]
pub enum Stretch {
    /// Not at all.
    None,
    /// LongRoPE (Ding et al., 2024): other frequencies for sequences longer than the original context.
    Long {
        /// The longest sequence of the first frequencies.
        original: u32,
        /// The frequencies of longer ones.
        inv_freq: Vec<f32>,
    },
    /// NTK-aware scaling that grows with the sequence: for a length l above `original`, `inv_freq[j]` is divided by
    /// `(factor · l / original - (factor - 1))^(2j / (2n - 2))`, where n is the number of pairs.
    Dynamic {
        /// The longest sequence that is not scaled.
        original: u32,
        /// Factor of the length.
        factor: f32,
    },
}

/// Which keys of its sequence a row sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Span {
    /// Its own and all before it.
    Causal,
    /// The last so many, its own included.
    Window(u32),
    /// All, those behind it included. All rows of the sequence are in one step.
    Bidirectional,
}

/// What attention computes, but for what is learned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// The heads of this rank.
    pub heads: Heads,
    /// Factor on q·k, usually `1 / √dim`.
    pub scale: f32,
    /// Which keys a row sees. One of those that the device batch was made for.
    pub span: Span,
    /// Scores become `c · tanh(score / c)`.
    pub softcap: Option<f32>,
}

impl AttentionShape {
    /// Causal attention with the usual scale.
    pub fn causal(heads: Heads) -> AttentionShape {
        AttentionShape { heads, scale: 1.0 / (heads.dim as f32).sqrt(), span: Span::Causal, softcap: None }
    }
}

/// What an attention operation computes.
pub struct Attention<'a, B: Memory> {
    /// Heads, scale, and which keys are seen.
    pub shape: AttentionShape,
    /// For every query head a score that takes part in the softmax and has no value (attention sinks, Xiao et al., 2024).
    pub sinks: Option<&'a B::Vector>,
    /// For every query head the slope of a score that falls with the distance: ALiBi (Press et al., 2022).
    pub slopes: Option<&'a B::Vector>,
}

impl<B: Memory> From<AttentionShape> for Attention<'_, B> {
    fn from(shape: AttentionShape) -> Self {
        Attention { shape, sinks: None, slopes: None }
    }
}

/// References to a device's memory are copied whatever the device is, which `derive` would not see.
macro_rules! copied {
    ($($bound:ident: $($name:ident),*;)*) => {$($(
        impl<B: $bound> Clone for $name<'_, B> {
            fn clone(&self) -> Self {
                *self
            }
        }
        impl<B: $bound> Copy for $name<'_, B> {}
    )*)*};
}

copied! {
    Memory: Norm, Qkv, QkNorms, Rotation, Attention;
    Adapters: Projection, LinearLora, Embedding;
}
