//! The contract between a model and a device: memory, sampling, adapters, and the operations of a forward pass.

use std::sync::Arc;

use crate::{
    Activation, Attention, Batch, DType, Embedding, Group, Heads, HostTensor, LinearLora, LogitShape,
    LoraPart, LoraShape, LoraSite, Matrix, MatrixSource, Norm, Output, Projection, Qkv, Result, RopeSpec,
    SampleRow, Sampled, SamplingParams, Span, TokenMask, compose,
};

/// A device and its kernels.
///
/// Activations are row-major `[rows, cols]`. Each row is a token position of the step, prefill and decode mixed.
/// Weights are `[out, in]`. Outputs are `&mut` arguments, whose memory is allocated once: no operation allocates device
/// memory. Each operation sets the number of rows in use of its output. A row's result does not depend on the other
/// rows of the step, bit for bit, unless an implementation says otherwise.
pub trait Backend: Ops {}

impl<T: Ops> Backend for T {}

/// The memory of a device: activations, weights, the KV cache, and the index data of a step.
pub trait Memory: Send + Sync + Sized + 'static {
    /// Activations.
    type Mat: Matrix + Send;
    /// A weight `[out, in]` in the layout that GEMMs read. Its rows can also be looked up by `embed`.
    type Weight: Send + Sync;
    /// A vector of f32: norm weights, biases.
    type Vector: Send + Sync;
    /// The angles of a rotary embedding.
    type Rope: Send + Sync;
    /// The KV cache of one layer, in blocks of [`crate::BLOCK_SIZE`] positions.
    type Kv: Send;
    /// A [`Batch`] on the device.
    type Batch: Send;
    /// A fence: a point in the order of launched work, with its time on the device.
    type Mark: Send;

    /// The type of weights, which is also that of the KV cache, except that the CPU stores f16 beside bf16 weights.
    fn dtype(&self) -> DType;

    /// Allocates zeroed activations of up to `rows` rows.
    fn mat(&self, rows: usize, cols: usize) -> Result<Self::Mat>;
    /// As [`Self::mat`], but with f32 elements even where other activations have fewer bits. It is for the residual
    /// stream and for logits, where rounding would show in the log-probabilities.
    fn wide_mat(&self, rows: usize, cols: usize) -> Result<Self::Mat> {
        self.mat(rows, cols)
    }
    /// Copies a weight to the device, converted to [`Self::dtype`]. Its rows are those of `parts`, one part after the
    /// other.
    fn weight(&self, parts: &[HostTensor<'_>]) -> Result<Self::Weight>;
    /// Bytes that a weight takes on the device.
    fn weight_bytes(&self, weight: &Self::Weight) -> usize;
    /// Copies a vector to the device.
    fn vector(&self, values: &[f32]) -> Result<Self::Vector>;
    /// Computes the angles of a rotary embedding.
    fn rope(&self, spec: &RopeSpec) -> Result<Self::Rope>;
    /// Allocates the KV cache of one layer.
    fn kv(&self, blocks: usize, heads: Heads) -> Result<Self::Kv>;
    /// Bytes of one block of [`Self::kv`].
    fn kv_block_bytes(&self, heads: Heads) -> usize;
    /// Allocates an empty device batch for up to `rows` rows and `blocks` block table entries. Attention is planned
    /// once a step for each of `spans`.
    fn batch(&self, rows: usize, blocks: usize, spans: &[Span]) -> Result<Self::Batch>;
    /// Copies a step's index data to the device. Errors: the indices contradict each other.
    fn upload(&self, host: &Batch, batch: &mut Self::Batch) -> Result<()>;
    /// Waits for the device, and copies the rows in use to the host as row-major f32. For hidden states and tests: no
    /// decode step calls it.
    fn download(&self, x: &Self::Mat) -> Result<Vec<f32>>;
    /// Fills a matrix from row-major f32 `[rows, cols]`, and sets its number of rows.
    fn fill(&self, x: &mut Self::Mat, values: &[f32]) -> Result<()>;

    /// Makes a fence after all work that has been launched.
    fn mark(&self) -> Result<Self::Mark>;
    /// Whether all work before a fence is done. A failure of the device counts as done, because the operation that
    /// waits for the work reports it.
    fn reached(&self, mark: &Self::Mark) -> bool;
    /// Waits for a fence, and returns the seconds that have passed on the device's clock since an earlier one.
    fn seconds_between(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64>;
}

/// A decode step that a device captures as a CUDA graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CapturedStep {
    /// Rows, each of a sequence of its own.
    pub rows: usize,
    /// Runs of rows with an adapter.
    pub runs: usize,
    /// Whether some adapter has magnitudes or biases, or some row several adapters. Such a step has other kernels than one
    /// with a low-rank delta for each row.
    pub is_affine: bool,
}

/// The operations of a forward pass.
///
/// A model calls [`Self::linear`] for every projection, and its [`Output`] says what is done with the products. By
/// default, `linear` is built from the simpler operations that follow it. A device overrides it for the combinations
/// that it fuses.
pub trait Ops: Adapters {
    /// Runs `ops`, which are all operations of one step except sampling. For the same device batch and the same numbers
    /// of rows, `ops` must always be the same operations on the same matrices, because a device may capture them as a
    /// CUDA graph and replay this later. `slots` has the adapters of the step's rows; `None` if no row has one.
    fn step(
        &self,
        batch: &Self::Batch,
        slots: Option<&Self::LoraSlots>,
        ops: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let _ = (batch, slots);
        ops()
    }

    /// The decode steps that this device captures. The warm-up runs each of them twice, so that no request waits for a
    /// capture.
    fn captured_steps(&self) -> Vec<CapturedStep> {
        Vec::new()
    }

    /// The numbers of rows, up to `max_rows`, of further steps that the warm-up has to run, in which this device times
    /// GEMM algorithms.
    fn warm_up_rows(&self, max_rows: usize) -> Vec<usize> {
        let _ = max_rows;
        Vec::new()
    }

    /// Semantics: `y[i] = by.scale · by.table[token(i)] + by.positions[position(i)]`. The sampler has the token of a
    /// row whose `batch.tokens[i]` is negative. The changes that a row's adapter makes to the table, see [`LoraPart`],
    /// come before the scale. `y` is the residual stream, a [`Memory::wide_mat`]. The caller promises that each token
    /// has a row; a device need not check this.
    fn embed(
        &self,
        batch: &Self::Batch,
        sampler: &Self::Sampler,
        by: Embedding<'_, Self>,
        y: &mut Self::Mat,
    ) -> Result<()>;

    /// The operation of every projection: computes the products of [`Self::matmul`], and does with them what `out`
    /// says.
    fn linear(&self, x: &Self::Mat, by: Projection<'_, Self>, out: Output<'_, Self>) -> Result<()> {
        compose::linear(self, x, by, out)
    }

    /// Semantics: `y[i] = x[i] · Wᵀ + bias`. If row i is in a segment of `by.lora`, the parts of the segment's adapter
    /// at this site change this as [`LoraPart`] says.
    fn matmul(&self, x: &Self::Mat, by: Projection<'_, Self>, y: &mut Self::Mat) -> Result<()>;

    /// As [`Self::matmul`], but the sums are added to `y`, a [`Memory::wide_mat`] with as many rows as `x`, without
    /// being rounded before. It is not called where [`Adapters::scales`] is true.
    fn matmul_add(&self, x: &Self::Mat, by: Projection<'_, Self>, y: &mut Self::Mat) -> Result<()>;

    /// Semantics: `stream[i] += scale · post(x[i])`; both are [`Memory::wide_mat`]s.
    fn add(
        &self,
        x: &Self::Mat,
        post: Option<Norm<'_, Self>>,
        scale: f32,
        stream: &mut Self::Mat,
    ) -> Result<()>;

    /// Semantics: `y[i] = norm(x[i])`. `x` is a [`Memory::wide_mat`], `y` may be one.
    fn normalize(&self, x: &Self::Mat, norm: Norm<'_, Self>, y: &mut Self::Mat) -> Result<()>;

    /// Semantics: `stream[i] = norm(stream[i])`, then `y[i] = stream[i]`. The norm of a layer that norms its sums: what is
    /// added to the stream next is added to the normed one (post-LN; Vaswani et al., 2017). `stream` is a
    /// [`Memory::wide_mat`].
    fn normalize_stream(&self, stream: &mut Self::Mat, norm: Norm<'_, Self>, y: &mut Self::Mat)
    -> Result<()>;

    /// Semantics: `y[i, j] = f(x[i, j])`.
    fn activate(&self, x: &Self::Mat, f: Activation, y: &mut Self::Mat) -> Result<()>;

    /// Semantics: `y[i, j] = f(x[i, j]) · x[i, n + j]`, `x` `[rows, 2n]`, `y` `[rows, n]`.
    fn gate(&self, x: &Self::Mat, f: Activation, y: &mut Self::Mat) -> Result<()>;

    /// Semantics: as [`Self::matmul`], then `y[i, j] = cap(scale · y[i, j])`, see [`LogitShape`]. `y`, a
    /// [`Memory::wide_mat`], may have more columns than the base weight has rows. If neither the base model nor the
    /// row's adapter has a row for a token, its logit is -∞, whatever the shape.
    fn logits(
        &self,
        x: &Self::Mat,
        by: Projection<'_, Self>,
        shape: LogitShape,
        y: &mut Self::Mat,
    ) -> Result<()>;

    /// Clamps, norms and rotates the queries and keys of `qkv` `[rows, (query + 2 · kv) · dim]` in place, as [`Qkv`]
    /// says and in its order, and stores keys and values at `batch.store_at`.
    fn rope_and_store(
        &self,
        qkv: &mut Self::Mat,
        by: Qkv<'_, Self>,
        batch: &Self::Batch,
        kv: &mut Self::Kv,
    ) -> Result<()>;

    /// Attention of each row over its sequence's keys and values in the KV cache.
    ///
    /// Semantics, for row i at position p, query head h and its key head `g = h / (query / kv)`, over the keys t of its
    /// span: `s[t] = softcap(scale · q[i, h] · K[t, g]) + slopes[h] · (t - p)`,
    /// `y[i, h] = Σ e^s[t] · V[t, g] / (Σ e^s[t] + e^sinks[h])`. `y` is `[rows, query · dim]`.
    fn paged_attention(
        &self,
        qkv: &Self::Mat,
        by: Attention<'_, Self>,
        batch: &Self::Batch,
        kv: &Self::Kv,
        y: &mut Self::Mat,
    ) -> Result<()>;

    /// Semantics: `y[i] = x[batch.logit_rows[i]]`.
    fn gather_logit_rows(&self, x: &Self::Mat, batch: &Self::Batch, y: &mut Self::Mat) -> Result<()>;

    // ---- tensor parallelism ----

    /// The ranks that share the model. Collectives are launched like any other operation, and every rank must launch the
    /// same operations on matrices of the same sizes in the same order. Errors of all of them: [`crate::Error::Peer`] if
    /// another rank has ended or does not come.
    fn group(&self) -> &Arc<Group>;
    /// The number of ranks.
    fn ranks(&self) -> usize {
        self.group().ranks()
    }
    /// The number of this rank, from 0.
    fn rank(&self) -> usize {
        self.group().rank()
    }
    /// Semantics: `x = Σ over all ranks of x`, with the same bits on every rank. `x` is a [`Memory::wide_mat`]. A device
    /// may round the ranks' elements to [`Memory::dtype`] before they are added.
    fn all_reduce(&self, x: &mut Self::Mat) -> Result<()>;
    /// Semantics: `y[i] = x₀[i] ‖ x₁[i] ‖ …`, the columns of all ranks in their order, with the same bits on every rank.
    /// All ranks but the last have the same number of columns, so that each knows those of the others. `x` and `y` are
    /// [`Memory::wide_mat`]s.
    fn gather_columns(&self, x: &Self::Mat, y: &mut Self::Mat) -> Result<()>;
}

/// Adapters: staged in host memory, and loaded into slots on the device, where operations find them.
pub trait Adapters: Sampling {
    /// One adapter in host memory, with the layout that it has on the device.
    type HostAdapter: Send + Sync;
    /// The adapter slots of all sites.
    type LoraSlots: Send;

    /// Tells the device how many bytes adapters in slots may take, for it to allocate them now: later, the first loads
    /// would wait for that.
    fn reserve_slots(&self, bytes: usize) {
        let _ = bytes;
    }

    /// Tells the device the largest number of bytes that staged adapters will take, so that it keeps as much memory for
    /// reuse when adapters are dropped, and how many bytes of this it may begin to allocate now, beside steps. Returns at
    /// once.
    fn expect_adapters(&self, most: usize, now: usize) {
        let _ = (most, now);
    }
    /// Bytes of host memory that [`Self::stage`] takes for parts of these shapes, including padding to whole pages or
    /// pieces. Errors: these shapes cannot be staged.
    fn host_bytes(&self, sites: &[LoraSite], shapes: &[LoraShape]) -> Result<usize>;
    /// Reads an adapter into host memory, laid out exactly as it is on the device. It takes no other memory that grows with
    /// the adapter. Runs beside steps, on the calling thread and on others that all stages share. Errors: among others,
    /// those of reading.
    fn stage<M: MatrixSource>(
        &self,
        sites: &[LoraSite],
        parts: &[LoraPart<M>],
    ) -> Result<Self::HostAdapter, M::Error>;
    /// Bytes that an adapter takes on the device.
    fn adapter_bytes(&self, adapter: &Self::HostAdapter) -> usize;
    /// Makes `slots` empty slots for adapters of these sites.
    fn lora_slots(&self, sites: &[LoraSite], slots: usize) -> Result<Self::LoraSlots>;
    /// Begins to copy an adapter into a slot, without waiting for it. `weights` are the base weights of the sites, in
    /// the same order: the norms of [`LoraPart::magnitude`] depend on them.
    ///
    /// If a site with a magnitude is partial, each rank posts its squares to the others ([`Group::post`], at the slot,
    /// about [`LoraPart::content`]), and the load ends when those of all ranks have come. A rank that cannot load the
    /// adapter posts nothing but that: no bytes. Then the load ends on the other ranks, too, and the slot must not be
    /// used.
    ///
    /// Errors: after [`crate::Error::OutOfMemory`]
    /// the slot is empty and the device usable.
    fn load(
        &self,
        slots: &mut Self::LoraSlots,
        slot: u32,
        adapter: &Arc<Self::HostAdapter>,
        weights: &[&Self::Weight],
    ) -> Result<()>;
    /// The slots whose copies have ended since the last call. Rows may use them from the next step on.
    fn loaded(&self, slots: &mut Self::LoraSlots) -> Result<Vec<u32>>;
    /// Empties a slot. Steps that have been launched can still use its adapter.
    fn unload(&self, slots: &mut Self::LoraSlots, slot: u32) -> Result<()>;
    /// Whether some row's adapter has a [`LoraPart::magnitude`]. It scales the base products, too, so that products
    /// must be complete before they are added to the residual stream.
    fn scales(&self, lora: &LinearLora<'_, Self>) -> bool;
}

/// Sampling and scoring.
pub trait Sampling: Memory {
    /// Sampling state of the running sequences, by seat.
    type Sampler: Send;
    /// Results that are on their way to the host.
    type Pending: Send;

    /// Allocates sampling state for `seats` sequences and a vocabulary of `vocab` tokens.
    fn sampler(&self, seats: usize, vocab: usize) -> Result<Self::Sampler>;
    /// Gives a seat to a sequence, in place of the one that had it. `output` has the tokens that the sequence has
    /// generated already, so that penalties and draws of a preempted sequence continue where they stopped. Errors: an
    /// argument is wrong (see [`crate::Error::is_argument`]), in which case nothing has changed, or the device failed.
    fn seat(
        &self,
        sampler: &mut Self::Sampler,
        seat: u32,
        params: &SamplingParams,
        prompt: &[u32],
        output: &[u32],
    ) -> Result<()>;
    /// Samples one token for every row, and stores it as its seat's last token. It does not wait for the device: the
    /// next step may be launched before [`Self::collect`] returns the tokens.
    fn sample(
        &self,
        logits: &Self::Mat,
        rows: &[SampleRow],
        sampler: &mut Self::Sampler,
    ) -> Result<Self::Pending>;
    /// As [`Self::sample`], with a mask for each row that has one. A token that the mask allows is chosen, whatever the
    /// parameters and the logits are. Reported log-probabilities are those without the mask.
    fn sample_masked(
        &self,
        logits: &Self::Mat,
        rows: &[SampleRow],
        masks: &[Option<&TokenMask>],
        sampler: &mut Self::Sampler,
    ) -> Result<Self::Pending>;
    /// Scores tokens: for each `(row, token)`, computes the log-probability of the token under the row's logits, and
    /// the `num_top` most probable tokens of the row. The seats of the results are 0.
    fn score(&self, logits: &Self::Mat, targets: &[(u32, u32)], num_top: u32) -> Result<Self::Pending>;
    /// Waits for results, and appends them to `out` in the order of their rows.
    fn collect(&self, pending: Self::Pending, out: &mut Vec<Sampled>) -> Result<()>;
}
