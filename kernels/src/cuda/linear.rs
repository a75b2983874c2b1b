//! Base product and low-rank deltas of one linear operation.

use super::{
    CudaBackend, CudaBatch, CudaMat, CudaSlots, CudaVector, CudaWeight, ffi,
    gemm::{Operands, Shape},
    memory::expect,
};
use crate::{Error, LinearLora, Matrix, Result};

/// Blocks that a shrink should have, about: two for each multiprocessor of a large card.
const SHRINK_BLOCKS: usize = 264;
/// Inputs that one block of a shrink reduces, at least.
const MIN_SPLIT_INPUTS: usize = 512;

pub(super) fn linear(
    be: &CudaBackend,
    x: &CudaMat,
    (weight, bias): (&CudaWeight, Option<&CudaVector>),
    lora: Option<LinearLora<'_, CudaBackend>>,
    y: &mut CudaMat,
) -> Result<()> {
    let op = "linear";
    x.expect_half(op)?;
    x.expect_cols(op, "columns of x", weight.inputs)?;
    y.expect_cols(op, "columns of y", weight.outputs)?;
    y.resize(op, x.rows())?;
    let deltas = lora.map(|lora| Deltas::new(x, &lora, y)).transpose()?.flatten();
    if let Some(deltas) = &deltas {
        deltas.shrink_aside(be)?;
    }
    if x.rows() > 0 && be.is_launching() {
        let shape =
            Shape { rows: x.rows(), inputs: weight.inputs, outputs: weight.outputs, wide: y.wide() != 0 };
        be.gemm.run(&be.stream, shape, Operands { x: x.at(), w: weight.buffer.at(), y: y.at() })?;
    }
    if let Some(bias) = bias {
        expect(op, "elements of the bias", bias.len, weight.outputs)?;
        // SAFETY: y has that many rows and columns, the bias that many elements.
        be.launch(op, y.rows(), |elem, stream| unsafe {
            let (rows, cols) = (y.rows() as i32, y.cols() as i32);
            ffi::lorax_add_bias(elem, y.wide(), y.at(), bias.buffer.at(), rows, cols, stream)
        })?;
    }
    match deltas {
        Some(deltas) => deltas.expand(be, y.wide()),
        None => Ok(()),
    }
}

/// The deltas of one operation, ready to launch.
struct Deltas {
    args: ffi::LoraArgs,
    max_tiles: usize,
    tile_rows: u32,
}

impl Deltas {
    /// None if no row has an adapter.
    fn new(x: &CudaMat, lora: &LinearLora<'_, CudaBackend>, y: &CudaMat) -> Result<Option<Deltas>> {
        let op = "linear";
        let (slots, batch): (&CudaSlots, &CudaBatch) = (lora.slots, lora.batch);
        let limit = slots.sites.len();
        let site = slots.sites.get(lora.site);
        let site = site.ok_or(Error::Index { op, what: "site", index: lora.site, limit })?;
        x.expect_cols(op, "inputs of the site", site.inputs)?;
        y.expect_cols(op, "outputs of the site", site.outputs.iter().sum())?;
        batch.expect_rows(op, lora.rows, x.rows())?;
        for &slot in batch.slots(lora.rows) {
            slots.expect_resident(op, slot)?;
        }
        let (max_tiles, tile_rows, tiles) = batch.tiles(lora.rows);
        if max_tiles == 0 {
            return Ok(None);
        }
        let slices = site.outputs.len();
        let wanted = (SHRINK_BLOCKS / (max_tiles * slices)).min(site.inputs / MIN_SPLIT_INPUTS);
        let splits = wanted.min(batch.max_splits(x.rows())).max(1);
        let mut first_out = [0; ffi::MAX_SLICES + 1];
        for (i, outputs) in site.outputs.iter().enumerate() {
            first_out[i + 1] = first_out[i] + *outputs as i32;
        }
        let args = ffi::LoraArgs {
            entries: slots.entries_at(lora.site),
            tiles,
            num_tiles: batch.at.num_tiles(lora.rows),
            x: x.at(),
            y: y.at(),
            mid: batch.mid.at(),
            entry_stride: slots.entry_stride() as i32,
            rows: x.rows() as i32,
            inputs: site.inputs as i32,
            out_cols: y.cols() as i32,
            slices: slices as i32,
            splits: splits as i32,
            first_out,
        };
        Ok(Some(Deltas { args, max_tiles, tile_rows }))
    }

    /// Launches the shrink beside what the main stream does next.
    fn shrink_aside(&self, be: &CudaBackend) -> Result<()> {
        be.fork()?;
        // SAFETY: shapes were checked; the tables hold only resident slots of these sites.
        be.launch_aside("linear", |elem, stream| unsafe {
            let tile_rows = self.tile_rows as i32;
            ffi::lorax_lora_shrink(&raw const self.args, elem, self.max_tiles as i32, tile_rows, stream)
        })
    }

    /// Adds the deltas to y, once both the shrink and the base product are done.
    fn expand(&self, be: &CudaBackend, wide: i32) -> Result<()> {
        be.join()?;
        // SAFETY: as in `shrink_aside`.
        be.launch("linear", self.max_tiles, |elem, stream| unsafe {
            ffi::lorax_lora_expand(&raw const self.args, elem, wide, self.max_tiles as i32, stream)
        })
    }
}
