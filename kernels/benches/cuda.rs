//! A decode step and a prefill of Llama-3.1-8B's shape on the GPU, whole and by operation, with and without adapters.
//! One JSON line for each figure. `cargo bench -p kernels --features cuda --bench cuda`
//!
//! `cuda time decode 32 16 prefill 512 1 prefix 64 0` times only such steps (rows, adapters), whole; `prefix` is a prompt
//! behind 32k tokens in KV memory, whose attention is timed as well.
//!
//! `cuda graphs` captures all steps that a server captures, those for adapters without gains and biases first, and tells
//! the time and the memory that both kinds take.
//!
//! `cuda once decode 32 16` runs one such step (rows, adapters) a second time, kernel by kernel between the marks that a
//! profiler waits for: `ncu --profile-from-start off --csv --metrics gpu__time_duration.sum cuda once prefill 512 1`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a bench prints and fails by panicking")]

use std::{sync::Arc, time::Instant};

use kernels::{
    Activation, AttentionShape, Batch, Branch, DType, Embedding, Heads, HostTensor, LinearLora, LoraSite,
    Matrix, Norm, NormKind, Output, Pairs, Projection, Qkv, Residual, RopeSpec, Rotation, RowSet, SampleRow,
    SamplingParams, Span, Stretch,
    cuda::{
        CudaBackend, CudaBatch, CudaKv, CudaMat, CudaRope, CudaSampler, CudaSlots, CudaVector, CudaWeight,
    },
    prelude::*,
    testing::{Numbers, batch},
};

const HIDDEN: usize = 4096;
const FFN: usize = 14336;
const LAYERS: usize = 32;
const VOCAB: usize = 128_256;
const HEADS: Heads = Heads { query: 32, kv: 8, dim: 128 };
const MAX_ROWS: usize = 2048;
const ADAPTERS: usize = 32;
/// Rows of the prompt in a mixed step: with 32 decode rows, what the scheduler plans.
const PROMPT: usize = 480;
/// Tokens before the rows of a prompt whose beginning is in KV memory already.
const PREFIX: usize = 32_768;
const RANK: usize = 16;
const EPS: f32 = 1e-5;
const ATTENTION: AttentionShape =
    AttentionShape { heads: HEADS, scale: 0.088_388, span: Span::Causal, softcap: None };

struct Layer {
    qkv: CudaWeight,
    o: CudaWeight,
    gate_up: CudaWeight,
    down: CudaWeight,
    norm: CudaVector,
    kv: CudaKv,
}

/// A model of random weights and its scratch.
struct Model {
    ops: Arc<CudaBackend>,
    layers: Vec<Layer>,
    embed: CudaWeight,
    head: CudaWeight,
    rope: CudaRope,
    slots: Arc<CudaSlots>,
    sampler: CudaSampler,
    x: CudaMat,
    residual: CudaMat,
    products: CudaMat,
    qkv: CudaMat,
    attn: CudaMat,
    gate_up: CudaMat,
    act: CudaMat,
    last: CudaMat,
    logits: CudaMat,
}

/// Small random bf16 numbers, the same bytes for every weight.
struct Random(Vec<u8>);

impl Random {
    fn new(bytes: usize) -> Random {
        let mut numbers = Numbers(1);
        let pattern: Vec<u8> =
            (0..1 << 20).flat_map(|_| half::bf16::from_f32(numbers.number() * 0.05).to_le_bytes()).collect();
        Random(pattern.iter().copied().cycle().take(bytes).collect())
    }

    fn tensor(&self, rows: usize, cols: usize) -> HostTensor<'_> {
        let data = (&self.0[..rows * cols * 2]).into();
        HostTensor { dtype: DType::Bf16, rows, cols, data }
    }
}

fn sites() -> Vec<LoraSite> {
    let layer = [
        LoraSite::linear(HIDDEN, &[4096, 1024, 1024]),
        LoraSite::linear(HIDDEN, &[HIDDEN]),
        LoraSite::linear(HIDDEN, &[FFN, FFN]),
        LoraSite::linear(FFN, &[HIDDEN]),
    ];
    (0..LAYERS).flat_map(|_| layer.clone()).collect()
}

