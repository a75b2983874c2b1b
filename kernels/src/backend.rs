//! The operations that a model is made of.

use std::sync::Arc;

use crate::{
    Batch, DType, HostTensor, LoraPart, LoraShape, LoraSite, Matrix, Result, RowSet, SampleRow, Sampled,
    SamplingParams,
};

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

/// What an attention operation computes besides its shapes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// The heads of this rank.
    pub heads: Heads,
    /// Factor on q·k, usually `1 / √dim`.
    pub scale: f32,
    /// A row sees only the last so many positions, itself included.
    pub window: Option<u32>,
    /// Scores become `c · tanh(score / c)`.
    pub softcap: Option<f32>,
}

/// What [`Backend::linear`] multiplies rows with.
pub struct Projection<'a, B: Backend> {
    /// W.
    pub weight: &'a B::Weight,
    /// Added to every row, one element for each output.
    pub bias: Option<&'a B::Vector>,
    /// Of the rows that have an adapter.
    pub lora: Option<LinearLora<'a, B>>,
}

impl<'a, B: Backend> Projection<'a, B> {
    /// One without a bias.
    pub fn new(weight: &'a B::Weight, lora: Option<LinearLora<'a, B>>) -> Projection<'a, B> {
        Projection { weight, bias: None, lora }
    }
}

/// The low-rank deltas of one [`Backend::linear`]: the resident adapters, the site, and the rows that `x` holds.
pub struct LinearLora<'a, B: Backend> {
    /// All resident adapters.
    pub slots: &'a B::LoraSlots,
    /// Index of the site among those that the slots were made for.
    pub site: usize,
    /// The step.
    pub batch: &'a B::Batch,
    /// Which of the step's rows `x` holds; picks the segments.
    pub rows: RowSet,
}

