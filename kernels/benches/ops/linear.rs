//! Products with weights, with and without low-rank deltas.

use std::sync::Arc;

use kernels::{
    Backend, Batch, LinearLora, LoraPart, LoraSite, RowSet,
    cpu::{CpuBackend, CpuSlots},
    reference::{self, Table},
    testing::{Numbers, assert_close, batch},
};

use crate::{BEYOND_CACHE, Bench, Cost, Outcome, mat, tensor};

/// Ranks of eight adapters that share a step.
pub(crate) const RANKS: [usize; 8] = [4, 8, 16, 32, 8, 16, 4, 32];

/// How adapters are spread over a step's rows.
struct Mix {
    name: &'static str,
    /// Sequences of the step, by rows.
    sequences: Vec<usize>,
    /// Each sequence's adapter.
    slots: Vec<Option<u32>>,
}

pub(crate) fn all(bench: &Bench) -> Outcome<()> {
    for (name, inputs, outputs) in [
        ("qkv", 576, vec![576, 192, 192]),
        ("o", 576, vec![576]),
        ("gate_up", 576, vec![1536, 1536]),
        ("down", 1536, vec![576]),
        ("lm_head", 576, vec![49152]),
        ("large", 4096, vec![4096]),
    ] {
        let site = LoraSite { inputs, outputs };
        let mut mixes: Vec<Mix> = [1, 2, 4, 8, 16, 64, 512]
            .into_iter()
            .filter(|rows| name != "lm_head" || *rows <= 16)
            .map(|rows| Mix { name: "base", sequences: vec![rows], slots: vec![None] })
            .collect();
        mixes.push(Mix { name: "1 adapter", sequences: vec![1], slots: vec![Some(1)] });
        mixes.push(Mix { name: "8 adapters", sequences: vec![1; 8], slots: (0..8).map(Some).collect() });
        mixes.push(Mix { name: "1 adapter", sequences: vec![512], slots: vec![Some(1)] });
        mixes.retain(|mix| bench.wants(&title(name, &site, mix)));
        if !mixes.is_empty() && (name != "lm_head" || mixes.iter().any(|mix| mix.name == "base")) {
            mixes.retain(|mix| name != "lm_head" || mix.name == "base");
            site_of(bench, name, &site, &mixes)?;
        }
    }
    Ok(())
}

fn title(name: &str, site: &LoraSite, mix: &Mix) -> String {
    let (rows, outputs) = (mix.sequences.iter().sum::<usize>(), site.outputs.iter().sum::<usize>());
    format!("linear {name} {rows}x{}x{outputs} {}", site.inputs, mix.name)
}

/// One adapter for each of [`RANKS`], on all slices of all sites.
pub(crate) fn adapters(
    ops: &CpuBackend,
    sites: &[LoraSite],
) -> kernels::Result<(CpuSlots, Vec<Vec<LoraPart>>)> {
    let mut numbers = Numbers(9);
    let mut slots = ops.lora_slots(sites, RANKS.len())?;
    let mut all = Vec::new();
    for (slot, rank) in RANKS.into_iter().enumerate() {
        let parts: Vec<LoraPart> = sites
            .iter()
            .enumerate()
            .flat_map(|(i, site)| (0..site.outputs.len()).map(move |slice| (i, slice)))
            .map(|(i, slice)| numbers.part((i, slice), &sites[i], rank))
            .collect();
        ops.load(&mut slots, slot as u32, &Arc::new(ops.stage(sites, &parts)?))?;
        all.push(parts);
    }
    Ok((slots, all))
}

fn site_of(bench: &Bench, name: &str, site: &LoraSite, mixes: &[Mix]) -> Outcome<()> {
    let ops = &bench.ops;
    let outputs: usize = site.outputs.iter().sum();
    let mut numbers = Numbers(1);
    let w = numbers.table(outputs, site.inputs);
    let bytes = outputs * site.inputs * ops.dtype().size();
    let host = tensor(&w);
    let weights = (0..BEYOND_CACHE.div_ceil(bytes))
        .map(|_| ops.weight(std::slice::from_ref(&host)))
        .collect::<kernels::Result<Vec<_>>>()?;
    let sites = std::slice::from_ref(site);
    let (slots, parts) = adapters(ops, sites)?;
    for mix in mixes {
        let sequences: Vec<(usize, usize)> = mix.sequences.iter().map(|rows| (*rows, 0)).collect();
        let host = batch(&sequences, &mix.slots);
        let mut device = ops.batch(host.rows(), host.blocks.len())?;
        ops.upload(&host, &mut device)?;
        let table = numbers.table(host.rows(), site.inputs);
        let (x, mut y) = (mat(ops, &table)?, ops.mat(host.rows(), outputs)?);
        let lora = || {
            let lora = LinearLora { slots: &slots, site: 0, batch: &device, rows: RowSet::All };
            (!host.segments.is_empty()).then_some(lora)
        };
        ops.linear(&x, &weights[0], None, lora(), &mut y)?;
        check(ops, site, &w, (&table, &host, &parts), &ops.download(&y)?);
        let mut cost = Cost { bytes, flops: 2 * host.rows() * site.inputs * outputs };
        for segment in &host.segments {
            let rank = RANKS[segment.slot as usize];
            let elements = rank * (site.inputs * site.outputs.len() + outputs);
            cost.bytes += elements * ops.dtype().size();
            cost.flops += 2 * elements * (segment.end - segment.start) as usize;
        }
        bench.time(&title(name, site, mix), cost, |i| {
            ops.linear(&x, &weights[i % weights.len()], None, lora(), &mut y)
        })?;
    }
    Ok(())
}

/// Compares the last row with the reference.
fn check(
    ops: &CpuBackend,
    site: &LoraSite,
    w: &Table,
    (x, host, parts): (&Table, &Batch, &[Vec<LoraPart>]),
    got: &[f32],
) {
    let last = Table { cols: x.cols, data: x.row(x.rows() - 1).to_vec() };
    let mut expected = reference::linear(&last, w, None);
    let segments = host.segments.last().map(|segment| kernels::Segment { start: 0, end: 1, ..*segment });
    reference::add_lora(&last, (0, site), segments.as_slice(), parts, &mut expected);
    assert_close("linear", &got[got.len() - expected.cols..], &expected.data, ops.dtype());
}
