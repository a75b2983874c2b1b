//! The changes that adapters make to products and lookups.

use super::{Table, dot};
use crate::{
    Batch, LoraPart, LoraSite, LowRank, ReplacedRows, Segment, SiteKind,
    batch::{ensembles, is_ensemble},
};

/// A weight of the base model at a site.
#[derive(Debug, Clone, Copy)]
pub struct Base<'a> {
    /// The weight `[outputs, inputs]`, or the table of a lookup.
    pub weight: &'a Table,
    /// The bias.
    pub bias: Option<&'a [f32]>,
    /// The index of the site, and the site.
    pub site: (usize, &'a LoraSite),
}

/// Adds the low-rank deltas of `adapters[slot]` at a site to the rows of its segments.
pub fn add_lora(
    x: &Table,
    site: (usize, &LoraSite),
    segments: &[Segment],
    adapters: &[Vec<LoraPart>],
    y: &mut Table,
) {
    for segment in segments {
        for part in adapters[segment.slot as usize].iter().filter(|part| part.site == site.0) {
            let column = site.1.columns(part.slice).start;
            for i in segment.start as usize..segment.end as usize {
                let Some(LowRank { rank, scale, a, b }) = &part.low_rank else { continue };
                let (a, b) = (a.to_f32(), b.to_f32());
                let shrunk: Vec<f32> = a.chunks(site.1.inputs).map(|a| dot(x.row(i), a)).collect();
                for (o, b) in b.chunks(*rank).enumerate() {
                    y.data[i * y.cols + column + o] += segment.weight * scale * dot(&shrunk, b);
                }
            }
        }
    }
}

/// The rows of a weight for a slice of an adapter, which has the rows `columns`: those of the base model or the
/// adapter's own ones, plus its delta. `None` where there is no row.
fn weight_of(weight: &Table, part: &LoraPart, columns: std::ops::Range<usize>) -> Vec<Option<Vec<f32>>> {
    let base = |row: usize| (row < weight.rows()).then(|| weight.row(row).to_vec());
    let mut rows: Vec<Option<Vec<f32>>> = columns.map(base).collect();
    if let Some(ReplacedRows { ids, values }) = &part.rows {
        if ids.is_none() {
            rows.fill(None);
        }
        for (k, value) in values.to_f32().chunks(values.cols).enumerate() {
            rows[ids.as_ref().map_or(k, |ids| ids[k] as usize)] = Some(value.to_vec());
        }
    }
    rows
}

/// The delta `scale · B · A`, row by row.
fn delta_of(low_rank: &LowRank) -> Vec<Vec<f32>> {
    let LowRank { rank, scale, a, b } = low_rank;
    let (a, b) = (a.to_f32(), b.to_f32());
    let inputs = a.len() / rank;
    let row = |b: &[f32]| {
        let element = |k| scale * b.iter().enumerate().map(|(r, b)| b * a[r * inputs + k]).sum::<f32>();
        (0..inputs).map(element).collect()
    };
    b.chunks(*rank).map(row).collect()
}

fn norm(row: impl Iterator<Item = f32>) -> f32 {
    row.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt() as f32
}

/// `y[i] = gain ∘ (x[i] · Wᵀ + delta) + bias`, with `columns` columns; see [`LoraPart`]. Columns without a row are -∞.
pub fn adapted_linear(
    x: &Table,
    base: Base<'_>,
    (segments, adapters): (&[Segment], &[Vec<LoraPart>]),
    columns: usize,
) -> Table {
    let bias = |o: usize| base.bias.and_then(|bias| bias.get(o)).unwrap_or(&0.0);
    let mut y = Table { cols: columns, data: vec![f32::NEG_INFINITY; x.rows() * columns] };
    for i in 0..x.rows() {
        for o in 0..base.weight.rows() {
            y.row_mut(i)[o] = dot(x.row(i), base.weight.row(o)) + bias(o);
        }
    }
    let (number, site) = base.site;
    for segment in ensembles(segments).filter(|members| is_ensemble(members)).flatten() {
        for part in adapters[segment.slot as usize].iter().filter(|part| part.site == number) {
            let first = site.columns(part.slice).start;
            for i in segment.start as usize..segment.end as usize {
                add_member(x.row(i), part, segment.weight, &mut y.row_mut(i)[first..]);
            }
        }
    }
    for segment in ensembles(segments).filter(|members| !is_ensemble(members)).flatten() {
        for part in adapters[segment.slot as usize].iter().filter(|part| part.site == number) {
            let range = site.columns(part.slice);
            let rows = weight_of(base.weight, part, range.clone());
            let deltas = part.low_rank.as_ref().map(delta_of);
            for (k, row) in rows.iter().enumerate() {
                let delta = deltas.as_ref().and_then(|deltas| deltas.get(k));
                let delta = |j: usize| delta.map_or(0.0, |delta| delta[j]);
                for i in segment.start as usize..segment.end as usize {
                    let y = &mut y.row_mut(i)[range.start + k];
                    let Some(row) = row else {
                        *y = f32::NEG_INFINITY;
                        continue;
                    };
                    let sum: f64 = (0..row.len())
                        .map(|j| f64::from(x.row(i)[j]) * (f64::from(row[j]) + f64::from(delta(j))))
                        .sum();
                    let gain = part.magnitude.as_ref().map_or(1.0, |magnitude| {
                        magnitude[k] / norm(row.iter().enumerate().map(|(j, w)| w + delta(j)))
                    });
                    let own = part.bias.as_ref().and_then(|bias| bias.get(k)).unwrap_or(&0.0);
                    *y = gain * sum as f32 + bias(range.start + k) + own;
                }
            }
        }
    }
    y
}