/// A device and its kernels.
///
/// Activations are row-major `[rows, cols]`, one row a token position of the step, prefill and decode mixed. Weights
/// are `[out, in]`. Outputs are `&mut` arguments into memory allocated once: no operation allocates device memory.
/// Each operation sets the rows in use of its output. A row's result does not depend on the other rows of the step,
/// bit for bit, unless an implementation says otherwise.
pub trait Backend: Send + Sync + Sized + 'static {
    /// Activations.
    type Mat: Matrix + Send;
    /// A weight `[out, in]` in the layout that `linear` reads; also readable by rows for `embed`.
    type Weight: Send + Sync;
    /// A vector of f32: norm weights, biases.
    type Vector: Send + Sync;
    /// Cosines and sines of a rotary embedding.
    type Rope: Send + Sync;
    /// Keys and values of one layer, in blocks of [`crate::BLOCK_SIZE`] positions.
    type Kv: Send;
    /// A [`Batch`] on the device.
    type Batch: Send;
    /// One adapter in host memory, laid out as on the device.
    type HostAdapter: Send + Sync;
    /// The resident adapters of all sites.
    type LoraSlots: Send;
    /// Sampling state of the running sequences, by seat.
    type Sampler: Send;
    /// Choices on their way to the host.
    type Pending: Send;
    /// A point in the work that was launched.
    type Mark: Send;

    /// The type of weights and of what KV memory takes (the CPU stores f16 beside bf16 weights: the same bytes).
    fn dtype(&self) -> DType;

    // ---- memory ----

    /// Zeroed activations of up to `rows` rows.
    fn mat(&self, rows: usize, cols: usize) -> Result<Self::Mat>;
    /// As [`Self::mat`], but its elements are f32 even where other activations are not: for the residual stream and for
    /// logits, whose rounding would be seen in the log-probabilities.
    fn wide_mat(&self, rows: usize, cols: usize) -> Result<Self::Mat> {
        self.mat(rows, cols)
    }
    /// The matrix whose rows are those of `parts`, one part after the other, converted to [`Self::dtype`].
    fn weight(&self, parts: &[HostTensor<'_>]) -> Result<Self::Weight>;
    /// A vector.
    fn vector(&self, values: &[f32]) -> Result<Self::Vector>;
    /// Cosines and sines of `position · inv_freq[i]` times `scale`, for positions below `positions`.
    fn rope(&self, inv_freq: &[f32], positions: usize, scale: f32) -> Result<Self::Rope>;
    /// KV memory of one layer.
    fn kv(&self, blocks: usize, heads: Heads) -> Result<Self::Kv>;
    /// Bytes that one block of one layer takes in [`Self::kv`].
    fn kv_block_bytes(&self, heads: Heads) -> usize;
    /// An empty device batch for up to `rows` rows and `blocks` block table entries.
    fn batch(&self, rows: usize, blocks: usize) -> Result<Self::Batch>;
    /// Copies a step's index data to the device. Errors: indices that contradict each other.
    fn upload(&self, host: &Batch, batch: &mut Self::Batch) -> Result<()>;
    /// The rows in use as f32, row-major. For tests and prompt scoring, never on the path of a decode step.
    fn download(&self, x: &Self::Mat) -> Result<Vec<f32>>;
    /// Fills the matrix from row-major f32 `[rows, cols]` and sets its rows.
    fn fill(&self, x: &mut Self::Mat, values: &[f32]) -> Result<()>;

    // ---- adapters ----

    /// Tells how many bytes of staged adapters there will be at most, so that a device keeps memory for as many when
    /// adapters are dropped, and how many of them it may begin to set aside now. Returns at once.
    fn expect_adapters(&self, most: usize, now: usize) {
        let _ = (most, now);
    }
    /// Bytes of host memory that [`Self::stage`] takes for parts of these shapes, what is lost to whole pages or pieces
    /// included. Errors: shapes that cannot be staged.
    fn host_bytes(&self, sites: &[LoraSite], shapes: &[LoraShape]) -> Result<usize>;
    /// Lays an adapter out in host memory exactly as a device holds it. Runs beside steps, on any thread.
    fn stage(&self, sites: &[LoraSite], parts: &[LoraPart]) -> Result<Self::HostAdapter>;
    /// Bytes of an adapter on the device.
    fn adapter_bytes(&self, adapter: &Self::HostAdapter) -> usize;
    /// Room for `slots` adapters of the given sites; empty.
    fn lora_slots(&self, sites: &[LoraSite], slots: usize) -> Result<Self::LoraSlots>;
    /// Begins to copy an adapter into a slot, without waiting for it. Errors: [`crate::Error::OutOfMemory`] leaves the
    /// slot empty and the device usable.
    fn load(&self, slots: &mut Self::LoraSlots, slot: u32, adapter: &Arc<Self::HostAdapter>) -> Result<()>;
    /// Slots whose copies have ended since the last call: rows may use them from the next step on.
    fn loaded(&self, slots: &mut Self::LoraSlots) -> Result<Vec<u32>>;
    /// Empties a slot. Steps already launched still see its adapter.
    fn unload(&self, slots: &mut Self::LoraSlots, slot: u32) -> Result<()>;

    // ---- a step ----

    /// Runs `ops`, all operations of one step but sampling. For one pair of device batch and numbers of rows, `ops` must
    /// always be the same operations on the same matrices: a device may record them at first and replay them later.
    fn step(&self, batch: &Self::Batch, ops: impl FnOnce() -> Result<()>) -> Result<()> {
        let _ = batch;
        ops()
    }

    /// Marks the present end of what was launched.
    fn mark(&self) -> Result<Self::Mark>;
    /// Whether all work before a mark is done, so that nothing of it is waited for any more. A failure of the device
    /// counts as done: whoever waits for the work reports it.
    fn reached(&self, mark: &Self::Mark) -> bool;
    /// Seconds on the device's clock from one mark to a later one, for which this waits.
    fn seconds_between(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64>;

    /// The decode steps that this device records, as (rows, runs of rows with an adapter): whoever runs each of them
    /// twice before serving spares the first requests that time.
    fn recorded_steps(&self) -> Vec<(usize, usize)> {
        Vec::new()
    }

    /// Numbers of rows, up to `max_rows`, of further steps that this device wants to run before serving: it times
    /// algorithms then, as it does in recorded ones.
    fn warm_up_rows(&self, max_rows: usize) -> Vec<usize> {
        let _ = max_rows;
        Vec::new()
    }

    /// Semantics: `y[i] = table[token(i)]`, where a negative `batch.tokens[i]` is looked up in the sampler. `y` is the
    /// residual stream, a [`Self::wide_mat`].
    fn embed(
        &self,
        batch: &Self::Batch,
        sampler: &Self::Sampler,
        table: &Self::Weight,
        y: &mut Self::Mat,
    ) -> Result<()>;

    /// Semantics: `y[i] = x[i] · Wᵀ + bias`, and for every segment of `by.lora` with row i in it and every slice s that
    /// its adapter has: `y[i, range(s)] += x[i] · A_sᵀ · B_sᵀ`.
    fn linear(&self, x: &Self::Mat, by: Projection<'_, Self>, y: &mut Self::Mat) -> Result<()>;

    /// As [`Self::linear`], but the sums are added to what `y`, a [`Self::wide_mat`] of as many rows as `x`, holds: a
    /// projection onto the residual stream, without rounding in between.
    fn add_linear(&self, x: &Self::Mat, by: Projection<'_, Self>, y: &mut Self::Mat) -> Result<()>;

    /// [`Self::add_linear`] to the residual stream, then [`Self::rms_norm`] of it.
    fn add_linear_norm(
        &self,
        x: &Self::Mat,
        by: Projection<'_, Self>,
        residual: &mut Self::Mat,
        (norm, eps): (&Self::Vector, f32),
        y: &mut Self::Mat,
    ) -> Result<()> {
        self.add_linear(x, by, residual)?;
        self.rms_norm(residual, norm, eps, y)
    }

    /// [`Self::linear`] of a gate and an up projection side by side, then [`Self::silu_mul`]. What `gate_up` holds
    /// afterwards is unspecified.
    fn gated_linear(
        &self,
        x: &Self::Mat,
        by: Projection<'_, Self>,
        gate_up: &mut Self::Mat,
        y: &mut Self::Mat,
    ) -> Result<()> {
        self.linear(x, by, gate_up)?;
        self.silu_mul(gate_up, y)
    }

    /// Semantics: `y[i] = w · x[i] / √(mean(x[i]²) + eps)`. `x` is the residual stream, a [`Self::wide_mat`].
    fn rms_norm(&self, x: &Self::Mat, w: &Self::Vector, eps: f32, y: &mut Self::Mat) -> Result<()>;

    /// Rotates the queries and keys of `qkv` `[rows, (query + 2 · kv) · dim]` in place by their positions (half-split
    /// pairs: element j with j + dim/2) and stores keys and values at `batch.store_at`.
    fn rope_and_store(
        &self,
        qkv: &mut Self::Mat,
        heads: Heads,
        rope: &Self::Rope,
        batch: &Self::Batch,
        kv: &mut Self::Kv,
    ) -> Result<()>;

    /// Causal attention of each row over its sequence's stored keys and values, its own included.
    ///
    /// Semantics: `y[i, h] = softmax(scale · q[i, h] · K[: pos(i) + 1, h / group]ᵀ) · V[: pos(i) + 1, h / group]`;
    /// `y` is `[rows, query · dim]`.
    fn paged_attention(
        &self,
        qkv: &Self::Mat,
        attention: &Attention,
        batch: &Self::Batch,
        kv: &Self::Kv,
        y: &mut Self::Mat,
    ) -> Result<()>;

    /// Semantics: `y[i, j] = silu(x[i, j]) · x[i, n + j]`, `x` `[rows, 2n]`, `y` `[rows, n]`.
    fn silu_mul(&self, gate_up: &Self::Mat, y: &mut Self::Mat) -> Result<()>;

    /// Semantics: `y[i] = x[batch.logit_rows[i]]`.
    fn gather_logit_rows(&self, x: &Self::Mat, batch: &Self::Batch, y: &mut Self::Mat) -> Result<()>;

    // ---- sampling ----

    /// Sampling state for `seats` sequences over a vocabulary of `vocab` tokens.
    fn sampler(&self, seats: usize, vocab: usize) -> Result<Self::Sampler>;
    /// Puts a sequence on a seat, replacing whoever sat there. `output` is what it has generated already: a sequence
    /// that was preempted continues its penalties and its draws where it stopped. Errors: what is wrong with the
    /// arguments (see [`crate::Error::is_argument`]), found before anything is changed, or a failure of the device.
    fn seat(
        &self,
        sampler: &mut Self::Sampler,
        seat: u32,
        params: &SamplingParams,
        prompt: &[u32],
        output: &[u32],
    ) -> Result<()>;
    /// Samples one token for every row and remembers it as its seat's last token, without waiting for the device:
    /// the next step may be launched before [`Self::collect`] brings the choices.
    fn sample(
        &self,
        logits: &Self::Mat,
        rows: &[SampleRow],
        sampler: &mut Self::Sampler,
    ) -> Result<Self::Pending>;
    /// The log-probability of `token` under the logits in `row`, for each `(row, token)`, and the `num_top` most
    /// probable tokens of that row. The seats of the answers are 0.
    fn score(&self, logits: &Self::Mat, targets: &[(u32, u32)], num_top: u32) -> Result<Self::Pending>;
    /// Waits for choices and appends them to `out`, in the order of their rows.
    fn collect(&self, pending: Self::Pending, out: &mut Vec<Sampled>) -> Result<()>;
}
