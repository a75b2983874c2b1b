//! Base product and low-rank deltas of one linear operation.

use super::{
    CudaBackend, CudaBatch, CudaMat, CudaSlots, CudaVector, CudaWeight, ffi,
    gemm::{Operands, Shape},
    memory::expect,
};
use crate::{Error, LinearLora, Matrix, Result};

/// Blocks that a shrink should have, about: two for each multiprocessor of a large card.
const SHRINK_BLOCKS: usize = 264;
/// Inputs that one block of a shrink reduces, at least: one step of each of its warps.
const MIN_SPLIT_INPUTS: usize = 256;
/// Most rows that `skinny.cu` multiplies faster than cuBLASLt, and than cuBLASLt and a shrink one after the other.
const SKINNY_ROWS: usize = 8;
const SKINNY_ROWS_WITH_DELTAS: usize = 32;

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
    if let Some(bias) = bias {
        expect(op, "elements of the bias", bias.len, weight.outputs)?;
    }
    y.resize(op, x.rows())?;
    let deltas = lora.map(|lora| Deltas::new(x, &lora, y)).transpose()?.flatten();
    let few = if deltas.is_some() { SKINNY_ROWS_WITH_DELTAS } else { SKINNY_ROWS };
    if x.rows() <= few && weight.inputs.is_multiple_of(8) {
        skinny(be, x, (weight, bias), deltas.as_ref(), y)?;
    } else {
        if let Some(deltas) = &deltas {
            deltas.shrink(be)?;
        }
        product(be, x, (weight, bias), y)?;
    }
    match deltas {
        Some(deltas) => deltas.expand(be, y.wide()),
        None => Ok(()),
    }
}

/// The base product and the shrink of a few rows, in one launch.
fn skinny(
    be: &CudaBackend,
    x: &CudaMat,
    (weight, bias): (&CudaWeight, Option<&CudaVector>),
    deltas: Option<&Deltas>,
    y: &CudaMat,
) -> Result<()> {
    let args = ffi::SkinnyArgs {
        x: x.at(),
        w: weight.buffer.at(),
        bias: bias.map_or(0, |bias| bias.buffer.at()),
        y: y.at(),
        rows: x.rows() as i32,
        inputs: weight.inputs as i32,
        outputs: weight.outputs as i32,
    };
    // The kernel does not split the inputs.
    let lora = deltas.map(|deltas| ffi::LoraArgs { splits: 1, ..deltas.args });
    let lora_at = lora.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let max_tiles = deltas.map_or(0, |deltas| deltas.max_tiles as i32);
    // SAFETY: shapes were checked; the tables hold only resident slots of these sites.
    be.launch("linear", x.rows(), |elem, stream| unsafe {
        ffi::lorax_skinny(&raw const args, lora_at, elem, y.wide(), max_tiles, stream)
    })
}

/// The base product of many rows.
fn product(
    be: &CudaBackend,
    x: &CudaMat,
    (weight, bias): (&CudaWeight, Option<&CudaVector>),
    y: &CudaMat,
) -> Result<()> {
    if x.rows() > 0 && be.is_launching() {
        let shape =
            Shape { rows: x.rows(), inputs: weight.inputs, outputs: weight.outputs, wide: y.wide() != 0 };
        be.gemm.run(&be.stream, shape, Operands { x: x.at(), w: weight.buffer.at(), y: y.at() })?;
    }
    let Some(bias) = bias else { return Ok(()) };
    // SAFETY: y has that many rows and columns, the bias that many elements.
    be.launch("linear", y.rows(), |elem, stream| unsafe {
        let (rows, cols) = (y.rows() as i32, y.cols() as i32);
        ffi::lorax_add_bias(elem, y.wide(), y.at(), bias.buffer.at(), rows, cols, stream)
    })
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
        let (max_tiles, tile_rows, pieces) = batch.tiles(lora.rows);
        if max_tiles == 0 {
            return Ok(None);
        }
        let wanted = SHRINK_BLOCKS / pieces.max(1);
        let most = (site.inputs / MIN_SPLIT_INPUTS).min(batch.sums.max_splits(x.rows()));
        let mut first_out = [0; ffi::MAX_SLICES + 1];
        for (i, outputs) in site.outputs.iter().enumerate() {
            first_out[i + 1] = first_out[i] + *outputs as i32;
        }
        let args = ffi::LoraArgs {
            entries: slots.entries_at(lora.site),
            tiles: batch.at.tiles(lora.rows),
            num_tiles: batch.at.num_tiles(lora.rows),
            x: x.at(),
            y: y.at(),
            mid: batch.sums.mid.at(),
            parts: batch.sums.parts.at(),
            arrived: batch.sums.arrived.at(),
            entry_stride: slots.entry_stride() as i32,
            rows: x.rows() as i32,
            inputs: site.inputs as i32,
            out_cols: y.cols() as i32,
            slices: site.outputs.len() as i32,
            splits: wanted.min(most).max(1) as i32,
            first_out,
        };
        Ok(Some(Deltas { args, max_tiles, tile_rows }))
    }

    fn shrink(&self, be: &CudaBackend) -> Result<()> {
        // SAFETY: shapes were checked; the tables hold only resident slots of these sites.
        be.launch("linear", self.max_tiles, |elem, stream| unsafe {
            let (max_tiles, tile_rows) = (self.max_tiles as i32, self.tile_rows as i32);
            ffi::lorax_lora_shrink(&raw const self.args, elem, max_tiles, tile_rows, stream)
        })
    }

    /// Adds the deltas to y.
    fn expand(&self, be: &CudaBackend, wide: i32) -> Result<()> {
        // SAFETY: as in `shrink`.
        be.launch("linear", self.max_tiles, |elem, stream| unsafe {
            ffi::lorax_lora_expand(&raw const self.args, elem, wide, self.max_tiles as i32, stream)
        })
    }
}
