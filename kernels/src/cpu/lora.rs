//! Low-rank deltas in host memory. Nothing is padded to a common rank: A keeps its own rows, B its own columns.

use std::sync::Arc;

use super::memory::{Arena, Line, Lines, Panels, pair};
use crate::{DType, Error, LoraPart, LoraShape, LoraSite, LowRank, Result};

/// The deltas of one adapter at one site.
#[derive(Debug)]
pub(super) struct SiteDelta {
    /// The A of all slices, one after the other, each with zero rows up to whole lines of its B. Row-major along the
    /// inputs, each row padded to whole lines: 16 f32 a line, or 32 bf16, whose lane i holds the elements i and i + 16.
    pub(super) a: Lines,
    /// Lines of one row of A.
    pub(super) depth: usize,
    /// The adapter's factor for each row of A.
    pub(super) scales: Vec<f32>,
    pub(super) slices: Vec<SliceDelta>,
}

/// The B of one slice.
#[derive(Debug)]
pub(super) struct SliceDelta {
    /// The slice's first row of A.
    pub(super) first: usize,
    /// The panel of the site's base weight that B's first panel lies on.
    pub(super) panel: usize,
    /// Panels over the outputs of the slice. They lie on the base weight's panels: if the slice begins
    /// inside of one, there are zeros for the outputs before it.
    pub(super) b: Panels,
}

impl SiteDelta {
    /// `parts` are those of the site, by slice.
    fn new(arena: &mut Arena, dtype: DType, site: &LoraSite, parts: &[&LoraPart]) -> Result<SiteDelta> {
        let depth = site.inputs.div_ceil(a_elements_per_line(dtype));
        let mut a = arena.lines(a_rows(dtype, parts) * depth, "an adapter")?;
        let (mut slices, mut scales, mut first) = (Vec::new(), Vec::new(), 0);
        for part in parts {
            let Some(LowRank { rank, scale, a: own_a, b: own_b }) = &part.low_rank else { continue };
            let (own_a, own_b) = (own_a.to_f32(), own_b.to_f32());
            for (i, row) in own_a.chunks_exact(site.inputs).enumerate() {
                pack_row(dtype, row, &mut a[(first + i) * depth..][..depth]);
            }
            let column: usize = site.outputs[..part.slice].iter().sum();
            let before = column % 16;
            let shape = [before + site.outputs[part.slice], *rank];
            let b = Panels::from_fn(arena, dtype, shape, |o, r| {
                o.checked_sub(before).map_or(0.0, |o| own_b[o * rank + r])
            })?;
            slices.push(SliceDelta { first, panel: column / 16, b });
            scales.resize(first + a_rows(dtype, &[part]), *scale);
            first += a_rows(dtype, &[part]);
        }
        Ok(SiteDelta { a, depth, scales, slices })
    }

    /// Rows of A: elements of a shrunk row.
    pub(super) fn width(&self) -> usize {
        self.a.len() / self.depth.max(1)
    }
}

fn a_elements_per_line(dtype: DType) -> usize {
    if dtype == DType::F32 { 16 } else { 32 }
}

/// Rows that the A of some slices takes.
fn a_rows(dtype: DType, parts: &[&LoraPart]) -> usize {
    let whole = Panels::inputs_per_line(dtype);
    parts.iter().map(|part| part.shape().lora_rank.next_multiple_of(whole)).sum()
}

fn pack_row(dtype: DType, row: &[f32], lines: &mut [Line]) {
    let get = |k: usize| row.get(k).copied().unwrap_or(0.0);
    for (k, line) in lines.iter_mut().enumerate() {
        let first = k * a_elements_per_line(dtype);
        for (lane, word) in line.0.iter_mut().enumerate() {
            *word = match dtype {
                DType::F32 => get(first + lane).to_bits(),
                _ => pair(get(first + lane), get(first + 16 + lane)),
            };
        }
    }
}

/// One adapter: its deltas by site.
#[derive(Debug)]
pub struct CpuAdapter {
    sites: Vec<Option<SiteDelta>>,
    pub(super) bytes: usize,
}

impl CpuAdapter {
    pub(super) fn new(dtype: DType, sites: &[LoraSite], parts: &[LoraPart]) -> Result<CpuAdapter> {
        let mut by_site = vec![Vec::new(); sites.len()];
        for part in parts {
            part.check(sites)?;
            if part.magnitude.is_some() || part.bias.is_some() || part.rows.is_some() {
                let what = "more than a low-rank delta".into();
                return Err(Error::Unsupported { backend: "cpu", what });
            }
            by_site[part.site].push(part);
        }
        let shapes: Vec<_> = parts.iter().map(LoraPart::shape).collect();
        let bytes = bytes(dtype, sites, &shapes)?;
        let mut arena = Arena::new(bytes);
        let deltas = by_site.iter_mut().zip(sites).map(|(parts, site)| {
            parts.sort_by_key(|part| part.slice);
            (!parts.is_empty()).then(|| SiteDelta::new(&mut arena, dtype, site, parts)).transpose()
        });
        let sites = deltas.collect::<Result<Vec<_>>>()?;
        Ok(CpuAdapter { sites, bytes })
    }

    /// The deltas at a site, if the adapter has any there.
    pub(super) fn site(&self, site: usize) -> Option<&SiteDelta> {
        self.sites[site].as_ref()
    }
}

/// Bytes of an adapter of these shapes.
pub(super) fn bytes(dtype: DType, sites: &[LoraSite], shapes: &[LoraShape]) -> Result<usize> {
    let whole = Panels::inputs_per_line(dtype);
    let lines = shapes.iter().map(|shape| {
        let [inputs, outputs] = shape.of(sites)?;
        // A slice may begin inside of a panel.
        let column: usize = sites[shape.site].outputs[..shape.slice].iter().sum();
        let panels = (column % 16 + outputs).div_ceil(16);
        let a = shape.lora_rank.next_multiple_of(whole) * inputs.div_ceil(a_elements_per_line(dtype));
        Ok(a + panels * shape.lora_rank.div_ceil(whole))
    });
    Ok(lines.sum::<Result<usize>>()? * size_of::<Line>())
}

/// The resident adapters.
#[derive(Debug)]
pub struct CpuSlots {
    pub(super) sites: Vec<LoraSite>,
    pub(super) slots: Vec<Option<Arc<CpuAdapter>>>,
    pub(super) loaded: Vec<u32>,
}

impl CpuSlots {
    /// The adapter in a slot that a row wants to use.
    pub(super) fn resident(&self, op: &'static str, slot: u32) -> Result<&CpuAdapter> {
        let limit = self.slots.len();
        let slot = slot as usize;
        let adapter = self.slots.get(slot).ok_or(Error::Index { op, what: "slot", index: slot, limit })?;
        adapter.as_deref().ok_or(Error::EmptySlot { op, slot })
    }
}
