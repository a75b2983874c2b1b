//! Low-rank deltas in host memory. Nothing is padded to a common rank: A keeps its own rows, B its own columns.

use std::sync::Arc;

use super::memory::{Line, Lines, Panels, pair};
use crate::{DType, Error, LoraPart, LoraSite, Result};

/// One delta of one slice.
#[derive(Debug)]
pub(super) struct Delta {
    pub(super) lora_rank: usize,
    /// Row-major along the inputs, each row padded to whole lines: 16 f32 a line, or 32 bf16, whose lane i holds the
    /// elements i and i + 16.
    pub(super) a: Lines,
    /// Lines of one row of A.
    pub(super) depth: usize,
    /// Scale included; panels over the outputs of the slice.
    pub(super) b: Panels,
}

impl Delta {
    fn new(dtype: DType, site: &LoraSite, part: &LoraPart) -> Result<Delta> {
        let per_line = if dtype == DType::F32 { 16 } else { 32 };
        let depth = site.inputs.div_ceil(per_line);
        let mut a = Lines::new(part.lora_rank * depth, "an adapter")?;
        for (i, row) in part.a.chunks_exact(site.inputs).enumerate() {
            let get = |k: usize| row.get(k).copied().unwrap_or(0.0);
            for (k, line) in a[i * depth..][..depth].iter_mut().enumerate() {
                for (lane, word) in line.0.iter_mut().enumerate() {
                    let first = k * per_line;
                    *word = match dtype {
                        DType::F32 => get(first + lane).to_bits(),
                        _ => pair(get(first + lane), get(first + 16 + lane)),
                    };
                }
            }
        }
        let outputs = site.outputs[part.slice];
        let b = Panels::from_fn(dtype, [outputs, part.lora_rank], |o, r| part.b[o * part.lora_rank + r])?;
        Ok(Delta { lora_rank: part.lora_rank, a, depth, b })
    }

    fn bytes(&self) -> usize {
        (self.a.len() + self.b.lines.len()) * size_of::<Line>()
    }
}

/// One adapter: its deltas by site and slice.
#[derive(Debug)]
pub struct CpuAdapter {
    /// First entry of each site in `deltas`.
    first: Vec<usize>,
    deltas: Vec<Option<Delta>>,
    pub(super) bytes: usize,
}

impl CpuAdapter {
    pub(super) fn new(dtype: DType, sites: &[LoraSite], parts: &[LoraPart]) -> Result<CpuAdapter> {
        let op = "stage";
        let first = first_slices(sites);
        let mut deltas: Vec<Option<Delta>> = Vec::new();
        deltas.resize_with(sites.iter().map(|site| site.outputs.len()).sum(), || None);
        for part in parts {
            let site = sites.get(part.site).ok_or(Error::Index {
                op,
                what: "site",
                index: part.site,
                limit: sites.len(),
            })?;
            let outputs = *site.outputs.get(part.slice).ok_or(Error::Index {
                op,
                what: "slice",
                index: part.slice,
                limit: site.outputs.len(),
            })?;
            for (what, got, expected) in [
                ("elements of A", part.a.len(), part.lora_rank * site.inputs),
                ("elements of B", part.b.len(), part.lora_rank * outputs),
                ("ranks above 0", part.lora_rank.min(1), 1),
            ] {
                if got != expected {
                    return Err(Error::Shape { op, what, got, expected });
                }
            }
            deltas[first[part.site] + part.slice] = Some(Delta::new(dtype, site, part)?);
        }
        let bytes = deltas.iter().flatten().map(Delta::bytes).sum();
        Ok(CpuAdapter { first, deltas, bytes })
    }

    /// The delta of a slice, if the adapter has one.
    pub(super) fn delta(&self, site: usize, slice: usize) -> Option<&Delta> {
        self.deltas[self.first[site] + slice].as_ref()
    }
}

/// Index of every site's first slice when all slices are counted.
fn first_slices(sites: &[LoraSite]) -> Vec<usize> {
    let mut next = 0;
    sites
        .iter()
        .map(|site| {
            let first = next;
            next += site.outputs.len();
            first
        })
        .collect()
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
