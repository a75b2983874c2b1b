//! The CPU's backend with the faults and delays that a test asks for.
#![allow(dead_code, reason = "each program of tests uses a part of it")]

use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex, MutexGuard},
};

use kernels::{
    Activation, Adapters, Attention, Batch, CapturedStep, DType, Embedding, Error, Group, Heads, HostTensor,
    LinearLora, LogitShape, LoraPart, LoraShape, LoraSite, MatrixSource, Memory, Norm, Ops, PeerFault,
    Projection, QkNorms, Qkv, Result, RopeSpec, Rotation, SampleRow, Sampled, Sampling, SamplingParams, Span,
    TokenMask,
    cpu::{CpuAdapter, CpuBackend, CpuBatch, CpuKv, CpuMat, CpuRope, CpuSampler, CpuSlots, Panels},
};

/// What happens in place of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The device has no memory.
    OutOfMemory,
    /// The device fails.
    Device,
    /// Another rank is not there.
    Peer(PeerFault),
    /// The device cannot compute with these arguments.
    Unsupported,
    /// An argument does not have the shape that the device needs.
    Shape,
    /// An argument has an index that the device does not have.
    Index,
    /// The thread panics.
    Panic,
    /// The operation does not return before it is mended.
    Hang,
}

/// What a test has asked for.
#[derive(Default)]
struct State {
    faults: HashMap<&'static str, Fault>,
    /// The device does not get further than this many marks, if it is held.
    held_at: Option<u64>,
    marks: u64,
    counts: HashMap<&'static str, usize>,
    piece: usize,
    captured: Vec<CapturedStep>,
    lengths: Vec<u32>,
}

/// The test's hold on a backend.
#[derive(Clone, Default)]
pub(crate) struct Script(Arc<(Mutex<State>, Condvar)>);

impl Script {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap()
    }

    /// Has an operation end so from now on.
    pub(crate) fn fail(&self, op: &'static str, fault: Fault) {
        self.state().faults.insert(op, fault);
    }

    /// Has an operation succeed again.
    pub(crate) fn mend(&self, op: &'static str) {
        self.state().faults.remove(op);
        self.0.1.notify_all();
    }

    /// How often an operation was asked for.
    pub(crate) fn count(&self, op: &'static str) -> usize {
        self.state().counts.get(op).copied().unwrap_or(0)
    }

    /// Has adapters take multiples of so many bytes of host memory.
    pub(crate) fn set_piece(&self, bytes: usize) {
        self.state().piece = bytes;
    }

    /// Has the device capture these decode steps.
    pub(crate) fn set_captured(&self, steps: &[CapturedStep]) {
        self.state().captured = steps.into();
    }

    /// The lengths that the rotary scaling of the last step's rows goes by.
    pub(crate) fn lengths(&self) -> Vec<u32> {
        self.state().lengths.clone()
    }

    /// Lets the device finish nothing that is launched from now on.
    pub(crate) fn hold(&self) {
        let mut state = self.state();
        state.held_at = Some(state.marks);
    }

    /// Lets the device finish one more mark.
    pub(crate) fn step(&self) {
        let mut state = self.state();
        state.held_at = state.held_at.map(|at| at + 1);
        self.0.1.notify_all();
    }

    /// Lets the device finish everything.
    pub(crate) fn release(&self) {
        self.state().held_at = None;
        self.0.1.notify_all();
    }

    /// Marks so far: two a step.
    pub(crate) fn marks(&self) -> u64 {
        self.state().marks
    }

    fn at(&self, op: &'static str) -> Result<()> {
        let mut state = self.state();
        *state.counts.entry(op).or_default() += 1;
        let fault = state.faults.get(op).copied();
        drop(state);
        match fault {
            None => Ok(()),
            Some(Fault::OutOfMemory) => Err(Error::OutOfMemory { bytes: 77, what: "a test" }),
            Some(Fault::Unsupported) => {
                Err(Error::Unsupported { backend: "test", what: format!("this argument of {op}") })
            }
            Some(Fault::Shape) => Err(Error::Shape { op, what: "a test", got: 1, expected: 2 }),
            Some(Fault::Index) => Err(Error::Index { op, what: "test", index: 9, limit: 8 }),
            Some(Fault::Device) => Err(Error::Device { op, library: "test", code: 7 }),
            Some(Fault::Peer(fault)) => Err(Error::Peer { op, rank: 1, fault }),
            Some(Fault::Panic) => panic!("the test's panic in {op}"),
            Some(Fault::Hang) => {
                let hangs = |state: &mut State| state.faults.contains_key(op);
                drop(self.0.1.wait_while(self.state(), hangs).unwrap());
                Ok(())
            }
        }
    }
}

