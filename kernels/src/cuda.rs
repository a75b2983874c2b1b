//! The backend for NVIDIA GPUs: kernels of our own (`csrc`) and cuBLASLt, on one stream and a branch of it, with adapters
//! copied beside them. The driver and cuBLASLt are opened at run time, so that a binary with this backend starts without
//! them.

mod attention;
mod batch;
mod comm;
mod convert;
mod device;
mod ffi;
mod gemm;
mod gpus;
mod graph;
mod linear;
mod lora;
mod memory;
mod norm;
mod ops;
mod pinned;
mod plan;
mod sampler;
mod staging;

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use cudarc::driver::sys::{CUdevice_attribute, CUstream};

use crate::{
    Adapters, Batch, DType, Error, Group, Heads, HostTensor, LinearLora, LoraPart, LoraShape, LoraSite,
    MatrixSource, Memory, Ops, Result, RopeSpec, SampleRow, Sampled, Sampling, SamplingParams, Span,
    TokenMask, lora::readers::Readers,
};
pub use batch::CudaBatch;
pub use comm::Transport;
pub use device::DeviceMemory;
pub use gpus::{Gpu, gpus};
pub use lora::{CudaAdapter, CudaSlots};
pub use memory::{CudaKv, CudaMat, CudaRope, CudaVector, CudaWeight};
pub use sampler::{CudaPending, CudaSampler};

use comm::Comm;
use device::{Branch, Device, Event, PoolBuf, Stream, launched};
use staging::Staging;

const BACKEND: &str = "cuda";

/// Pinned buffers for small data on its way to the GPU: two steps, each with as many new sequences as there are seats,
/// fill the ring without waiting for the steps before.
const STAGES: usize = 512;
/// A seat's data takes far less, a large step's indices a few of them.
const STAGE_BYTES: usize = 64 << 10;
/// Threads that can send weights at the same time.
const WEIGHT_STAGINGS: usize = 8;

fn unsupported(what: String) -> Error {
    Error::Unsupported { backend: BACKEND, what }
}

/// A point in the work that was launched on a GPU.
pub struct CudaMark(Event);

/// One NVIDIA GPU of compute capability 8.0 or newer.
///
/// A row's result may differ in its last bits with the shape of a step, which the choice of a kernel depends on: its
/// number of rows, whether any has an adapter, whether some adapter has gains or biases, the lengths of prompts. It does
/// not depend on what the other rows hold.
pub struct CudaBackend {
    dtype: DType,
    gemm: gemm::Gemm,
    graphs: graph::Graphs,
    partials: attention::Partials,
    /// Whether the GPU runs the kernels for Hopper.
    hopper: bool,
    multiprocessors: u32,
    /// The heads that there was KV memory for last: attention is divided for them.
    heads: Mutex<Heads>,
    launches: AtomicU64,
    reports: sampler::Reports,
    comm: Arc<Comm>,
    staging: Mutex<Staging>,
    weight_staging: Vec<Mutex<Staging>>,
    pinned: Arc<pinned::PinnedPool>,
    readers: Readers,
    /// All steps.
    stream: Arc<Stream>,
    /// Shrinks beside base products.
    branch: Branch,
    /// Adapters on their way to the GPU.
    copies: Stream,
    device: Arc<Device>,
}

impl CudaBackend {
    /// A backend on the GPU of a rank, usually that of the same number, that stores weights, activations and KV memory as
    /// `dtype` (bf16 or f16); one GPU a process, as kernels are set up once. Errors: what the machine lacks.
    pub fn new(dtype: DType, rank: usize) -> Result<CudaBackend> {
        let ordinal = gpus::ordinal_of(rank);
        gpus::gpu(dtype, ordinal)?;
        let device = Device::open(ordinal)?;
        device.keep_freed_memory()?;
        // SAFETY: asks the runtime about the current device.
        let hopper = unsafe { ffi::lorax_is_hopper() != 0 };
        Ok(CudaBackend {
            dtype,
            gemm: gemm::Gemm::new(&device, dtype)?,
            graphs: graph::Graphs::new(),
            partials: attention::Partials::new(&device)?,
            hopper,
            multiprocessors: device
                .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?
                .cast_unsigned(),
            heads: Mutex::new(Heads { query: 64, kv: 8, dim: 256 }),
            launches: AtomicU64::new(0),
            reports: sampler::Reports::new(&device)?,
            comm: Arc::new(Comm::alone(dtype, hopper)),
            staging: Mutex::new(Staging::new(&device, STAGES, STAGE_BYTES)?),
            weight_staging: (0..WEIGHT_STAGINGS)
                .map(|_| Ok(Mutex::new(Staging::new(&device, 2, 8 << 20)?)))
                .collect::<Result<_>>()?,
            pinned: pinned::PinnedPool::new(&device),
            readers: Readers::new(),
            stream: Arc::new(Stream::new(&device)?),
            branch: Branch::new(&device)?,
            copies: Stream::new(&device)?,
            device,
        })
    }