fn adapters(ops: &CudaBackend) -> CudaSlots {
    let sites = sites();
    let mut numbers = Numbers(2);
    let mut parts = Vec::new();
    for (site, shape) in sites.iter().enumerate().take(4) {
        for slice in 0..shape.outputs.len() {
            parts.push(numbers.part((site, slice), shape, RANK));
        }
    }
    let all: Vec<_> = (0..LAYERS)
        .flat_map(|layer| {
            parts.iter().map(move |p| kernels::LoraPart { site: layer * 4 + p.site, ..p.clone() })
        })
        .collect();
    let adapter = Arc::new(ops.stage(&sites, &all).unwrap());
    let mut slots = ops.lora_slots(&sites, ADAPTERS).unwrap();
    for slot in 0..ADAPTERS as u32 {
        ops.load(&mut slots, slot, &adapter, &[]).unwrap();
    }
    let mut loaded = 0;
    let start = Instant::now();
    while loaded < ADAPTERS {
        loaded += ops.loaded(&mut slots).unwrap().len();
    }
    let gb = ADAPTERS as f64 * ops.adapter_bytes(&adapter) as f64 / 1e9;
    println!("{{\"what\":\"adapter loads\",\"gb_s\":{:.1}}}", gb / start.elapsed().as_secs_f64());
    slots
}

fn rms(weight: &CudaVector) -> Norm<'_, CudaBackend> {
    Norm { kind: NormKind::Rms, weight, bias: None, eps: EPS }
}

/// A projection onto the stream, which is normed then.
fn to_stream<'a>(
    [stream, products, y]: [&'a mut CudaMat; 3],
    norm: &'a CudaVector,
) -> Output<'a, CudaBackend> {
    let next = Some((rms(norm), y));
    Output::Residual(Residual { stream, products, post: None, scale: 1.0, branch: Branch::Only, next })
}

impl Model {
    fn new() -> Model {
        let ops = Arc::new(CudaBackend::new(DType::Bf16, 0).unwrap());
        ops.time_products("").unwrap();
        let start = Instant::now();
        let random = Random::new(VOCAB * HIDDEN * 2);
        let weight = |rows, cols| ops.weight(&[random.tensor(rows, cols)]).unwrap();
        let norm = vec![1.0; HIDDEN];
        let layer = |_| Layer {
            qkv: weight(HEADS.qkv_cols(), HIDDEN),
            o: weight(HIDDEN, HIDDEN),
            gate_up: weight(2 * FFN, HIDDEN),
            down: weight(HIDDEN, FFN),
            norm: ops.vector(&norm).unwrap(),
            kv: ops.kv(12_000, HEADS).unwrap(),
        };
        let layers = (0..LAYERS).map(layer).collect();
        let (embed, head) = (weight(VOCAB, HIDDEN), weight(VOCAB, HIDDEN));
        ops.synchronize().unwrap();
        println!("{{\"what\":\"weights\",\"s\":{:.2}}}", start.elapsed().as_secs_f64());
        let mat = |cols| ops.mat(MAX_ROWS, cols).unwrap();
        let mut sampler = ops.sampler(256, VOCAB).unwrap();
        for seat in 0..256 {
            ops.seat(&mut sampler, seat, &SamplingParams::default(), &[], &[]).unwrap();
        }
        let rope =
            RopeSpec { inv_freq: vec![0.01; 64], scale: 1.0, positions: 40_000, stretch: Stretch::None };
        Model {
            rope: ops.rope(&rope).unwrap(),
            slots: Arc::new(adapters(&ops)),
            x: mat(HIDDEN),
            residual: ops.wide_mat(MAX_ROWS, HIDDEN).unwrap(),
            products: ops.wide_mat(MAX_ROWS, HIDDEN).unwrap(),
            qkv: mat(HEADS.qkv_cols()),
            attn: mat(HEADS.query * HEADS.dim),
            gate_up: mat(2 * FFN),
            act: mat(FFN),
            last: ops.mat(256, HIDDEN).unwrap(),
            logits: ops.wide_mat(256, VOCAB).unwrap(),
            sampler,
            embed,
            head,
            layers,
            ops,
        }
    }