/// A point in the work that was launched, by its number.
pub(crate) struct Mark(u64);

/// Time on this device's clock between neighbouring marks, in seconds.
pub(crate) const TICK: f64 = 1e-3;

/// See the module.
pub(crate) struct Fake {
    cpu: CpuBackend,
    script: Script,
}

impl Fake {
    pub(crate) fn new(script: Script) -> Fake {
        Fake { cpu: CpuBackend::new(DType::F32, 1).unwrap(), script }
    }
}

fn lora_on_cpu<'a>(lora: LinearLora<'a, Fake>) -> LinearLora<'a, CpuBackend> {
    let LinearLora { slots, site, batch, rows } = lora;
    LinearLora { slots, site, batch, rows }
}

fn on_cpu<'a>(by: Projection<'a, Fake>) -> Projection<'a, CpuBackend> {
    Projection { weight: by.weight, bias: by.bias, lora: by.lora.map(lora_on_cpu) }
}

fn norm_on_cpu<'a>(norm: Norm<'a, Fake>) -> Norm<'a, CpuBackend> {
    let Norm { kind, weight, bias, eps } = norm;
    Norm { kind, weight, bias, eps }
}

impl Memory for Fake {
    type Mat = CpuMat;
    type Weight = Panels;
    type Vector = Vec<f32>;
    type Rope = CpuRope;
    type Kv = CpuKv;
    type Batch = CpuBatch;
    type Mark = Mark;

    fn dtype(&self) -> DType {
        self.cpu.dtype()
    }

    fn mat(&self, rows: usize, cols: usize) -> Result<CpuMat> {
        self.cpu.mat(rows, cols)
    }

    fn weight(&self, parts: &[HostTensor<'_>]) -> Result<Panels> {
        self.cpu.weight(parts)
    }

    fn weight_bytes(&self, weight: &Panels) -> usize {
        self.cpu.weight_bytes(weight)
    }

    fn vector(&self, values: &[f32]) -> Result<Vec<f32>> {
        self.cpu.vector(values)
    }

    fn rope(&self, spec: &RopeSpec) -> Result<CpuRope> {
        self.cpu.rope(spec)
    }

    fn kv(&self, blocks: usize, heads: Heads) -> Result<CpuKv> {
        self.cpu.kv(blocks, heads)
    }

    fn kv_block_bytes(&self, heads: Heads) -> usize {
        self.cpu.kv_block_bytes(heads)
    }

    fn batch(&self, rows: usize, blocks: usize, spans: &[Span]) -> Result<CpuBatch> {
        self.cpu.batch(rows, blocks, spans)
    }

    fn upload(&self, host: &Batch, batch: &mut CpuBatch) -> Result<()> {
        self.script.at("upload")?;
        self.script.state().lengths.clone_from(&host.lengths);
        self.cpu.upload(host, batch)
    }

    fn download(&self, x: &CpuMat) -> Result<Vec<f32>> {
        self.cpu.download(x)
    }

    fn fill(&self, x: &mut CpuMat, values: &[f32]) -> Result<()> {
        self.cpu.fill(x, values)
    }

    fn mark(&self) -> Result<Mark> {
        self.script.at("mark")?;
        let mut state = self.script.state();
        state.marks += 1;
        Ok(Mark(state.marks))
    }

    fn reached(&self, mark: &Mark) -> bool {
        self.script.state().held_at.is_none_or(|at| mark.0 <= at)
    }

    fn seconds_between(&self, from: &Mark, to: &Mark) -> Result<f64> {
        self.script.at("seconds_between")?;
        let held = |state: &mut State| state.held_at.is_some_and(|at| to.0 > at);
        let state = self.script.0.1.wait_while(self.script.state(), held).unwrap();
        drop(state);
        Ok((to.0 - from.0) as f64 * TICK)
    }
}

impl Ops for Fake {
    fn normalize_stream(&self, stream: &mut CpuMat, norm: Norm<'_, Self>, y: &mut CpuMat) -> Result<()> {
        self.cpu.normalize_stream(stream, norm_on_cpu(norm), y)
    }