    /// The backend as a rank of a group. Every rank calls this at the same time, with a GPU of its own.
    pub fn with_group(self, group: Arc<Group>) -> Result<CudaBackend> {
        self.with_transport(group, Transport::Fastest)
    }

    /// As [`Self::with_group`], with a choice of the ways between the ranks.
    pub fn with_transport(mut self, group: Arc<Group>, transport: Transport) -> Result<CudaBackend> {
        self.device.bind()?;
        let (at, kind) = ((&self.device, &self.stream), (self.dtype, self.hopper));
        self.comm = Arc::new(Comm::join(group, transport, at, kind)?);
        self.stream.waits_for(&self.comm);
        Ok(self)
    }

    /// How matrices travel between the ranks, for a log.
    pub fn describe_transport(&self) -> String {
        self.comm.describe()
    }

    /// The GPU's name.
    pub fn name(&self) -> Result<String> {
        self.device.name()
    }

    /// The GPU's memory, free and in all.
    pub fn memory(&self) -> Result<DeviceMemory> {
        self.device.memory()
    }

    /// Kernels that were launched so far, those of replayed graphs left out.
    pub fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    /// Whether decode steps are captured as CUDA graphs, which they are unless this turns it off.
    pub fn capture_steps(&self, on: bool) {
        self.graphs.enable(on);
    }

    /// What the choices between algorithms of matrix products depend on: the GPU and the version of cuBLASLt.
    pub fn product_choices_of(&self) -> Result<String> {
        Ok(format!("{} {:?} cublasLt {}", self.name()?, self.dtype, gemm::Gemm::version()))
    }

    /// Has algorithms of matrix products timed, at the first launch of every size that `known`, an earlier result of
    /// [`Self::product_choices`] for the same GPU and version, does not have.
    pub fn time_products(&self, known: &str) -> Result<()> {
        self.gemm.learn(known)
    }

    /// Ends that: the choices that were made, a line each.
    pub fn product_choices(&self) -> String {
        self.gemm.learnt()
    }

    /// Waits until the GPU has done all that was launched.
    pub fn synchronize(&self) -> Result<()> {
        self.finish("synchronize")
    }

    /// Waits until the GPU has done all that was launched.
    fn finish(&self, op: &'static str) -> Result<()> {
        if self.ranks() == 1 {
            return self.stream.synchronize();
        }
        self.comm.wait_for(op, &self.stream.mark()?)
    }

    fn staging(&self) -> MutexGuard<'_, Staging> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that nobody uses now, if there is one.
    fn weight_staging(&self) -> MutexGuard<'_, Staging> {
        let idle = self.weight_staging.iter().find_map(|staging| staging.try_lock().ok());
        idle.unwrap_or_else(|| self.weight_staging[0].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Notes the heads that attention is divided for.
    fn remember(&self, heads: Heads) {
        *self.heads.lock().unwrap_or_else(PoisonError::into_inner) = heads;
    }

    fn cut(&self) -> plan::Cut {
        plan::Cut::new(*self.heads.lock().unwrap_or_else(PoisonError::into_inner), self.multiprocessors)
    }

    fn count_launch(&self) {
        self.launches.fetch_add(1, Ordering::Relaxed);
    }

    /// False while a captured step is replayed.
    fn is_launching(&self) -> bool {
        !self.graphs.is_replaying()
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
        self.count_launch();
        launched(op, run(ffi::elem(self.dtype), stream.raw()))
    }
}

impl Memory for CudaBackend {
    type Mat = CudaMat;
    type Weight = CudaWeight;
    type Vector = CudaVector;
    type Rope = CudaRope;
    type Kv = CudaKv;
    type Batch = CudaBatch;
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

    fn weight_bytes(&self, weight: &CudaWeight) -> usize {
        weight.outputs * weight.inputs * self.dtype.size()
    }

    fn vector(&self, values: &[f32]) -> Result<CudaVector> {
        CudaVector::new(self, values)
    }

