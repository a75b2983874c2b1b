//! The arguments of a [`Backend`](crate::Backend)'s operations besides their matrices: the features in which
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

/// The formula of a norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `w · x / √(mean(x²) + eps) + b` (Zhang and Sennrich, 2019).
    Rms,
    /// `w · (x - mean(x)) / √(var(x) + eps) + b` (Ba et al., 2016).
    Layer,
}

/// A norm of rows. If a model stores `w - 1`, the loader has added 1.
pub struct Norm<'a, B: Memory> {
    /// The formula.
    pub kind: NormKind,
    /// w, one element for each column.
    pub weight: &'a B::Vector,
    /// b, one element for each column.
    pub bias: Option<&'a B::Vector>,
    /// Epsilon, which is added under the root.
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
    /// The hyperbolic tangent.
    Tanh,
}

/// A projection: the weight W that rows are multiplied with, and what is added to the products.
pub struct Projection<'a, B: Adapters> {
    /// W.
    pub weight: &'a B::Weight,
    /// The bias, with one element for each output.
    pub bias: Option<&'a B::Vector>,
    /// The adapters of the rows that have one.
    pub lora: Option<LinearLora<'a, B>>,
}

impl<'a, B: Adapters> Projection<'a, B> {
    /// A projection without a bias.
    pub fn new(weight: &'a B::Weight, lora: Option<LinearLora<'a, B>>) -> Projection<'a, B> {
        Projection { weight, bias: None, lora }
    }
}

/// The adapters of one [`Projection`]: the slots, the site, and the rows of the step that `x` has.
pub struct LinearLora<'a, B: Adapters> {
    /// The slots with the resident adapters.
    pub slots: &'a B::LoraSlots,
    /// Index of the site among those that the slots were made for.
    pub site: usize,
    /// The step.
    pub batch: &'a B::Batch,
    /// Which of the step's rows `x` has, which decides on the segments.
    pub rows: RowSet,
}

/// The epilogue of [`Ops::linear`](crate::Ops::linear): what is done with the products, and where the result is stored.
pub enum Output<'a, B: Adapters> {
    /// `y = x · Wᵀ + …`
    Store(&'a mut B::Mat),
    /// `y = f(x · Wᵀ + …)`
    Activate {
        /// f.
        activation: Activation,
        /// Memory for the products, `[rows, n]`. Its content is unspecified afterwards.
        products: &'a mut B::Mat,
        /// The result, `[rows, n]`.
        y: &'a mut B::Mat,
    },
    /// `y = f(gate) · up`, where the first half of the products is the gate and the second half is up.
    Gate {
        /// f.
        activation: Activation,
        /// Memory for both halves, `[rows, 2n]`. Its content is unspecified afterwards.
        products: &'a mut B::Mat,
        /// The result, `[rows, n]`.
        y: &'a mut B::Mat,
    },
    /// The products are added to the residual stream, which is then normed.
    Residual(Residual<'a, B>),
    /// The products are logits, `[rows, vocabulary]` in f32: `y = cap(scale · (x · Wᵀ + …))`, and -∞ for a token
    /// without a row; see [`Ops::logits`](crate::Ops::logits).
    Logits {
        /// The result, a [`Memory::wide_mat`].
        y: &'a mut B::Mat,
        /// How they are scaled and capped.
        shape: LogitShape,
    },
}

/// How logits are scaled and capped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitShape {
    /// Factor of all logits.
    pub scale: f32,
    /// After scaling, logits become `c · tanh(logit / c)`.
    pub softcap: Option<f32>,
}

impl LogitShape {
    /// Logits that are neither scaled nor capped.
    pub const PLAIN: LogitShape = LogitShape { scale: 1.0, softcap: None };
}

/// The end of a branch: `stream += scale · post(x · Wᵀ + …)`, where the products are summed over all ranks, and then
/// `y = norm(stream)` for the projection that reads the stream next.
pub struct Residual<'a, B: Adapters> {
    /// The residual stream, a [`Memory::wide_mat`] of as many rows as x.
    pub stream: &'a mut B::Mat,
    /// Memory for products that cannot be added to the stream directly: a [`Memory::wide_mat`]
    /// of the stream's width.
    pub products: &'a mut B::Mat,
    /// The norm of the products before they are added.
    pub post: Option<Norm<'a, B>>,
    /// The factor of what is added.
    pub scale: f32,
    /// The branch of the layer.
    pub branch: Branch,
    /// The next norm of the stream, and its result. `None` for the first of two branches.
    pub next: Option<(Norm<'a, B>, &'a mut B::Mat)>,
}

/// The place of a branch among those that add to the stream without reading it in between. The products of both branches
/// of a parallel residual can be summed over all ranks together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Branch {
    /// The only one.
    Only,
    /// The first of two. Its products may stay in [`Residual::products`], which nothing else uses until the second ends.
    First,
    /// The second of two, with the same factor, and without a norm of the products, like the first.
    Second,
}

