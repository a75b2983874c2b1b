//! Adapters in host memory, where steps read them. They are not padded to a common rank: each A keeps its number of
//! rows, and each B its number of columns.

mod gains;
mod stage;

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use super::memory::{Line, Lines, Panels, of_pair};
use crate::{DType, Error, LoraShape, LoraSite, Result, SiteKind};

pub(super) use gains::Gains;
use gains::Squares;

/// The change that one adapter makes at one site.
#[derive(Debug)]
pub(super) struct SiteChange {
    /// Low-rank deltas of a product.
    pub(super) delta: SiteDelta,
    /// The low-rank delta of a lookup.
    pub(super) lookup: Option<LookupDelta>,
    /// The magnitudes and biases of slices.
    pub(super) vectors: Vec<SliceVectors>,
    /// Rows of the weight that are the adapter's own.
    pub(super) rows: Option<OwnRows>,
    /// The squared norms of the weights that have a magnitude, in this rank's columns. They depend on the base weight,
    /// and are computed when the adapter is loaded for the first time.
    squares: OnceLock<Squares>,
    /// The factors that magnitudes give, once the squares of all columns are known.
    gains: OnceLock<Gains>,
}

/// The vectors of a slice, with an element for each output.
#[derive(Debug)]
pub(super) struct SliceVectors {
    /// The slice's columns of the site's output.
    pub(super) columns: Range<usize>,
    pub(super) magnitude: Option<Vec<f32>>,
    pub(super) bias: Option<Vec<f32>>,
}

/// An adapter's own rows of the embedding table or of the output projection.
#[derive(Debug)]
pub(super) struct OwnRows {
    /// Their indices in ascending order. `None`: they replace the whole weight, from row 0.
    pub(super) ids: Option<Vec<u32>>,
    pub(super) values: Panels,
}

impl OwnRows {
    /// The index in `values` of row `id`; `None` if this row is the base model's. `Err` if there is no such row.
    pub(super) fn find(&self, id: usize) -> std::result::Result<Option<usize>, usize> {
        match &self.ids {
            None if id < self.values.outputs => Ok(Some(id)),
            None => Err(self.values.outputs),
            Some(ids) => Ok(ids.binary_search(&(id as u32)).ok()),
        }
    }
}

/// A low-rank delta of a table: `scale · Aᵀ[token] · Bᵀ`.
#[derive(Debug)]
pub(super) struct LookupDelta {
    pub(super) scale: f32,
    /// Aᵀ, a row for each token.
    pub(super) a: Panels,
    /// Bᵀ, a row for each rank.
    pub(super) b: Panels,
}

impl LookupDelta {
    /// Adds the delta of a token, times `weight`, to a row.
    pub(super) fn add(&self, token: usize, weight: f32, row: &mut [f32]) {
        if token < self.a.outputs {
            self.a.each_of_row(token, self.b.outputs, |rank, a| {
                self.b.each_of_row(rank, row.len(), |k, b| row[k] += weight * self.scale * a * b);
            });
        }
    }
}

/// The low-rank deltas of one adapter at one site.
#[derive(Debug)]
pub(super) struct SiteDelta {
    /// The A of all slices, one after the other. Each has zero rows up to whole lines of its B. Rows are stored along
    /// the inputs and padded to whole lines: a line has 16 f32, or 32 bf16, of which lane i holds the elements i and i
    /// + 16.
    pub(super) a: Lines,
    /// Lines of one row of A.
    pub(super) depth: usize,
    /// The scale of the delta, for each row of A.
    pub(super) scales: Vec<f32>,
    pub(super) slices: Vec<SliceDelta>,
}

/// The B of one slice.
#[derive(Debug)]
pub(super) struct SliceDelta {
    /// The slice's first row of A.
    pub(super) first: usize,
    /// The first column of the site's output that B has a row for.
    pub(super) column: usize,
    /// Panels over the outputs of the slice. They are aligned with the base weight's panels: if the slice begins inside
    /// of one, the outputs before it are zero.
    pub(super) b: Panels,
}

impl SliceDelta {
    /// The panel of the site's base weight that corresponds to B's first panel.
    pub(super) fn panel(&self) -> usize {
        self.column / 16
    }
}

impl SiteDelta {
    /// The number of rows of A, which is the number of elements of a shrunk row.
    pub(super) fn width(&self) -> usize {
        self.a.len() / self.depth.max(1)
    }
}

fn a_elements_per_line(dtype: DType) -> usize {
    if dtype == DType::F32 { 16 } else { 32 }
}

/// The number of rows that A takes, padding included.
fn a_rows(dtype: DType, rank: usize) -> usize {
    rank.next_multiple_of(Panels::inputs_per_line(dtype))
}

