//! The backend for NVIDIA GPUs: kernels of our own (`csrc`) and cuBLASLt, on one stream and a branch of it, with adapters
//! copied beside them. The driver and cuBLASLt are opened at run time, so that a binary with this backend starts without
//! them.

mod attention;
mod batch;
mod convert;
mod device;
mod ffi;
mod gemm;
mod graph;
mod linear;
mod lora;
mod memory;
mod pinned;
mod plan;
mod sampler;
mod staging;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute, CUstream};

use crate::{
    Attention, Backend, Batch, DType, Error, Heads, HostTensor, LoraPart, LoraShape, LoraSite, Matrix,
    Projection, Result, RowSet, SampleRow, Sampled, SamplingParams, TokenMask,
};
pub use batch::CudaBatch;
pub use device::DeviceMemory;
pub use lora::{CudaAdapter, CudaSlots};
pub use memory::{CudaKv, CudaMat, CudaRope, CudaVector, CudaWeight};
pub use sampler::{CudaPending, CudaSampler};

use device::{Branch, Device, Event, Stream, launched};
use staging::Staging;

const BACKEND: &str = "cuda";

/// Pinned buffers for small data on its way to the card: two steps, each with as many new sequences as there are seats,
/// fill the ring without waiting for the steps before.
const STAGES: usize = 512;
/// A seat's data takes far less, a large step's indices a few of them.
const STAGE_BYTES: usize = 64 << 10;
/// Threads that can send weights at the same time.
const WEIGHT_STAGINGS: usize = 8;

fn unsupported(what: String) -> Error {
    Error::Unsupported { backend: BACKEND, what }
}

/// A point in the work that was launched on a card.
pub struct CudaMark(Event);

/// One NVIDIA GPU of compute capability 8.0 or newer.
///
/// A row's result may differ in its last bits with the shape of a step, which the choice of a kernel depends on: its
/// number of rows, whether any has an adapter, the lengths of prompts. It does not depend on what the other rows hold.
pub struct CudaBackend {
    dtype: DType,
    gemm: gemm::Gemm,
    recorder: graph::Recorder,
    partials: attention::Partials,
    /// Whether the card runs the kernels for Hopper.
    hopper: bool,
    reports: sampler::Reports,
    staging: Mutex<Staging>,
    weight_staging: Vec<Mutex<Staging>>,
    pinned: Arc<pinned::PinnedPool>,
    /// All steps.
    stream: Arc<Stream>,
    /// Shrinks beside base products.
    branch: Branch,
    /// Adapters on their way to the card.
    copies: Stream,
    device: Arc<Device>,
}

impl CudaBackend {
    /// A backend on card `ordinal` that stores weights, activations and KV memory as `dtype` (bf16 or f16); one card a
    /// process, as kernels are set up once. Errors: what the machine lacks.
    pub fn new(dtype: DType, ordinal: usize) -> Result<CudaBackend> {
        if dtype == DType::F32 {
            return Err(unsupported("float32 (use bfloat16 or float16)".into()));
        }
        let device = Device::open(ordinal)?;
        let major = device.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        if major < 8 {
            return Err(unsupported(format!("{} (compute capability {major}, below 8)", device.name()?)));
        }
        device.keep_freed_memory()?;
        Ok(CudaBackend {
            dtype,
            gemm: gemm::Gemm::new(&device, dtype)?,
            recorder: graph::Recorder::new(),
            partials: attention::Partials::new(&device)?,
            // SAFETY: asks the runtime about the current device.
            hopper: unsafe { ffi::lorax_is_hopper() != 0 },
            reports: sampler::Reports::new(&device)?,
            staging: Mutex::new(Staging::new(&device, STAGES, STAGE_BYTES)?),
            weight_staging: (0..WEIGHT_STAGINGS)
                .map(|_| Ok(Mutex::new(Staging::new(&device, 2, 8 << 20)?)))
                .collect::<Result<_>>()?,
            pinned: pinned::PinnedPool::new(&device),
            stream: Arc::new(Stream::new(&device)?),
            branch: Branch::new(&device)?,
            copies: Stream::new(&device)?,
            device,
        })
    }

    /// The card's name.
    pub fn name(&self) -> Result<String> {
        self.device.name()
    }