    /// The operations of a step whose names `wanted` accepts.
    fn forward(&mut self, batch: &CudaBatch, wanted: &dyn Fn(&str) -> bool) -> kernels::Result<()> {
        let Model { ops, slots, x, residual, products, qkv, attn, gate_up, act, last, logits, .. } = self;
        let lora = |site| Some(LinearLora { slots: slots.as_ref(), site, batch, rows: RowSet::All });
        let table = Embedding { table: &self.embed, scale: 1.0, positions: None, lora: None };
        ops.embed(batch, &self.sampler, table, residual)?;
        let rows = residual.rows();
        for m in [&mut *x, residual, qkv, attn, gate_up, act] {
            m.set_rows(rows);
        }
        if wanted("norm") {
            ops.normalize(residual, rms(&self.layers[0].norm), x)?;
        }
        for (i, layer) in self.layers.iter_mut().enumerate() {
            if wanted("qkv") {
                ops.linear(x, Projection::new(&layer.qkv, lora(4 * i)), Output::Store(qkv))?;
            }
            if wanted("rope") {
                let rope = Some(Rotation { table: &self.rope, pairs: Pairs::Halves });
                let by = Qkv { heads: HEADS, clamp: None, norms: None, rope };
                ops.rope_and_store(qkv, by, batch, &mut layer.kv)?;
            }
            if wanted("attention") {
                ops.paged_attention(qkv, ATTENTION.into(), batch, &layer.kv, attn)?;
            }
            if wanted("o") {
                let by = Projection::new(&layer.o, lora(4 * i + 1));
                ops.linear(attn, by, to_stream([&mut *residual, &mut *products, &mut *x], &layer.norm))?;
            }
            if wanted("gate_up") {
                let by = Projection::new(&layer.gate_up, lora(4 * i + 2));
                let out = Output::Gate { activation: Activation::Silu, products: gate_up, y: act };
                ops.linear(x, by, out)?;
            }
            if wanted("down") {
                let by = Projection::new(&layer.down, lora(4 * i + 3));
                ops.linear(act, by, to_stream([&mut *residual, &mut *products, &mut *x], &layer.norm))?;
            }
        }
        ops.gather_logit_rows(x, batch, last)?;
        let head = Projection::new(&self.head, None);
        if wanted("head") { ops.linear(last, head, Output::Store(logits)) } else { Ok(()) }
    }

    /// Median milliseconds of a step.
    fn time(&mut self, host: &Batch, wanted: &dyn Fn(&str) -> bool) -> f64 {
        let mut device = self.ops.batch(MAX_ROWS, 16_384, &[Span::Causal]).unwrap();
        let rows: Vec<_> =
            (0..host.logit_rows.len() as u32).map(|row| SampleRow { row, seat: row }).collect();
        let mut times = Vec::new();
        for _ in 0..5 {
            let start = Instant::now();
            let mut pending = Vec::new();
            for _ in 0..8 {
                self.ops.upload(host, &mut device).unwrap();
                let (ops, slots) = (self.ops.clone(), self.slots.clone());
                ops.step(&device, Some(&slots), || self.forward(&device, wanted)).unwrap();
                if wanted("sample") {
                    pending.push(self.ops.sample(&self.logits, &rows, &mut self.sampler).unwrap());
                }
            }
            self.ops.synchronize().unwrap();
            times.push(start.elapsed().as_secs_f64() * 1e3 / 8.0);
            let mut out = Vec::new();
            for pending in pending {
                self.ops.collect(pending, &mut out).unwrap();
            }
        }
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }
}

fn report(what: &str, rows: usize, adapters: usize, op: &str, ms: f64) {
    println!(
        "{{\"what\":\"{what}\",\"rows\":{rows},\"adapters\":{adapters},\"op\":\"{op}\",\"ms\":{ms:.3}}}"
    );
}

/// Captures the steps of a server, each by running it twice.
fn graphs() {
    let mut model = Model::new();
    let ops = model.ops.clone();
    let mut device = ops.batch(MAX_ROWS, 16_384, &[Span::Causal]).unwrap();
    for is_affine in [false, true] {
        let steps = ops.captured_steps();
        let steps: Vec<_> = steps.iter().filter(|step| step.is_affine == is_affine).collect();
        if is_affine {
            let mut part = kernels::LoraPart::delta((0, 0), 1, 1.0, &[0.0; HIDDEN], &[0.0; 4096]);
            part.bias = Some(vec![0.0; 4096]);
            let adapter = Arc::new(ops.stage(&sites(), &[part]).unwrap());
            let slots = Arc::get_mut(&mut model.slots).unwrap();
            ops.unload(slots, 0).unwrap();
            ops.load(slots, 0, &adapter, &[]).unwrap();
            while ops.loaded(slots).unwrap().is_empty() {}
        }
        ops.synchronize().unwrap();
        let (start, free) = (Instant::now(), ops.memory().unwrap().free);
        for step in &steps {
            let mut host = batch(&vec![(1, 0); step.rows], &[]);
            let segment = |row| kernels::Segment::new(row, row + 1, 0);
            host.segments = (0..step.runs as u32).map(segment).collect();
            host.logit_segments.clone_from(&host.segments);
            for _ in 0..2 {
                ops.upload(&host, &mut device).unwrap();
                let slots = model.slots.clone();
                ops.step(&device, Some(&slots), || model.forward(&device, &|_| true)).unwrap();
            }
            ops.synchronize().unwrap();
        }
        let (count, seconds) = (steps.len(), start.elapsed().as_secs_f64());
        let mib = free.saturating_sub(ops.memory().unwrap().free) >> 20;
        println!(
            "{{\"what\":\"graphs\",\"affine\":{is_affine},\"count\":{count},\"s\":{seconds:.2},\"mib\":{mib}}}"
        );
    }
}

