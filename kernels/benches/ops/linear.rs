//! Projections with and without low-rank deltas.

use std::sync::Arc;

use kernels::{
    Batch, LinearLora, LoraPart, LoraSite, Output, Projection, RowSet,
    prelude::*,
    reference::{self, Table},
    testing::{Numbers, assert_close, batch},
};

use crate::{Bench, Cost, Machine, Outcome, mat, tensor, uploaded};

pub(crate) fn all<M: Machine>(bench: &Bench<M>) -> Outcome<()> {
    let shapes = &bench.shapes;
    let most_logits = shapes.sampled.last().copied().unwrap_or(0);
    for (name, site) in &shapes.sites {
        let allowed = |rows, adapters| *name != "lm_head" || (rows <= most_logits && adapters == 0);
        let mixes = shapes.mixes.iter().copied();
        let mixes: Vec<_> = mixes
            .filter(|&(rows, adapters)| allowed(rows, adapters))
            .filter(|mix| bench.wants(&title(name, site, *mix)))
            .collect();
        if !mixes.is_empty() {
            site_of(bench, name, site, &mixes)?;
        }
    }
    Ok(())
}

fn title(name: &str, site: &LoraSite, (rows, adapters): (usize, usize)) -> String {
    let mix = match adapters {
        0 => "base".to_owned(),
        1 => "1 adapter".to_owned(),
        n => format!("{n} adapters"),
    };
    format!("linear {name} {rows}x{}x{} {mix}", site.inputs, site.outputs.iter().sum::<usize>())
}

/// One adapter for each rank, on all slices of all sites.
pub(crate) fn adapters<B: Backend>(
    ops: &B,
    (sites, weights): (&[LoraSite], &[&B::Weight]),
    ranks: &[usize],
) -> kernels::Result<(B::LoraSlots, Vec<Vec<LoraPart>>)> {
    let mut numbers = Numbers(9);
    let mut slots = ops.lora_slots(sites, ranks.len())?;
    let mut all = Vec::new();
    for (slot, rank) in ranks.iter().enumerate() {
        let parts: Vec<LoraPart> = sites
            .iter()
            .enumerate()
            .flat_map(|(i, site)| (0..site.outputs.len()).map(move |slice| (i, slice)))
            .map(|(i, slice)| numbers.part((i, slice), &sites[i], *rank))
            .collect();
        ops.load(&mut slots, slot as u32, &Arc::new(ops.stage(sites, &parts)?), weights)?;
        all.push(parts);
    }
    let mut loaded = 0;
    while loaded < ranks.len() {
        loaded += ops.loaded(&mut slots)?.len();
    }
    Ok((slots, all))
}

/// A step whose rows are shared evenly by some of the resident adapters.
fn shared(rows: usize, adapters: usize, resident: usize) -> Batch {
    let sequences = vec![(rows / adapters.max(1), 0); adapters.max(1)];
    let slots: Vec<_> = (1..=adapters).map(|slot| Some((slot % resident) as u32)).collect();
    batch(&sequences, &slots)
}

fn site_of<M: Machine>(
    bench: &Bench<M>,
    name: &str,
    site: &LoraSite,
    mixes: &[(usize, usize)],
) -> Outcome<()> {
    let (ops, ranks) = (bench.ops(), &bench.shapes.ranks);
    let outputs: usize = site.outputs.iter().sum();
    let mut numbers = Numbers(1);
    let w = numbers.table(outputs, site.inputs);
    let bytes = outputs * site.inputs * ops.dtype().size();
    let host = tensor(&w);
    let weights = (0..M::ROTATED.div_ceil(bytes).max(1))
        .map(|_| ops.weight(std::slice::from_ref(&host)))
        .collect::<kernels::Result<Vec<_>>>()?;
    let any = mixes.iter().any(|(_, adapters)| *adapters > 0);
    let resident =
        any.then(|| adapters(ops, (std::slice::from_ref(site), &[&weights[0]]), ranks)).transpose()?;
    for &(rows, adapters) in mixes {
        let host = shared(rows, adapters, ranks.len());
        let device = uploaded(ops, &host)?;
        let table = numbers.table(rows, site.inputs);
        let x = mat(ops, &table)?;
        let mut y = if name == "lm_head" { ops.wide_mat(rows, outputs)? } else { ops.mat(rows, outputs)? };
        let lora = || {
            let (slots, _) = resident.as_ref().filter(|_| adapters > 0)?;
            Some(LinearLora { slots, site: 0, batch: &device, rows: RowSet::All })
        };
        ops.linear(&x, Projection::new(&weights[0], lora()), Output::Store(&mut y))?;
        let parts = resident.as_ref().map_or(&[][..], |(_, parts)| parts);
        check(ops, site, &w, (&table, &host, parts), &ops.download(&y)?);
        let mut cost = Cost { bytes, flops: 2 * rows * site.inputs * outputs };
        for segment in &host.segments {
            let rank = ranks[segment.slot as usize];
            let elements = rank * (site.inputs * site.outputs.len() + outputs);
            cost.bytes += elements * ops.dtype().size();
            cost.flops += 2 * elements * (segment.end - segment.start) as usize;
        }
        bench.time(&title(name, site, (rows, adapters)), cost, |i| {
            let by = Projection::new(&weights[i % weights.len()], lora());
            ops.linear(&x, by, Output::Store(&mut y))
        })?;
    }
    Ok(())
}

/// Compares the last row with the reference.
fn check<B: Backend>(
    ops: &B,
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
