//! The gains of DoRA, by which products are multiplied: the magnitude of each output, divided by the norm of its
//! weights including the delta.

use std::sync::Arc;

use super::{
    super::{CpuBackend, memory::Panels, pool::Shards},
    CpuAdapter, LookupDelta, SiteChange, SliceDelta, SliceVectors, unpack_row,
};
use crate::{Error, LoraSite, Result, SiteKind, group::sum_of_posts};

/// The gains of each slice in [`SiteChange::vectors`], with a factor for each output; `None` for a slice without a
/// magnitude.
#[derive(Debug)]
pub(crate) struct Gains(pub(crate) Vec<Option<Vec<f32>>>);

/// The squared norms that belong to the gains.
pub(super) type Squares = Vec<Option<Vec<f32>>>;

/// The number of outputs of a chunk.
const CHUNK: usize = 16;

impl CpuAdapter {
    /// Computes the gains, which depend on the base model's weights, except those that depend on other ranks' columns. An
    /// adapter that is loaded again has them already.
    pub(crate) fn complete(&self, be: &CpuBackend, sites: &[LoraSite], weights: &[&Panels]) -> Result<()> {
        for (i, (change, site)) in self.sites.iter().zip(sites).enumerate() {
            let Some(change) = change.as_ref().filter(|change| change.has_magnitude()) else { continue };
            let (op, limit) = ("load", weights.len());
            let weight = weights.get(i).ok_or(Error::Index { op, what: "weight", index: i, limit })?;
            let expected = match site.kind {
                SiteKind::Lookup => site.outputs.iter().sum(),
                SiteKind::Linear | SiteKind::Head => site.inputs,
            };
            if weight.inputs != expected {
                return Err(Error::Shape { op, what: "columns of a weight", got: weight.inputs, expected });
            }
            let squares = change.squares.get_or_init(|| {
                let squares = change.vectors.iter().map(|vectors| {
                    vectors.magnitude.as_ref().map(|_| match site.kind {
                        SiteKind::Lookup => of_table(weight, change.lookup.as_ref()),
                        SiteKind::Linear | SiteKind::Head => of_slice(be, weight, change, vectors),
                    })
                });
                squares.collect()
            });
            if !site.is_partial {
                change.gains.get_or_init(|| change.gains_of(squares));
            }
        }
        Ok(())
    }

    /// The squares in this rank's columns, for the other ranks; `None` if they have all columns themselves.
    pub(crate) fn partial_squares(&self) -> Option<Vec<u8>> {
        let squares = self.partial.iter().filter_map(|site| self.sites[*site].as_ref()?.squares.get());
        let bytes = squares.flatten().flatten().flatten().flat_map(|square| square.to_le_bytes());
        (!self.partial.is_empty()).then(|| bytes.collect())
    }

    /// Computes the remaining gains from the squares of all ranks, in their order. If one of them has none, the slot will
    /// not be used, and there are no gains. Errors: a rank has another number of squares.
    pub(crate) fn finish(&self, of_ranks: &[Arc<[u8]>]) -> Result<()> {
        if of_ranks.iter().any(|bytes| bytes.is_empty()) {
            return Ok(());
        }
        let partial = || self.partial.iter().filter_map(|site| self.sites[*site].as_ref());
        let own = partial().filter_map(|change| change.squares.get());
        let mut sums = sum_of_posts(of_ranks, own.flatten().flatten().map(Vec::len).sum())?.into_iter();
        for change in partial() {
            let Some(own) = change.squares.get() else { continue };
            let mut squares = own.clone();
            squares.iter_mut().flatten().flatten().zip(&mut sums).for_each(|(square, sum)| *square = sum);
            change.gains.get_or_init(|| change.gains_of(&squares));
        }
        Ok(())
    }
}

impl SiteChange {
    fn gains_of(&self, squares: &Squares) -> Gains {
        let gains = self.vectors.iter().zip(squares).map(|(vectors, squares)| {
            let pairs = vectors.magnitude.as_ref()?.iter().zip(squares.as_ref()?);
            Some(pairs.map(|(magnitude, square)| magnitude / square.sqrt()).collect())
        });
        Gains(gains.collect())
    }
}

/// The squared norms of the rows of `W + scale · B · A` that belong to a slice.
fn of_slice(be: &CpuBackend, weight: &Panels, change: &SiteChange, vectors: &SliceVectors) -> Vec<f32> {
    let inputs = weight.inputs;
    let delta = &change.delta;
    let slice = delta.slices.iter().find(|slice| slice.column == vectors.columns.start);
    let a: Vec<Vec<f32>> = slice.map_or_else(Vec::new, |SliceDelta { first, b, .. }| {
        let rows = (*first..first + b.inputs).map(|row| &delta.a[row * delta.depth..][..delta.depth]);
        rows.map(|row| unpack_row(be.dtype, row, inputs)).collect()
    });
    let count = vectors.columns.len().min(weight.outputs.saturating_sub(vectors.columns.start));
    // Outputs without a row of the base weight are never multiplied with a gain.
    let mut squares = vec![1.0; vectors.columns.len()];
    let shards = Shards(squares.as_mut_ptr());
    be.pool.run(count.div_ceil(CHUNK), |chunk| {
        let outputs = chunk * CHUNK..count.min((chunk + 1) * CHUNK);
        let mut row = vec![0.0; inputs];
        // SAFETY: chunks have their own outputs.
        let squares = unsafe { shards.slice(outputs.start, outputs.len()) };
        for (output, square) in outputs.zip(squares) {
            weight.read_row(vectors.columns.start + output, &mut row);
            if let Some(SliceDelta { first, column, b }) = slice {
                b.each_of_row(column % 16 + output, a.len(), |rank, b| {
                    let factor = delta.scales[first + rank] * b;
                    row.iter_mut().zip(&a[rank]).for_each(|(x, a)| *x += factor * a);
                });
            }
            *square = row.iter().map(|x| x * x).sum();
        }
    });
    squares
}

/// The squared norms of the columns of a table, its delta included, over the tokens of the adapter's vocabulary.
fn of_table(table: &Panels, delta: Option<&LookupDelta>) -> Vec<f32> {
    let mut squares = vec![0.0; table.inputs];
    let mut row = vec![0.0; table.inputs];
    for token in 0..delta.map_or(table.outputs, |delta| table.outputs.min(delta.a.outputs)) {
        table.read_row(token, &mut row);
        if let Some(delta) = delta {
            delta.add(token, 1.0, &mut row);
        }
        squares.iter_mut().zip(&row).for_each(|(square, x)| *square += x * x);
    }
    squares
}
