//! The gains of DoRA, by which products are multiplied: the magnitude of each output, divided by the norm of its
//! weights including the delta.

use super::{
    super::{CpuBackend, memory::Panels, pool::Shards},
    CpuAdapter, LookupDelta, SiteChange, SliceDelta, SliceVectors, unpack_row,
};
use crate::{Error, LoraSite, Result, SiteKind};

/// The gains of each slice in [`SiteChange::vectors`], with a factor for each output; `None` for a slice without a
/// magnitude.
#[derive(Debug)]
pub(crate) struct Gains(pub(crate) Vec<Option<Vec<f32>>>);

/// The number of outputs of a chunk.
const CHUNK: usize = 16;

impl CpuAdapter {
    /// Computes the gains, which depend on the base model's weights. An adapter that is loaded again has them already.
    pub(crate) fn complete(&self, be: &CpuBackend, sites: &[LoraSite], weights: &[&Panels]) -> Result<()> {
        for (i, (change, site)) in self.sites.iter().zip(sites).enumerate() {
            let Some(change) = change else { continue };
            if change.vectors.iter().all(|vectors| vectors.magnitude.is_none()) || change.gains().is_some() {
                continue;
            }
            let (op, limit) = ("load", weights.len());
            let weight = weights.get(i).ok_or(Error::Index { op, what: "weight", index: i, limit })?;
            let expected = match site.kind {
                SiteKind::Lookup => site.outputs.iter().sum(),
                SiteKind::Linear | SiteKind::Head => site.inputs,
            };
            if weight.inputs != expected {
                return Err(Error::Shape { op, what: "columns of a weight", got: weight.inputs, expected });
            }
            let gains = change.vectors.iter().map(|vectors| {
                let magnitude = vectors.magnitude.as_ref()?;
                let squares = match site.kind {
                    SiteKind::Lookup => of_table(weight, change.lookup.as_ref()),
                    SiteKind::Linear | SiteKind::Head => of_slice(be, weight, change, vectors),
                };
                Some(magnitude.iter().zip(squares).map(|(m, square)| m / square.sqrt()).collect())
            });
            // Another thread may have set the same result before.
            let _ = change.gains.set(Gains(gains.collect()));
        }
        Ok(())
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
            delta.add(token, &mut row);
        }
        squares.iter_mut().zip(&row).for_each(|(square, x)| *square += x * x);
    }
    squares
}