/// `y += weight · (delta · x + bias)`, of a part that is a sum.
fn add_member(x: &[f32], part: &LoraPart, weight: f32, y: &mut [f32]) {
    if let Some(LowRank { rank, scale, a, b }) = &part.low_rank {
        let shrunk: Vec<f32> = a.to_f32().chunks(x.len()).map(|a| dot(x, a)).collect();
        let (b, factor) = (b.to_f32(), weight * scale);
        b.chunks(*rank).zip(&mut *y).for_each(|(b, y)| *y += factor * dot(&shrunk, b));
    }
    part.bias.iter().flatten().zip(y).for_each(|(bias, y)| *y += weight * bias);
}

/// The rows of a table by token, times `scale`; see [`crate::Embedding`].
///
/// # Panics
/// A token has no row.
pub fn embed(base: Base<'_>, batch: &Batch, adapters: &[Vec<LoraPart>], scale: f32) -> Table {
    let (number, site) = base.site;
    let mut y = Table { cols: base.weight.cols, data: Vec::new() };
    let segments =
        |row: usize| batch.segments.iter().filter(move |s| (s.start..s.end).contains(&(row as u32)));
    for (i, &token) in batch.tokens.iter().enumerate() {
        let token = token as usize;
        let members: Vec<Segment> = segments(i).copied().collect();
        let part = |segment: &Segment| {
            let mut parts = adapters[segment.slot as usize].iter();
            parts.find(|part| part.site == number && site.kind == SiteKind::Lookup)
        };
        if is_ensemble(&members) || members.iter().all(|segment| part(segment).is_none()) {
            let mut row = base.weight.row(token).to_vec();
            for (segment, part) in members.iter().filter_map(|segment| Some((segment, part(segment)?))) {
                let deltas = part.low_rank.as_ref().map(delta_of).unwrap_or_default();
                let added = |delta: &Vec<f32>| segment.weight * delta.get(token).unwrap_or(&0.0);
                row.iter_mut().zip(&deltas).for_each(|(x, delta)| *x += added(delta));
                let bias = part.bias.iter().flatten();
                row.iter_mut().zip(bias).for_each(|(x, bias)| *x += segment.weight * bias);
            }
            y.data.extend(row.iter().map(|x| scale * x));
            continue;
        }
        let Some(part) = members.first().and_then(part) else { continue };
        y.data.extend(adapted_row(base, part, token).iter().map(|x| scale * x));
    }
    y
}

/// A row of a table, as one adapter changes it.
fn adapted_row(base: Base<'_>, part: &LoraPart, token: usize) -> Vec<f32> {
    let deltas = part.low_rank.as_ref().map(delta_of);
    let delta = |k: usize, token: usize| {
        deltas.as_ref().and_then(|deltas| deltas[k].get(token)).copied().unwrap_or(0.0)
    };
    let rows = weight_of(base.weight, part, 0..base.site.1.inputs);
    let row = rows[token].as_ref().expect("a row of the token");
    let column = |(k, x): (usize, &f32)| {
        // Only the tokens of the adapter's vocabulary count.
        let tokens = deltas.as_ref().map_or(rows.len(), |deltas| deltas[k].len());
        let own = rows.iter().take(tokens).enumerate();
        let column = own.filter_map(|(t, row)| Some(row.as_ref()?[k] + delta(k, t)));
        let gain = part.magnitude.as_ref().map_or(1.0, |magnitude| magnitude[k] / norm(column));
        gain * (x + delta(k, token)) + part.bias.as_ref().map_or(0.0, |bias| bias[k])
    };
    row.iter().enumerate().map(column).collect()
}