/// The first value of the residual stream.
pub struct Embedding<'a, B: Adapters> {
    /// Rows by token, `[vocabulary, columns]`.
    pub table: &'a B::Weight,
    /// Factor of the table's rows.
    pub scale: f32,
    /// Learned positions, which are added: the table, and its row of position 0.
    pub positions: Option<(&'a B::Weight, usize)>,
    /// The adapters, which may change rows of the table. `rows` is [`RowSet::All`].
    pub lora: Option<LinearLora<'a, B>>,
}

/// What is done with queries, keys and values between their projection and attention.
pub struct Qkv<'a, B: Memory> {
    /// The heads of this rank.
    pub heads: Heads,
    /// All elements are clamped to ± this value first.
    pub clamp: Option<f32>,
    /// The norms of queries and keys, which come before the rotation.
    pub norms: Option<QkNorms<'a, B>>,
    /// The rotary embedding of queries and keys.
    pub rope: Option<Rotation<'a, B>>,
}

/// Norms of queries and keys.
pub struct QkNorms<'a, B: Memory> {
    /// Of queries.
    pub query: Norm<'a, B>,
    /// Of keys.
    pub key: Norm<'a, B>,
    /// What is normed together.
    pub over: NormSpan,
}

/// The elements of queries or keys that are normed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormSpan {
    /// Each head by itself. The weight has `dim` elements, which all heads share, or an element for each element of all
    /// heads.
    Head,
    /// All heads of a row. The weight has an element for each element of all heads.
    Row,
}

/// The rotary embedding of queries and keys.
pub struct Rotation<'a, B: Memory> {
    /// The angles. Only the first `2 · pairs` elements of a head are rotated.
    pub table: &'a B::Rope,
    /// Which elements form a pair.
    pub pairs: Pairs,
}

/// Which elements of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// Elements j and j + n, of 2n that are rotated.
    Halves,
    /// Elements 2j and 2j + 1.
    Neighbours,
}

/// The frequencies of a rotary embedding: pair j at position p is rotated by the angle `p · inv_freq[j]`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Radians per position of each pair.
    pub inv_freq: Vec<f32>,
    /// Factor of all cosines and sines.
    pub scale: f32,
    /// The number of positions.
    pub positions: usize,
    /// How frequencies depend on the length of the sequence.
    pub stretch: Stretch,
}

/// The most positions for which a backend keeps a table of angles: more are computed row by row, because a table of
/// millions of positions takes gigabytes.
pub(crate) const TABLE_POSITIONS: usize = 1 << 18;

/// How the frequencies of a row depend on its [`Batch::lengths`](crate::Batch::lengths).
#[derive(Debug, Clone, PartialEq)]
pub enum Stretch {
    /// They do not.
    None,
    /// LongRoPE (Ding et al., 2024): other frequencies for sequences longer than the original context.
    Long {
        /// The longest sequence that has the first frequencies.
        original: u32,
        /// The frequencies of longer ones.
        inv_freq: Vec<f32>,
    },
    /// Dynamic NTK scaling: for a length l above `original`, `inv_freq[j]` is divided by
    /// `(factor · l / original - (factor - 1))^(2j / (2n - 2))`, where n is the number of pairs.
    Dynamic {
        /// The longest sequence that is not scaled.
        original: u32,
        /// The scaling factor.
        factor: f32,
    },
}

/// The keys of its sequence that a row attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Span {
    /// Its own key and all before it.
    Causal,
    /// The last keys, as many as this says, including its own.
    Window(u32),
    /// All keys, including those after it. All rows of the sequence must be in one step.
    Bidirectional,
}

/// The parameters of attention that are not learned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// The heads of this rank.
    pub heads: Heads,
    /// The factor of q·k, usually `1 / √dim`.
    pub scale: f32,
    /// The keys that a row attends to. It must be one of the spans that the device batch was made for.
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

/// The parameters of attention.
pub struct Attention<'a, B: Memory> {
    /// Heads, scale, span and softcap.
    pub shape: AttentionShape,
    /// Attention sinks (Xiao et al., 2024): a score for each query head, which takes part in the softmax and has no
    /// value.
    pub sinks: Option<&'a B::Vector>,
    /// ALiBi (Press et al., 2022): a slope for each query head, by which scores fall with the distance.
    pub slopes: Option<&'a B::Vector>,
}

impl<B: Memory> From<AttentionShape> for Attention<'_, B> {
    fn from(shape: AttentionShape) -> Self {
        Attention { shape, sinks: None, slopes: None }
    }
}

/// Implements `Copy` for structs of references. `derive` would ask for a device that is `Copy` itself.
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