    /// The card's memory, free and in all.
    pub fn memory(&self) -> Result<DeviceMemory> {
        self.device.memory()
    }

    /// Whether decode steps are recorded as CUDA graphs, which they are unless this turns it off.
    pub fn record_steps(&self, on: bool) {
        self.recorder.enable(on);
    }

    /// What the choices between algorithms of matrix products depend on: the card and the version of cuBLASLt.
    pub fn product_choices_of(&self) -> Result<String> {
        Ok(format!("{} {:?} cublasLt {}", self.name()?, self.dtype, gemm::Gemm::version()))
    }

    /// Has algorithms of matrix products timed, at the first launch of every size that `known`, an earlier result of
    /// [`Self::product_choices`] for the same card and version, does not have.
    pub fn time_products(&self, known: &str) -> Result<()> {
        self.gemm.learn(known)
    }

    /// Ends that: the choices that were made, a line each.
    pub fn product_choices(&self) -> String {
        self.gemm.learnt()
    }

    /// Waits until the card has done all that was launched.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize()
    }

    fn staging(&self) -> MutexGuard<'_, Staging> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that nobody uses now, if there is one.
    fn weight_staging(&self) -> MutexGuard<'_, Staging> {
        let idle = self.weight_staging.iter().find_map(|staging| staging.try_lock().ok());
        idle.unwrap_or_else(|| self.weight_staging[0].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// False while a recorded step is replayed.
    fn is_launching(&self) -> bool {
        !self.recorder.is_replaying()
    }

    /// Runs a launcher with the element type and the stream of the steps, unless there is nothing to compute.
    fn launch(&self, op: &'static str, count: usize, run: impl FnOnce(i32, CUstream) -> i32) -> Result<()> {
        self.launch_on(&self.stream, op, count, run)
    }

    /// As [`Self::launch`], with another stream.
    fn launch_on(
        &self,
        stream: &Stream,
        op: &'static str,
        count: usize,
        run: impl FnOnce(i32, CUstream) -> i32,
    ) -> Result<()> {
        if count == 0 || !self.is_launching() {
            return Ok(());
        }
        self.device.bind()?;
        launched(op, run(ffi::elem(self.dtype), stream.raw()))
    }
}

impl Backend for CudaBackend {
    type Mat = CudaMat;
    type Weight = CudaWeight;
    type Vector = CudaVector;
    type Rope = CudaRope;
    type Kv = CudaKv;
    type Batch = CudaBatch;
    type HostAdapter = CudaAdapter;
    type LoraSlots = CudaSlots;
    type Sampler = CudaSampler;
    type Pending = CudaPending;
    type Mark = CudaMark;

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn mat(&self, rows: usize, cols: usize) -> Result<CudaMat> {
        CudaMat::new(self, self.dtype, rows, cols)
    }

    fn wide_mat(&self, rows: usize, cols: usize) -> Result<CudaMat> {
        CudaMat::new(self, DType::F32, rows, cols)
    }