/// The first `count` elements of a row of A.
fn unpack_row(dtype: DType, lines: &[Line], count: usize) -> Vec<f32> {
    let element = |k: usize| match dtype {
        DType::F32 => f32::from_bits(lines[k / 16].0[k % 16]),
        _ => of_pair(lines[k / 32].0[k % 16], k % 32 >= 16),
    };
    (0..count).map(element).collect()
}

impl SiteChange {
    fn has_magnitude(&self) -> bool {
        self.vectors.iter().any(|vectors| vectors.magnitude.is_some())
    }

    /// Whether it only adds to what the base model computes.
    pub(super) fn is_sum(&self) -> bool {
        !self.has_magnitude() && self.rows.is_none()
    }

    /// The factors that magnitudes give; `None` if there are no magnitudes.
    pub(super) fn gains(&self) -> Option<&Gains> {
        self.gains.get()
    }
}

/// One adapter: its changes by site.
#[derive(Debug)]
pub struct CpuAdapter {
    sites: Vec<Option<SiteChange>>,
    pub(super) bytes: usize,
    /// The number of its content.
    pub(super) content: u64,
    /// The sites with a magnitude of which this rank has only some columns.
    partial: Vec<usize>,
}

impl CpuAdapter {
    /// The change at a site, if there is one.
    pub(super) fn site(&self, site: usize) -> Option<&SiteChange> {
        self.sites[site].as_ref()
    }
}

/// Bytes of an adapter of these shapes.
pub(super) fn bytes(dtype: DType, sites: &[LoraSite], shapes: &[LoraShape]) -> Result<usize> {
    let vectors = shapes.iter().map(|shape| {
        let [_, outputs] = shape.of(sites)?;
        // A magnitude and its gain, a bias, and the indices of replaced rows.
        let vectors = 2 * usize::from(shape.has_magnitude) + usize::from(shape.has_bias);
        Ok((vectors * outputs + shape.rows) * size_of::<f32>())
    });
    Ok(vectors.sum::<Result<usize>>()? + line_bytes(dtype, sites, shapes)?)
}

/// Bytes of the matrices of an adapter of these shapes.
fn line_bytes(dtype: DType, sites: &[LoraSite], shapes: &[LoraShape]) -> Result<usize> {
    let panels = |outputs: usize, inputs: usize| outputs.div_ceil(16) * Panels::depth(dtype, inputs);
    let lines = shapes.iter().map(|shape| {
        let [inputs, outputs] = shape.of(sites)?;
        let (site, rank) = (&sites[shape.site], shape.lora_rank);
        // A slice may begin inside of a panel.
        let before = site.columns(shape.slice).start % 16;
        Ok(match site.kind {
            SiteKind::Lookup => panels(inputs, rank) + panels(rank, outputs) + panels(shape.rows, outputs),
            SiteKind::Linear | SiteKind::Head => {
                let a = a_rows(dtype, rank) * inputs.div_ceil(a_elements_per_line(dtype));
                a + panels(before + outputs, rank) + panels(shape.rows, inputs)
            }
        })
    });
    Ok(lines.sum::<Result<usize>>()? * size_of::<Line>())
}

/// The resident adapters.
#[derive(Debug)]
pub struct CpuSlots {
    pub(super) sites: Vec<LoraSite>,
    pub(super) slots: Vec<Option<Arc<CpuAdapter>>>,
    pub(super) loaded: Vec<u32>,
    /// Slots that wait for what other ranks have to tell.
    pub(super) waiting: Vec<u32>,
}

impl CpuSlots {
    /// Puts an adapter into a slot, or empties it: whatever was loaded there is not any more. Errors: there is no slot.
    pub(super) fn put(
        &mut self,
        op: &'static str,
        slot: u32,
        adapter: Option<Arc<CpuAdapter>>,
    ) -> Result<()> {
        let (index, limit) = (slot as usize, self.slots.len());
        *self.slots.get_mut(index).ok_or(Error::Index { op, what: "slot", index, limit })? = adapter;
        self.loaded.retain(|other| *other != slot);
        self.waiting.retain(|other| *other != slot);
        Ok(())
    }

    /// The adapter in a slot that rows use. Errors: the slot is empty.
    pub(super) fn resident(&self, op: &'static str, slot: u32) -> Result<&CpuAdapter> {
        let limit = self.slots.len();
        let slot = slot as usize;
        let adapter = self.slots.get(slot).ok_or(Error::Index { op, what: "slot", index: slot, limit })?;
        adapter.as_deref().ok_or(Error::EmptySlot { op, slot })
    }

    /// A site by its index. Errors: there is none.
    pub(super) fn site(&self, op: &'static str, site: usize) -> Result<&LoraSite> {
        let limit = self.sites.len();
        self.sites.get(site).ok_or(Error::Index { op, what: "site", index: site, limit })
    }
}
