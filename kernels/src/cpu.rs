//! The CPU backend.
//!
//! Weights are stored as f32 or bf16. All threads stream them once for each operation, and multiply them with whole
//! tiles of rows. `kernels/README.md` describes the layout.

mod attention;
mod elementwise;
mod gemm;
mod kv;
mod linear;
mod lookup;
mod lora;
mod memory;
mod pool;
mod ranks;
mod sampling;
mod simd;

use std::{
    ops::Deref,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use crate::{
    Activation, Adapters, Attention, Batch, DType, Embedding, Error, Group, Heads, HostTensor, LinearLora,
    LogitShape, LoraPart, LoraShape, LoraSite, Matrix, MatrixSource, Memory, Norm, Ops, Projection, Qkv,
    Result, RopeSpec, SampleRow, Sampled, Sampling, SamplingParams, Span, TokenMask, lora::readers::Readers,
};
pub use elementwise::CpuRope;
pub use kv::CpuKv;
pub use lora::{CpuAdapter, CpuSlots};
pub use memory::{CpuMat, Panels};
pub use sampling::CpuSampler;
pub use simd::Tier;

use memory::Arena;
use pool::Pool;
use ranks::Ranks;

/// The CPU of this machine.
pub struct CpuBackend {
    dtype: DType,
    tier: Tier,
    pool: Pool,
    scratch: Mutex<linear::Scratch>,
    arena: Mutex<Arena>,
    readers: Readers,
    group: Arc<Group>,
    /// What the ranks share; `None` if there is only one.
    ranks: Option<Mutex<Ranks>>,
}

/// A step's index data that has passed [`Batch::check`], on which the soundness of writes without a lock depends.
#[derive(Debug, Default)]
pub struct CpuBatch(Batch);

impl Deref for CpuBatch {
    type Target = Batch;

    fn deref(&self) -> &Batch {
        &self.0
    }
}

/// Bytes of the regions in which weights are allocated.
const REGION: usize = 32 << 20;

impl CpuBackend {
    /// Makes a backend that stores weights as `dtype` (f32 or bf16), and keys and values as f32 or f16. It computes on
    /// `threads` threads with the widest vector unit of this machine.
    pub fn new(dtype: DType, threads: usize) -> Result<CpuBackend> {
        let tier = Tier::available().last().copied().unwrap_or(Tier::Scalar);
        Self::with_tier(dtype, threads, tier)
    }

    /// Makes a backend that uses the vector unit of a given tier.
    pub fn with_tier(dtype: DType, threads: usize, tier: Tier) -> Result<CpuBackend> {
        let unsupported = |what: String| Err(Error::Unsupported { backend: "cpu", what });
        if dtype == DType::F16 {
            return unsupported("float16 (use bfloat16 or float32)".into());
        }
        if !Tier::available().contains(&tier) {
            return unsupported(format!("{tier:?} on this machine"));
        }
        let arena = Mutex::new(Arena::new(REGION));
        let (pool, scratch) = (Pool::new(threads.max(1))?, Mutex::default());
        let (readers, group) = (Readers::new(), Arc::new(Group::alone()));
        Ok(CpuBackend { dtype, tier, pool, scratch, arena, readers, group, ranks: None })
    }

    /// Makes the backend of one rank. Every rank of the group calls this at the same time.
    pub fn with_group(self, group: Arc<Group>) -> Result<CpuBackend> {
        let ranks = if group.ranks() > 1 { Some(Mutex::new(Ranks::new(group.clone())?)) } else { None };
        Ok(CpuBackend { group, ranks, ..self })
    }

    /// The vector unit in use.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// The number of threads that compute.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    fn scratch(&self) -> MutexGuard<'_, linear::Scratch> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory for CpuBackend {
    type Mat = CpuMat;
    type Weight = Panels;
    type Vector = Vec<f32>;
    type Rope = CpuRope;
    type Kv = CpuKv;
    type Batch = CpuBatch;
    type Mark = Instant;

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn mat(&self, rows: usize, cols: usize) -> Result<CpuMat> {
        CpuMat::new(rows, cols)
    }

    fn weight(&self, parts: &[HostTensor<'_>]) -> Result<Panels> {
        let mut arena = self.arena.lock().unwrap_or_else(PoisonError::into_inner);
        Panels::pack(&mut arena, self.dtype, parts)
    }

    fn weight_bytes(&self, weight: &Panels) -> usize {
        weight.bytes()
    }

    fn vector(&self, values: &[f32]) -> Result<Vec<f32>> {
        Ok(values.to_vec())
    }

    fn rope(&self, spec: &RopeSpec) -> Result<CpuRope> {
        Ok(CpuRope::new(spec))
    }

    fn kv(&self, blocks: usize, heads: Heads) -> Result<CpuKv> {
        if heads.kv == 0 || !heads.query.is_multiple_of(heads.kv) {
            return Err(Error::Unsupported { backend: "cpu", what: format!("attention with {heads:?}") });
        }
        CpuKv::new(self.dtype, blocks, heads)
    }

    fn kv_block_bytes(&self, heads: Heads) -> usize {
        CpuKv::block_bytes(self.dtype, heads)
    }

    fn batch(&self, _rows: usize, _blocks: usize, _spans: &[Span]) -> Result<CpuBatch> {
        Ok(CpuBatch::default())
    }

    fn upload(&self, host: &Batch, batch: &mut CpuBatch) -> Result<()> {
        host.check()?;
        batch.0.clone_from(host);
        Ok(())
    }

    fn download(&self, x: &CpuMat) -> Result<Vec<f32>> {
        Ok(x.used().to_vec())
    }

    fn fill(&self, x: &mut CpuMat, values: &[f32]) -> Result<()> {
        x.resize("fill", values.len().checked_div(x.cols()).unwrap_or(0))?;
        let (got, expected) = (values.len(), x.used().len());
        if got != expected {
            return Err(Error::Shape { op: "fill", what: "values", got, expected });
        }
        x.used_mut().copy_from_slice(values);
        Ok(())
    }

    fn mark(&self) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn reached(&self, _mark: &Instant) -> bool {
        true
    }

    fn seconds_between(&self, from: &Instant, to: &Instant) -> Result<f64> {
        Ok((*to - *from).as_secs_f64())
    }
}

impl Ops for CpuBackend {
    fn embed(
        &self,
        batch: &CpuBatch,
        sampler: &CpuSampler,
        by: Embedding<'_, Self>,
        y: &mut CpuMat,
    ) -> Result<()> {
        lookup::embed(self, batch, sampler, by, y)
    }

    fn matmul(&self, x: &CpuMat, by: Projection<'_, Self>, y: &mut CpuMat) -> Result<()> {
        linear::linear(self, x, by, linear::Sum::Store(y))
    }

    fn matmul_add(&self, x: &CpuMat, by: Projection<'_, Self>, y: &mut CpuMat) -> Result<()> {
        linear::linear(self, x, by, linear::Sum::Add(y))
    }

    fn add(&self, x: &CpuMat, post: Option<Norm<'_, Self>>, scale: f32, stream: &mut CpuMat) -> Result<()> {
        elementwise::add(self, x, post, scale, stream)
    }

    fn normalize(&self, x: &CpuMat, norm: Norm<'_, Self>, y: &mut CpuMat) -> Result<()> {
        elementwise::normalize(self, x, norm, y)
    }

    fn normalize_stream(&self, stream: &mut CpuMat, norm: Norm<'_, Self>, y: &mut CpuMat) -> Result<()> {
        elementwise::normalize_stream(self, stream, norm, y)
    }

    fn activate(&self, x: &CpuMat, f: Activation, y: &mut CpuMat) -> Result<()> {
        elementwise::activate(self, x, f, y)
    }

    fn gate(&self, x: &CpuMat, f: Activation, y: &mut CpuMat) -> Result<()> {
        elementwise::gate(self, x, f, y)
    }

    fn logits(&self, x: &CpuMat, by: Projection<'_, Self>, shape: LogitShape, y: &mut CpuMat) -> Result<()> {
        linear::linear(self, x, by, linear::Sum::Logits(y))?;
        elementwise::shape_logits(self, shape, y);
        Ok(())
    }

    fn rope_and_store(
        &self,
        qkv: &mut CpuMat,
        by: Qkv<'_, Self>,
        batch: &CpuBatch,
        kv: &mut CpuKv,
    ) -> Result<()> {
        kv::rope_and_store(self, qkv, by, batch, kv)
    }

    fn paged_attention(
        &self,
        qkv: &CpuMat,
        by: Attention<'_, Self>,
        batch: &CpuBatch,
        kv: &CpuKv,
        y: &mut CpuMat,
    ) -> Result<()> {
        attention::paged_attention(self, qkv, by, batch, kv, y)
    }

    fn gather_logit_rows(&self, x: &CpuMat, batch: &CpuBatch, y: &mut CpuMat) -> Result<()> {
        attention::gather(self, x, batch, y)
    }

    fn group(&self) -> &Arc<Group> {
        &self.group
    }

    fn all_reduce(&self, x: &mut CpuMat) -> Result<()> {
        match &self.ranks {
            None => Ok(()),
            Some(ranks) => ranks.lock().unwrap_or_else(PoisonError::into_inner).all_reduce(x.used_mut()),
        }
    }

    fn gather_columns(&self, x: &CpuMat, y: &mut CpuMat) -> Result<()> {
        y.resize("gather_columns", x.rows())?;
        let (own, cols) = (x.cols(), y.cols());
        match &self.ranks {
            None if own == cols => y.used_mut().copy_from_slice(x.used()),
            None => {
                let (op, what) = ("gather_columns", "columns of a rank");
                return Err(Error::Shape { op, what, got: own, expected: cols });
            }
            Some(ranks) => {
                let mut ranks = ranks.lock().unwrap_or_else(PoisonError::into_inner);
                ranks.gather_columns((x.used(), own), (y.used_mut(), cols))?;
            }
        }
        Ok(())
    }
}

impl Adapters for CpuBackend {
    type HostAdapter = CpuAdapter;
    type LoraSlots = CpuSlots;

    fn host_bytes(&self, sites: &[LoraSite], shapes: &[LoraShape]) -> Result<usize> {
        lora::bytes(self.dtype, sites, shapes)
    }

    fn stage<M: MatrixSource>(
        &self,
        sites: &[LoraSite],
        parts: &[LoraPart<M>],
    ) -> Result<CpuAdapter, M::Error> {
        CpuAdapter::stage(self, sites, parts)
    }

    fn adapter_bytes(&self, adapter: &CpuAdapter) -> usize {
        adapter.bytes
    }

    fn lora_slots(&self, sites: &[LoraSite], slots: usize) -> Result<CpuSlots> {
        let (loaded, waiting) = Default::default();
        Ok(CpuSlots { sites: sites.to_vec(), slots: vec![None; slots], loaded, waiting })
    }

    fn load(
        &self,
        slots: &mut CpuSlots,
        slot: u32,
        adapter: &Arc<CpuAdapter>,
        weights: &[&Panels],
    ) -> Result<()> {
        adapter.complete(self, &slots.sites, weights)?;
        slots.put("load", slot, Some(adapter.clone()))?;
        match adapter.partial_squares() {
            Some(squares) => {
                self.group.post(slot.into(), adapter.content, &squares)?;
                slots.waiting.push(slot);
            }
            None => slots.loaded.push(slot),
        }
        Ok(())
    }

    fn loaded(&self, slots: &mut CpuSlots) -> Result<Vec<u32>> {
        for slot in std::mem::take(&mut slots.waiting) {
            let adapter = slots.resident("loaded", slot)?;
            match self.group.posted(slot.into(), adapter.content) {
                Some(squares) => {
                    adapter.finish(&squares)?;
                    slots.loaded.push(slot);
                }
                None => slots.waiting.push(slot),
            }
        }
        Ok(std::mem::take(&mut slots.loaded))
    }

    fn unload(&self, slots: &mut CpuSlots, slot: u32) -> Result<()> {
        slots.put("unload", slot, None)
    }

    /// Products of rows with a magnitude are completed apart from the others.
    fn scales(&self, _lora: &LinearLora<'_, Self>) -> bool {
        false
    }
}

impl Sampling for CpuBackend {
    type Sampler = CpuSampler;
    type Pending = Vec<Sampled>;

    fn sampler(&self, seats: usize, vocab: usize) -> Result<CpuSampler> {
        Ok(CpuSampler::new(seats, vocab))
    }

    fn seat(
        &self,
        sampler: &mut CpuSampler,
        seat: u32,
        params: &SamplingParams,
        prompt: &[u32],
        output: &[u32],
    ) -> Result<()> {
        sampler.seat(seat, params, prompt, output)
    }

    fn sample(&self, logits: &CpuMat, rows: &[SampleRow], sampler: &mut CpuSampler) -> Result<Vec<Sampled>> {
        sampling::sample(self, logits, rows, &vec![None; rows.len()], sampler)
    }

    fn sample_masked(
        &self,
        logits: &CpuMat,
        rows: &[SampleRow],
        masks: &[Option<&TokenMask>],
        sampler: &mut CpuSampler,
    ) -> Result<Vec<Sampled>> {
        sampling::sample(self, logits, rows, masks, sampler)
    }

    fn score(&self, logits: &CpuMat, targets: &[(u32, u32)], num_top: u32) -> Result<Vec<Sampled>> {
        sampling::score(self, logits, targets, num_top)
    }

    fn collect(&self, pending: Vec<Sampled>, out: &mut Vec<Sampled>) -> Result<()> {
        out.extend(pending);
        Ok(())
    }
}