    fn rope(&self, spec: &RopeSpec) -> Result<CudaRope> {
        CudaRope::new(self, spec)
    }

    fn kv(&self, blocks: usize, heads: Heads) -> Result<CudaKv> {
        CudaKv::new(self, blocks, heads)
    }

    fn kv_block_bytes(&self, heads: Heads) -> usize {
        2 * heads.kv * crate::BLOCK_SIZE * heads.dim * self.dtype.size()
    }

    fn batch(&self, rows: usize, blocks: usize, spans: &[Span]) -> Result<CudaBatch> {
        CudaBatch::new(self, rows, blocks, spans)
    }

    fn upload(&self, host: &Batch, batch: &mut CudaBatch) -> Result<()> {
        self.device.bind()?;
        self.pinned.count_step();
        batch.upload(self, host)
    }

    fn download(&self, x: &CudaMat) -> Result<Vec<f32>> {
        x.download(self)
    }

    fn fill(&self, x: &mut CudaMat, values: &[f32]) -> Result<()> {
        self.device.bind()?;
        x.fill(self, values)
    }

    fn mark(&self) -> Result<CudaMark> {
        self.device.bind()?;
        let event = Event::timed()?;
        event.record(&self.stream)?;
        Ok(CudaMark(event))
    }

    fn reached(&self, mark: &CudaMark) -> bool {
        mark.0.reached().unwrap_or(true) || self.comm.is_broken()
    }

    fn seconds_between(&self, from: &CudaMark, to: &CudaMark) -> Result<f64> {
        self.device.bind()?;
        self.comm.wait_for("seconds_between", &to.0)?;
        to.0.seconds_since(&from.0)
    }
}

impl Adapters for CudaBackend {
    type HostAdapter = CudaAdapter;
    type LoraSlots = CudaSlots;

    fn reserve_slots(&self, bytes: usize) {
        // The pool keeps what is freed. Without the memory, loads will tell which adapter has no room.
        let _ = PoolBuf::new(&self.stream, &self.stream, bytes, "adapters in slots");
    }

    fn expect_adapters(&self, most: usize, now: usize) {
        self.pinned.set_aside(most, now);
    }

    fn host_bytes(&self, sites: &[LoraSite], shapes: &[LoraShape]) -> Result<usize> {
        lora::host_bytes(self.dtype, sites, shapes)
    }

    fn stage<M: MatrixSource>(
        &self,
        sites: &[LoraSite],
        parts: &[LoraPart<M>],
    ) -> Result<CudaAdapter, M::Error> {
        CudaAdapter::stage(self, sites, parts)
    }

    fn adapter_bytes(&self, adapter: &CudaAdapter) -> usize {
        adapter.bytes()
    }

    fn lora_slots(&self, sites: &[LoraSite], slots: usize) -> Result<CudaSlots> {
        CudaSlots::new(self, sites, slots)
    }

    fn load(
        &self,
        slots: &mut CudaSlots,
        slot: u32,
        adapter: &Arc<CudaAdapter>,
        weights: &[&CudaWeight],
    ) -> Result<()> {
        slots.load(self, slot, adapter, weights)
    }

    fn loaded(&self, slots: &mut CudaSlots) -> Result<Vec<u32>> {
        slots.loaded(self)
    }

    fn unload(&self, slots: &mut CudaSlots, slot: u32) -> Result<()> {
        slots.unload(slot)
    }

    /// Answers for the whole step, whatever rows are asked for. A bias goes the same way as a magnitude.
    fn scales(&self, lora: &LinearLora<'_, Self>) -> bool {
        lora.slots.needs(lora.batch).affine
    }
}

impl Sampling for CudaBackend {
    type Sampler = CudaSampler;
    type Pending = CudaPending;

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
        sampler.sample(self, logits, rows, &vec![None; rows.len()])
    }

    fn sample_masked(
        &self,
        logits: &CudaMat,
        rows: &[SampleRow],
        masks: &[Option<&TokenMask>],
        sampler: &mut CudaSampler,
    ) -> Result<CudaPending> {
        sampler.sample(self, logits, rows, masks)
    }

    fn score(&self, logits: &CudaMat, targets: &[(u32, u32)], num_top: u32) -> Result<CudaPending> {
        sampler::score(self, logits, targets, num_top)
    }

    fn collect(&self, pending: CudaPending, out: &mut Vec<Sampled>) -> Result<()> {
        self.reports.collect(self, pending, out)
    }
}