/// One step's indices: decode rows at position 575, the rows of one prompt, or both.
fn step(phase: &str, rows: usize, adapters: usize) -> Batch {
    if phase == "prefix" {
        return batch(&[(rows, PREFIX)], &[(adapters > 0).then_some(1)]);
    }
    if phase == "prefill" {
        return batch(&[(rows, 0)], &[(adapters > 0).then_some(1)]);
    }
    if phase == "mixed" {
        let decode = rows - PROMPT;
        let mut sequences = vec![(1, 575); decode];
        sequences.push((PROMPT, 0));
        let mut host = batch(&sequences, &[]);
        sort_by_slot(&mut host, decode, adapters);
        // The prompt is of the last adapter.
        for (segments, end) in [(&mut host.segments, rows), (&mut host.logit_segments, decode + 1)] {
            segments.last_mut().into_iter().for_each(|last| last.end = end as u32);
        }
        return host;
    }
    let mut host = batch(&vec![(1, 575); rows], &[]);
    sort_by_slot(&mut host, rows, adapters);
    host
}

/// Runs one step twice, the second time between the marks of a profiler.
fn once(args: &[String]) {
    let [phase, rows, adapters] = args else { panic!("once decode|prefill|mixed <rows> <adapters>") };
    let host = step(phase, rows.parse().unwrap(), adapters.parse().unwrap());
    let mut model = Model::new();
    let ops = model.ops.clone();
    ops.capture_steps(false);
    let mut device = ops.batch(MAX_ROWS, 16_384, &[Span::Causal]).unwrap();
    for profiled in [false, true] {
        ops.synchronize().unwrap();
        if profiled {
            cudarc::driver::profiler_start().unwrap();
        }
        ops.upload(&host, &mut device).unwrap();
        let slots = model.slots.clone();
        ops.step(&device, Some(&slots), || model.forward(&device, &|_| true)).unwrap();
        let rows: Vec<_> =
            (0..host.logit_rows.len() as u32).map(|row| SampleRow { row, seat: row }).collect();
        let pending = ops.sample(&model.logits, &rows, &mut model.sampler).unwrap();
        ops.collect(pending, &mut Vec::new()).unwrap();
    }
    cudarc::driver::profiler_stop().unwrap();
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    if let Some(("once", args)) = args.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        return once(args);
    }
    if args == ["graphs"] {
        return graphs();
    }
    let mut model = Model::new();
    if let Some(("time", steps)) = args.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        for [phase, rows, adapters] in steps.as_chunks().0 {
            let (rows, adapters) = (rows.parse().unwrap(), adapters.parse().unwrap());
            let host = step(phase, rows, adapters);
            report(phase, rows, adapters, "all", model.time(&host, &|_| true));
            if phase == "prefix" {
                report(phase, rows, adapters, "attention", model.time(&host, &|name| name == "attention"));
            }
        }
        return;
    }
    let ops = ["norm", "qkv", "rope", "attention", "o", "gate_up", "down", "head", "sample"];
    for rows in [1, 8, 32, 64, 128] {
        for adapters in [0, 1, ADAPTERS] {
            let host = step("decode", rows, adapters);
            report("decode", rows, adapters, "all", model.time(&host, &|_| true));
            if adapters != 1 && (rows == 1 || rows == 32 || rows == 128) {
                for op in ops {
                    report("decode", rows, adapters, op, model.time(&host, &|name| name == op));
                }
            }
        }
    }
    for (phase, rows, most) in
        [("prefill", 512, 1), ("prefill", 2048, 1), ("mixed", 512, ADAPTERS), ("mixed", 640, ADAPTERS)]
    {
        for adapters in [0, most] {
            let host = step(phase, rows, adapters);
            report(phase, rows, adapters, "all", model.time(&host, &|_| true));
            for op in ops {
                report(phase, rows, adapters, op, model.time(&host, &|name| name == op));
            }
        }
    }
}

/// Segments of neighbouring rows, as the scheduler orders them.
fn sort_by_slot(host: &mut Batch, rows: usize, adapters: usize) {
    if adapters == 0 {
        return;
    }
    let per = rows.div_ceil(adapters);
    let end = |i: usize| ((i + 1) * per).min(rows) as u32;
    let segment = |i: usize| kernels::Segment::new((i * per) as u32, end(i), i as u32);
    host.segments = (0..rows.div_ceil(per)).map(segment).collect();
    host.logit_segments.clone_from(&host.segments);
}