    fn captured_steps(&self) -> Vec<CapturedStep> {
        self.script.state().captured.clone()
    }

    fn embed(
        &self,
        batch: &CpuBatch,
        sampler: &CpuSampler,
        by: Embedding<'_, Self>,
        y: &mut CpuMat,
    ) -> Result<()> {
        self.script.at("embed")?;
        let Embedding { table, scale, positions, lora } = by;
        self.cpu.embed(batch, sampler, Embedding { table, scale, positions, lora: lora.map(lora_on_cpu) }, y)
    }

    fn matmul(&self, x: &CpuMat, by: Projection<'_, Self>, y: &mut CpuMat) -> Result<()> {
        self.cpu.matmul(x, on_cpu(by), y)
    }

    fn matmul_add(&self, x: &CpuMat, by: Projection<'_, Self>, y: &mut CpuMat) -> Result<()> {
        self.cpu.matmul_add(x, on_cpu(by), y)
    }

    fn add(&self, x: &CpuMat, post: Option<Norm<'_, Self>>, scale: f32, stream: &mut CpuMat) -> Result<()> {
        self.cpu.add(x, post.map(norm_on_cpu), scale, stream)
    }

    fn normalize(&self, x: &CpuMat, norm: Norm<'_, Self>, y: &mut CpuMat) -> Result<()> {
        self.cpu.normalize(x, norm_on_cpu(norm), y)
    }

    fn activate(&self, x: &CpuMat, f: Activation, y: &mut CpuMat) -> Result<()> {
        self.cpu.activate(x, f, y)
    }

    fn gate(&self, x: &CpuMat, f: Activation, y: &mut CpuMat) -> Result<()> {
        self.cpu.gate(x, f, y)
    }

    fn logits(&self, x: &CpuMat, by: Projection<'_, Self>, shape: LogitShape, y: &mut CpuMat) -> Result<()> {
        self.cpu.logits(x, on_cpu(by), shape, y)
    }

    fn rope_and_store(
        &self,
        qkv: &mut CpuMat,
        by: Qkv<'_, Self>,
        batch: &CpuBatch,
        kv: &mut CpuKv,
    ) -> Result<()> {
        let Qkv { heads, clamp, norms, rope } = by;
        let norms = norms.map(|QkNorms { query, key, over }| QkNorms {
            query: norm_on_cpu(query),
            key: norm_on_cpu(key),
            over,
        });
        let rope = rope.map(|Rotation { table, pairs }| Rotation { table, pairs });
        self.cpu.rope_and_store(qkv, Qkv { heads, clamp, norms, rope }, batch, kv)
    }

    fn paged_attention(
        &self,
        qkv: &CpuMat,
        by: Attention<'_, Self>,
        batch: &CpuBatch,
        kv: &CpuKv,
        y: &mut CpuMat,
    ) -> Result<()> {
        let Attention { shape, sinks, slopes } = by;
        self.cpu.paged_attention(qkv, Attention { shape, sinks, slopes }, batch, kv, y)
    }

    fn gather_logit_rows(&self, x: &CpuMat, batch: &CpuBatch, y: &mut CpuMat) -> Result<()> {
        self.cpu.gather_logit_rows(x, batch, y)
    }

