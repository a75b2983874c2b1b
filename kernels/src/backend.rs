//! The contract between a model and a device: memory, operations, adapters, sampling.

use std::sync::Arc;

use crate::{
    Activation, Attention, Batch, DType, Embedding, Heads, HostTensor, LinearLora, LogitShape, LoraPart,
    LoraShape, LoraSite, Matrix, Norm, Output, Projection, Qkv, Result, RopeSpec, SampleRow, Sampled,
    SamplingParams, Span, TokenMask, compose,
};

/// A device and its kernels.
///
/// Activations are row-major `[rows, cols]`, one row a token position of the step, prefill and decode mixed. Weights
/// are `[out, in]`. Outputs are `&mut` arguments into memory allocated once: no operation allocates device memory.
/// Each operation sets the rows in use of its output. A row's result does not depend on the other rows of the step,
/// bit for bit, unless an implementation says otherwise.
pub trait Backend: Ops {}

impl<T: Ops> Backend for T {}

/// The memory of a device, and what lies in it.
pub trait Memory: Send + Sync + Sized + 'static {
    /// Activations.
    type Mat: Matrix + Send;
    /// A weight `[out, in]` in the layout that products read; also readable by rows for `embed`.
    type Weight: Send + Sync;
    /// A vector of f32: norm weights, biases.
    type Vector: Send + Sync;
    /// The angles of a rotary embedding.
    type Rope: Send + Sync;
    /// Keys and values of one layer, in blocks of [`crate::BLOCK_SIZE`] positions.
    type Kv: Send;
    /// A [`Batch`] on the device.
    type Batch: Send;
    /// A point in the work that was launched.
    type Mark: Send;

    /// The type of weights and of what KV memory takes (the CPU stores f16 beside bf16 weights: the same bytes).
    fn dtype(&self) -> DType;

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
    /// The angles of a rotary embedding.
    fn rope(&self, spec: &RopeSpec) -> Result<Self::Rope>;
    /// KV memory of one layer.
    fn kv(&self, blocks: usize, heads: Heads) -> Result<Self::Kv>;
    /// Bytes that one block of one layer takes in [`Self::kv`].
    fn kv_block_bytes(&self, heads: Heads) -> usize;
    /// An empty device batch for up to `rows` rows and `blocks` block table entries. Attention is planned once a step for
    /// each of `spans`.
    fn batch(&self, rows: usize, blocks: usize, spans: &[Span]) -> Result<Self::Batch>;
    /// Copies a step's index data to the device. Errors: indices that contradict each other.
    fn upload(&self, host: &Batch, batch: &mut Self::Batch) -> Result<()>;
    /// The rows in use as f32, row-major. For tests and prompt scoring, never on the path of a decode step.
    fn download(&self, x: &Self::Mat) -> Result<Vec<f32>>;
    /// Fills the matrix from row-major f32 `[rows, cols]` and sets its rows.
    fn fill(&self, x: &mut Self::Mat, values: &[f32]) -> Result<()>;

    /// Marks the present end of what was launched.
    fn mark(&self) -> Result<Self::Mark>;
    /// Whether all work before a mark is done, so that nothing of it is waited for any more. A failure of the device
    /// counts as done: whoever waits for the work reports it.
    fn reached(&self, mark: &Self::Mark) -> bool;
    /// Seconds on the device's clock from one mark to a later one, for which this waits.
    fn seconds_between(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64>;
}

/// The operations of a forward pass.
///
/// A model goes through [`Self::linear`], whose [`Output`] says what becomes of the products. A device implements the
/// operations below it, and overrides `linear` for the combinations that it fuses.
pub trait Ops: Adapters {
    /// Runs `ops`, all operations of one step but sampling. For one pair of device batch and numbers of rows, `ops` must
    /// always be the same operations on the same matrices: a device may capture them at first and replay them later.
    fn step(
        &self,
        batch: &Self::Batch,
        slots: &Self::LoraSlots,
        ops: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let _ = (batch, slots);
        ops()
    }

    /// The decode steps that this device captures, as (rows, runs of rows with an adapter): whoever runs each of them
    /// twice before serving spares the first requests that time.
    fn recorded_steps(&self) -> Vec<(usize, usize)> {
        Vec::new()
    }

    /// Numbers of rows, up to `max_rows`, of further steps that this device wants to run before serving: it times
    /// algorithms then, as it does in captured ones.
    fn warm_up_rows(&self, max_rows: usize) -> Vec<usize> {
        let _ = max_rows;
        Vec::new()
    }

    /// Semantics: `y[i] = by.scale · by.table[token(i)] + by.positions[position(i)]`, where a negative `batch.tokens[i]` is
    /// looked up in the sampler. What a row's adapter changes of the table, see [`LoraPart`], is changed before the row is
    /// scaled. `y` is the residual stream, a [`Memory::wide_mat`]. That each token has a row is the caller's promise, which a
    /// device need not check.
    fn embed(
        &self,
        batch: &Self::Batch,
        sampler: &Self::Sampler,
        by: Embedding<'_, Self>,
        y: &mut Self::Mat,
    ) -> Result<()>;

    /// The one operation that all weights go through: the products of [`Self::matmul`], put where `out` says.
    fn linear(&self, x: &Self::Mat, by: Projection<'_, Self>, out: Output<'_, Self>) -> Result<()> {
        compose::linear(self, x, by, out)
    }