    fn weight(&self, parts: &[HostTensor<'_>]) -> Result<CudaWeight> {
        CudaWeight::new(self, parts)
    }

    fn vector(&self, values: &[f32]) -> Result<CudaVector> {
        CudaVector::new(self, values)
    }

    fn rope(&self, inv_freq: &[f32], positions: usize, scale: f32) -> Result<CudaRope> {
        CudaRope::new(self, inv_freq, positions, scale)
    }

    fn kv(&self, blocks: usize, heads: Heads) -> Result<CudaKv> {
        CudaKv::new(self, blocks, heads)
    }

    fn kv_block_bytes(&self, heads: Heads) -> usize {
        2 * heads.kv * crate::BLOCK_SIZE * heads.dim * self.dtype.size()
    }

    fn batch(&self, rows: usize, blocks: usize) -> Result<CudaBatch> {
        CudaBatch::new(self, rows, blocks)
    }

    fn upload(&self, host: &Batch, batch: &mut CudaBatch) -> Result<()> {
        self.device.bind()?;
        batch.upload(self, host)
    }

    fn download(&self, x: &CudaMat) -> Result<Vec<f32>> {
        x.download(self)
    }

    fn fill(&self, x: &mut CudaMat, values: &[f32]) -> Result<()> {
        self.device.bind()?;
        x.fill(self, values)
    }

    fn expect_adapters(&self, most: usize, now: usize) {
        self.pinned.set_aside(most, now);
    }

    fn host_bytes(&self, sites: &[LoraSite], shapes: &[LoraShape]) -> Result<usize> {
        lora::host_bytes(self.dtype, sites, shapes)
    }

    fn stage(&self, sites: &[LoraSite], parts: &[LoraPart]) -> Result<CudaAdapter> {
        CudaAdapter::new(self, sites, parts)
    }

    fn adapter_bytes(&self, adapter: &CudaAdapter) -> usize {
        adapter.bytes()
    }

    fn lora_slots(&self, sites: &[LoraSite], slots: usize) -> Result<CudaSlots> {
        CudaSlots::new(self, sites, slots)
    }

    fn load(&self, slots: &mut CudaSlots, slot: u32, adapter: &Arc<CudaAdapter>) -> Result<()> {
        slots.load(self, slot, adapter)
    }

    fn loaded(&self, slots: &mut CudaSlots) -> Result<Vec<u32>> {
        slots.loaded(self)
    }

    fn unload(&self, slots: &mut CudaSlots, slot: u32) -> Result<()> {
        slots.unload(slot)
    }

    fn step(&self, batch: &CudaBatch, ops: impl FnOnce() -> Result<()>) -> Result<()> {
        self.device.bind()?;
        self.recorder.step(&self.stream, batch, ops)
    }

    fn mark(&self) -> Result<CudaMark> {
        self.device.bind()?;
        let event = Event::timed()?;
        event.record(&self.stream)?;
        Ok(CudaMark(event))
    }

    fn reached(&self, mark: &CudaMark) -> bool {
        mark.0.reached().unwrap_or(true)
    }

    fn seconds_between(&self, from: &CudaMark, to: &CudaMark) -> Result<f64> {
        self.device.bind()?;
        to.0.synchronize()?;
        to.0.seconds_since(&from.0)
    }

    fn recorded_steps(&self) -> Vec<(usize, usize)> {
        if self.recorder.is_enabled() { batch::recorded_steps() } else { Vec::new() }
    }

    fn warm_up_rows(&self, max_rows: usize) -> Vec<usize> {
        if self.gemm.is_learning() { gemm::classes(max_rows) } else { Vec::new() }
    }

    fn embed(
        &self,
        batch: &CudaBatch,
        sampler: &CudaSampler,
        table: &CudaWeight,
        y: &mut CudaMat,
    ) -> Result<()> {
        let op = "embed";
        y.expect_wide(op)?;
        y.expect_cols(op, "columns of y", table.inputs)?;
        for (what, largest, limit) in
            [("token", batch.largest.token, table.outputs), ("seat", batch.largest.seat, sampler.seats)]
        {
            if let Some(index) = largest.filter(|&index| index >= limit) {
                return Err(Error::Index { op, what, index, limit });
            }
        }
        y.resize(op, batch.rows_within(RowSet::All, y.capacity()))?;
        let (rows, cols) = (y.rows() as i32, y.cols() as i32);
        // SAFETY: shapes and the largest indices were checked.
        self.launch(op, y.rows(), |elem, stream| unsafe {
            let (tokens, last, table) = (batch.at.tokens, sampler.last.at(), table.buffer.at());
            ffi::lorax_embed(elem, tokens, last, table, y.at(), rows, cols, stream)
        })
    }

    fn linear(&self, x: &CudaMat, by: Projection<'_, Self>, y: &mut CudaMat) -> Result<()> {
        linear::linear(self, x, by, (y, false))
    }

    fn add_linear(&self, x: &CudaMat, by: Projection<'_, Self>, y: &mut CudaMat) -> Result<()> {
        linear::linear(self, x, by, (y, true))
    }

    fn add_linear_norm(
        &self,
        x: &CudaMat,
        by: Projection<'_, Self>,
        residual: &mut CudaMat,
        norm: (&CudaVector, f32),
        y: &mut CudaMat,
    ) -> Result<()> {
        linear::add_linear_norm(self, x, by, residual, (norm, y))
    }

    fn gated_linear(
        &self,
        x: &CudaMat,
        by: Projection<'_, Self>,
        gate_up: &mut CudaMat,
        y: &mut CudaMat,
    ) -> Result<()> {
        linear::gated_linear(self, x, by, (gate_up, y))
    }

    fn rms_norm(&self, x: &CudaMat, w: &CudaVector, eps: f32, y: &mut CudaMat) -> Result<()> {
        let op = "rms_norm";
        linear::expect_norm(x, w, y)?;
        y.resize(op, x.rows())?;
        let (rows, cols) = (x.rows() as i32, x.cols() as i32);
        // SAFETY: shapes were checked.
        self.launch(op, x.rows(), |elem, stream| unsafe {
            ffi::lorax_rms_norm(elem, x.at(), w.buffer.at(), y.at(), rows, cols, eps, stream)
        })
    }

    fn rope_and_store(
        &self,
        qkv: &mut CudaMat,
        heads: Heads,
        rope: &CudaRope,
        batch: &CudaBatch,
        kv: &mut CudaKv,
    ) -> Result<()> {
        if heads != kv.heads {
            return Err(unsupported(format!("storing {heads:?} in memory for {:?}", kv.heads)));
        }
        attention::rope_and_store(self, qkv, rope, batch, kv)
    }

    fn paged_attention(
        &self,
        qkv: &CudaMat,
        attention: &Attention,
        batch: &CudaBatch,
        kv: &CudaKv,
        y: &mut CudaMat,
    ) -> Result<()> {
        attention::paged_attention(self, qkv, attention, batch, (kv, y))
    }

    fn silu_mul(&self, gate_up: &CudaMat, y: &mut CudaMat) -> Result<()> {
        let op = "silu_mul";
        gate_up.expect_half(op)?;
        y.expect_half(op)?;
        gate_up.expect_cols(op, "columns of x", 2 * y.cols())?;
        y.resize(op, gate_up.rows())?;
        let (rows, cols) = (y.rows() as i32, y.cols() as i32);
        // SAFETY: shapes were checked.
        self.launch(op, y.rows(), |elem, stream| unsafe {
            ffi::lorax_silu_mul(elem, gate_up.at(), y.at(), rows, cols, stream)
        })
    }

    fn gather_logit_rows(&self, x: &CudaMat, batch: &CudaBatch, y: &mut CudaMat) -> Result<()> {
        let op = "gather_logit_rows";
        x.expect_half(op)?;
        y.expect_half(op)?;
        y.expect_cols(op, "columns of y", x.cols())?;
        batch.expect_rows(op, RowSet::All, x.rows())?;
        y.resize(op, batch.rows_within(RowSet::Logits, y.capacity()))?;
        let (rows, cols) = (y.rows() as i32, y.cols() as i32);
        // SAFETY: shapes were checked here, indices at the upload.
        self.launch(op, y.rows(), |elem, stream| unsafe {
            ffi::lorax_gather(elem, x.at(), batch.at.logit_rows, y.at(), rows, cols, stream)
        })
    }

    fn sampler(&self, seats: usize, vocab: usize) -> Result<CudaSampler> {
        CudaSampler::new(self, seats, vocab)
    }

    fn seat(
        &self,
        sampler: &mut CudaSampler,
        seat: u32,
        params: &SamplingParams,
        prompt: &[u32],
        output: &[u32],
    ) -> Result<()> {
        sampler.seat(self, seat, params, (prompt, output))
    }

    fn sample(&self, logits: &CudaMat, rows: &[SampleRow], sampler: &mut CudaSampler) -> Result<CudaPending> {
        sampler.sample(self, logits, rows)
    }

    fn sample_masked(
        &self,
        logits: &CudaMat,
        rows: &[SampleRow],
        masks: &[Option<&TokenMask>],
        sampler: &mut CudaSampler,
    ) -> Result<CudaPending> {
        if masks.iter().any(Option::is_some) {
            return Err(unsupported("sampling with a mask".into()));
        }
        sampler.sample(self, logits, rows)
    }

    fn score(&self, logits: &CudaMat, targets: &[(u32, u32)], num_top: u32) -> Result<CudaPending> {
        sampler::score(self, logits, targets, num_top)
    }

    fn collect(&self, pending: CudaPending, out: &mut Vec<Sampled>) -> Result<()> {
        self.reports.collect(pending, out)
    }
}
