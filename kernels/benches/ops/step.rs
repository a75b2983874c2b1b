//! Whole steps of a decoder of SmolLM2-135M's shape with random weights: what the operations add up to.

use kernels::{
    Activation, AttentionShape, Branch, Embedding, LinearLora, LoraSite, Norm, NormKind, Output, Pairs,
    Projection, Qkv, Residual, RopeSpec, Rotation, RowSet, SampleRow, SamplingParams, Stretch,
    cpu::{CpuBackend, CpuBatch, CpuKv, CpuMat, CpuRope, CpuSampler, CpuSlots, Panels},
    prelude::*,
    testing::{Numbers, batch},
};

use crate::{
    Bench, Cost, Outcome,
    cpu::{Cpu, HEADS, HIDDEN, INNER, RANKS, VOCAB},
    linear::adapters,
    tensor, uploaded,
};

const LAYERS: usize = 30;

struct Layer {
    /// qkv, o, gate and up, down.
    weights: [Panels; 4],
    kv: CpuKv,
}

struct Model {
    layers: Vec<Layer>,
    table: Panels,
    norm: Vec<f32>,
    rope: CpuRope,
    slots: CpuSlots,
    /// Activations: the hidden state, the residual, qkv, attention, gate and up, their product, the last rows, logits,
    /// products that are not added to the residual as they come.
    mats: [CpuMat; 9],
    sampler: CpuSampler,
}

fn layer_sites() -> [LoraSite; 4] {
    crate::layer_sites(HIDDEN, INNER, HEADS).map(|(_, site)| site)
}

impl Model {
    fn new(ops: &CpuBackend, rows: usize, blocks: usize) -> kernels::Result<Model> {
        let mut numbers = Numbers(5);
        let mut weight = |outputs: usize, inputs: usize| {
            let mut table = numbers.table(outputs, inputs);
            table.data.iter_mut().for_each(|x| *x /= 32.0);
            ops.weight(&[tensor(&table)])
        };
        let layers = (0..LAYERS)
            .map(|_| {
                let weights = [
                    weight(HEADS.qkv_cols(), HIDDEN)?,
                    weight(HIDDEN, HIDDEN)?,
                    weight(2 * INNER, HIDDEN)?,
                    weight(HIDDEN, INNER)?,
                ];
                Ok(Layer { weights, kv: ops.kv(blocks, HEADS)? })
            })
            .collect::<kernels::Result<Vec<Layer>>>()?;
        let sites: Vec<LoraSite> = (0..LAYERS).flat_map(|_| layer_sites()).collect();
        let mat = |cols| ops.mat(rows, cols);
        let spec = RopeSpec { inv_freq: vec![0.5; 32], scale: 1.0, positions: 8192, stretch: Stretch::None };
        let of_sites: Vec<&Panels> = layers.iter().flat_map(|layer| &layer.weights).collect();
        let slots = adapters(ops, (&sites, &of_sites), &RANKS)?.0;
        Ok(Model {
            layers,
            table: weight(VOCAB, HIDDEN)?,
            norm: ops.vector(&[1.0; HIDDEN])?,
            rope: ops.rope(&spec)?,
            slots,
            mats: [
                mat(HIDDEN)?,
                mat(HIDDEN)?,
                mat(HEADS.qkv_cols())?,
                mat(HIDDEN)?,
                mat(2 * INNER)?,
                mat(INNER)?,
                mat(HIDDEN)?,
                ops.mat(rows.min(64), VOCAB)?,
                mat(HIDDEN)?,
            ],
            sampler: ops.sampler(rows, VOCAB)?,
        })
    }