    /// Semantics: `y[i] = x[i] · Wᵀ + bias`, and for every segment of `by.lora` with row i in it and every part of its
    /// adapter at this site what [`LoraPart`] says.
    fn matmul(&self, x: &Self::Mat, by: Projection<'_, Self>, y: &mut Self::Mat) -> Result<()>;

    /// As [`Self::matmul`], but the sums are added to what `y`, a [`Memory::wide_mat`] of as many rows as `x`, holds: without
    /// rounding in between. Not called where [`Adapters::scales`] says so.
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

    /// Semantics: `y[i, j] = f(x[i, j])`.
    fn activate(&self, x: &Self::Mat, f: Activation, y: &mut Self::Mat) -> Result<()>;

    /// Semantics: `y[i, j] = f(x[i, j]) · x[i, n + j]`, `x` `[rows, 2n]`, `y` `[rows, n]`.
    fn gate(&self, x: &Self::Mat, f: Activation, y: &mut Self::Mat) -> Result<()>;

    /// Semantics: as [`Self::matmul`], then `y[i, j] = cap(scale · y[i, j])`, see [`LogitShape`]. `y`, a
    /// [`Memory::wide_mat`], may have more columns than the base weight has rows. A logit is -∞ where neither the base
    /// model nor the row's adapter has a row for it, whatever the shape.
    fn logits(
        &self,
        x: &Self::Mat,
        by: Projection<'_, Self>,
        shape: LogitShape,
        y: &mut Self::Mat,
    ) -> Result<()>;

    /// Clamps, norms and rotates the queries and keys of `qkv` `[rows, (query + 2 · kv) · dim]` in place, as [`Qkv`] says
    /// and in its order, and stores keys and values at `batch.store_at`.
    fn rope_and_store(
        &self,
        qkv: &mut Self::Mat,
        by: Qkv<'_, Self>,
        batch: &Self::Batch,
        kv: &mut Self::Kv,
    ) -> Result<()>;

    /// Attention of each row over its sequence's stored keys and values.
    ///
    /// Semantics, for row i at position p, query head h and its key head `g = h / (query / kv)`, over the keys t that its
    /// span lets it see: `s[t] = softcap(scale · q[i, h] · K[t, g]) + slopes[h] · (t - p)`,
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

    // ---- the other ranks of a model ----

    /// How many ranks share the model.
    fn ranks(&self) -> usize {
        1
    }
    /// This one, from 0.
    fn rank(&self) -> usize {
        0
    }
    /// Semantics: `x = Σ over all ranks of x`, the same bits on every rank; `x` is a [`Memory::wide_mat`]. Like any other
    /// operation it is launched, and every rank launches the same ones in the same order.
    fn all_reduce(&self, x: &mut Self::Mat) -> Result<()> {
        let _ = x;
        Ok(())
    }
}

/// Low-rank adapters: from host memory to where products find them.
pub trait Adapters: Sampling {
    /// One adapter in host memory, laid out as on the device.
    type HostAdapter: Send + Sync;
    /// The resident adapters of all sites.
    type LoraSlots: Send;

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
    /// Begins to copy an adapter into a slot, without waiting for it. `weights` are those of the sites, in their order:
    /// what [`LoraPart::magnitude`] is divided by depends on them. Errors: [`crate::Error::OutOfMemory`] leaves the slot
    /// empty and the device usable.
    fn load(
        &self,
        slots: &mut Self::LoraSlots,
        slot: u32,
        adapter: &Arc<Self::HostAdapter>,
        weights: &[&Self::Weight],
    ) -> Result<()>;
    /// Slots whose copies have ended since the last call: rows may use them from the next step on.
    fn loaded(&self, slots: &mut Self::LoraSlots) -> Result<Vec<u32>>;
    /// Empties a slot. Steps already launched still see its adapter.
    fn unload(&self, slots: &mut Self::LoraSlots, slot: u32) -> Result<()>;
    /// Whether products must be complete before they are added to a sum, since some row's adapter has a
    /// [`LoraPart::magnitude`], which scales what the base weight gives, too.
    fn scales(&self, lora: &LinearLora<'_, Self>) -> bool;
}

/// Choosing tokens.
pub trait Sampling: Memory {
    /// Sampling state of the running sequences, by seat.
    type Sampler: Send;
    /// Choices on their way to the host.
    type Pending: Send;

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
    /// As [`Self::sample`], with a mask or none for each row: whatever the parameters and the logits are, a token that
    /// the row's mask allows is chosen. What is reported are still the probabilities without the mask.
    fn sample_masked(
        &self,
        logits: &Self::Mat,
        rows: &[SampleRow],
        masks: &[Option<&TokenMask>],
        sampler: &mut Self::Sampler,
    ) -> Result<Self::Pending>;
    /// The log-probability of `token` under the logits in `row`, for each `(row, token)`, and the `num_top` most
    /// probable tokens of that row. The seats of the answers are 0.
    fn score(&self, logits: &Self::Mat, targets: &[(u32, u32)], num_top: u32) -> Result<Self::Pending>;
    /// Waits for choices and appends them to `out`, in the order of their rows.
    fn collect(&self, pending: Self::Pending, out: &mut Vec<Sampled>) -> Result<()>;
}