    fn group(&self) -> &Arc<Group> {
        self.cpu.group()
    }

    fn all_reduce(&self, x: &mut CpuMat) -> Result<()> {
        self.cpu.all_reduce(x)
    }

    fn gather_columns(&self, x: &CpuMat, y: &mut CpuMat) -> Result<()> {
        self.cpu.gather_columns(x, y)
    }
}

impl Adapters for Fake {
    type HostAdapter = CpuAdapter;
    type LoraSlots = CpuSlots;

    fn host_bytes(&self, sites: &[LoraSite], shapes: &[LoraShape]) -> Result<usize> {
        let piece = self.script.state().piece.max(1);
        Ok(self.cpu.host_bytes(sites, shapes)?.next_multiple_of(piece))
    }

    fn stage<M: MatrixSource>(
        &self,
        sites: &[LoraSite],
        parts: &[LoraPart<M>],
    ) -> Result<CpuAdapter, M::Error> {
        self.script.at("stage")?;
        if parts.iter().any(|part| part.bias.is_some()) {
            self.script.at("stage a bias")?;
        }
        self.cpu.stage(sites, parts)
    }

    fn adapter_bytes(&self, adapter: &CpuAdapter) -> usize {
        self.cpu.adapter_bytes(adapter)
    }

    fn lora_slots(&self, sites: &[LoraSite], slots: usize) -> Result<CpuSlots> {
        self.cpu.lora_slots(sites, slots)
    }

    fn load(
        &self,
        slots: &mut CpuSlots,
        slot: u32,
        adapter: &Arc<CpuAdapter>,
        weights: &[&Panels],
    ) -> Result<()> {
        self.cpu.unload(slots, slot)?;
        self.script.at("load")?;
        self.cpu.load(slots, slot, adapter, weights)
    }

    fn loaded(&self, slots: &mut CpuSlots) -> Result<Vec<u32>> {
        // A copy that does not end holds nobody up.
        if self.script.state().faults.get("loaded") == Some(&Fault::Hang) {
            return Ok(Vec::new());
        }
        self.script.at("loaded")?;
        self.cpu.loaded(slots)
    }

    fn unload(&self, slots: &mut CpuSlots, slot: u32) -> Result<()> {
        self.cpu.unload(slots, slot)
    }

    fn scales(&self, lora: &LinearLora<'_, Self>) -> bool {
        self.cpu.scales(&lora_on_cpu(*lora))
    }
}

impl Sampling for Fake {
    type Sampler = CpuSampler;
    type Pending = Vec<Sampled>;

    fn sampler(&self, seats: usize, vocab: usize) -> Result<CpuSampler> {
        self.cpu.sampler(seats, vocab)
    }

    fn seat(
        &self,
        sampler: &mut CpuSampler,
        seat: u32,
        params: &SamplingParams,
        prompt: &[u32],
        output: &[u32],
    ) -> Result<()> {
        self.script.at("seat")?;
        self.cpu.seat(sampler, seat, params, prompt, output)
    }

    fn sample(&self, logits: &CpuMat, rows: &[SampleRow], sampler: &mut CpuSampler) -> Result<Vec<Sampled>> {
        self.script.at("sample")?;
        self.cpu.sample(logits, rows, sampler)
    }

    fn sample_masked(
        &self,
        logits: &CpuMat,
        rows: &[SampleRow],
        masks: &[Option<&TokenMask>],
        sampler: &mut CpuSampler,
    ) -> Result<Vec<Sampled>> {
        self.script.at("sample_masked")?;
        self.cpu.sample_masked(logits, rows, masks, sampler)
    }

    fn score(&self, logits: &CpuMat, targets: &[(u32, u32)], num_top: u32) -> Result<Vec<Sampled>> {
        self.script.at("score")?;
        self.cpu.score(logits, targets, num_top)
    }

    fn collect(&self, pending: Vec<Sampled>, out: &mut Vec<Sampled>) -> Result<()> {
        self.script.at("collect")?;
        self.cpu.collect(pending, out)
    }
}