    fn step(&mut self, ops: &CpuBackend, batch: &CpuBatch) -> kernels::Result<()> {
        let [x, residual, qkv, attended, gate_up, inner, last, logits, products] = &mut self.mats;
        let attention = AttentionShape::causal(HEADS);
        let norm = Norm { kind: NormKind::Rms, weight: &self.norm, bias: None, eps: 1e-5 };
        let rope = Some(Rotation { table: &self.rope, pairs: Pairs::Halves });
        let by = Qkv { heads: HEADS, clamp: None, norms: None, rope };
        let table = Embedding { table: &self.table, scale: 1.0, positions: None, lora: None };
        ops.embed(batch, &self.sampler, table, residual)?;
        ops.normalize(residual, norm, x)?;
        for (i, layer) in self.layers.iter_mut().enumerate() {
            let lora = |site: usize| {
                let lora = LinearLora { slots: &self.slots, site: 4 * i + site, batch, rows: RowSet::All };
                (!batch.segments.is_empty()).then_some(lora)
            };
            let mut add_and_norm = |from: &CpuMat, which: usize, x: &mut CpuMat| {
                let by = Projection::new(&layer.weights[which], lora(which));
                let (stream, next) = (&mut *residual, Some((norm, x)));
                let products = &mut *products;
                let to = Residual { stream, products, post: None, scale: 1.0, branch: Branch::Only, next };
                ops.linear(from, by, Output::Residual(to))
            };
            ops.linear(x, Projection::new(&layer.weights[0], lora(0)), Output::Store(qkv))?;
            ops.rope_and_store(qkv, by, batch, &mut layer.kv)?;
            ops.paged_attention(qkv, attention.into(), batch, &layer.kv, attended)?;
            add_and_norm(attended, 1, x)?;
            let gated = Output::Gate { activation: Activation::Silu, products: gate_up, y: inner };
            ops.linear(x, Projection::new(&layer.weights[2], lora(2)), gated)?;
            add_and_norm(inner, 3, x)?;
        }
        ops.gather_logit_rows(x, batch, last)?;
        ops.linear(last, Projection::new(&self.table, None), Output::Store(logits))?;
        let rows = batch.logit_rows.len() as u32;
        let places: Vec<_> = (0..rows).map(|i| SampleRow { row: i, seat: i }).collect();
        ops.sample(logits, &places, &mut self.sampler).map(drop)
    }
}

/// Elements that a step multiplies each row with, the head's only for rows that want logits.
fn layer_elements() -> usize {
    let site = |site: &LoraSite| site.inputs * site.outputs.iter().sum::<usize>();
    LAYERS * layer_sites().iter().map(site).sum::<usize>()
}

pub(crate) fn all(bench: &Bench<Cpu>) -> Outcome<()> {
    let decode = |count: usize| vec![(1, 128); count];
    let cases = [
        ("step decode 1, base", decode(1), vec![]),
        ("step decode 1, rank 8", decode(1), vec![Some(1)]),
        ("step decode 8, base", decode(8), vec![]),
        ("step decode 8, 8 adapters", decode(8), (0..8).map(Some).collect()),
        ("step decode 32, base", decode(32), vec![]),
        ("step prefill 512, base", vec![(512, 0)], vec![]),
        ("step prefill 512, rank 8", vec![(512, 0)], vec![Some(1)]),
    ];
    if !cases.iter().any(|case| bench.wants(case.0)) {
        return Ok(());
    }
    let ops = bench.ops();
    let mut model = Model::new(ops, 512, 1024)?;
    for (name, sequences, slots) in cases.into_iter().filter(|case| bench.wants(case.0)) {
        let host = batch(&sequences, &slots);
        for seat in 0..host.logit_rows.len() as u32 {
            ops.seat(&mut model.sampler, seat, &SamplingParams::default(), &[], &[])?;
        }
        let ranks: usize = host.segments.iter().map(|segment| RANKS[segment.slot as usize]).sum();
        let per_rank: usize = layer_sites()
            .iter()
            .map(|site| site.inputs * site.outputs.len() + site.outputs.iter().sum::<usize>())
            .sum();
        let cost = Cost {
            bytes: (layer_elements() + VOCAB * HIDDEN + ranks * per_rank * LAYERS) * ops.dtype().size(),
            flops: 2 * (host.rows() * layer_elements() + host.logit_rows.len() * VOCAB * HIDDEN),
        };
        let device = uploaded(ops, &host)?;
        bench.time(name, cost, |_| model.step(ops, &device))?;
    }
    Ok(())
}
