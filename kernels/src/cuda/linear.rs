//! Base product and low-rank deltas of one linear operation.

use std::ops::RangeInclusive;

use super::{
    CudaBackend, CudaBatch, CudaMat, CudaSlots, CudaVector, CudaWeight,
    device::Stream,
    ffi,
    gemm::{Operands, Shape},
    memory::expect,
};
use crate::{Backend, Error, LinearLora, Matrix, Projection, Result, RowSet};

/// Blocks that a shrink should have, about: two for each multiprocessor of a large card.
const SHRINK_BLOCKS: usize = 264;
/// Inputs that one block of a shrink reduces, at least: one step of each of its warps.
const MIN_SPLIT_INPUTS: usize = 256;
/// Most rows of the tiles of small steps; `kRows` in `lora.cu`.
const SMALL_TILE: u32 = 16;
/// Most rows that `skinny.cu` multiplies faster than cuBLASLt, and than cuBLASLt and a shrink one after the other.
const SKINNY_ROWS: usize = 8;
const SKINNY_ROWS_WITH_DELTAS: usize = 32;
/// Rows that `linear_hopper.cu` multiplies faster than either, on the card that it is for.
const HOPPER_ROWS: RangeInclusive<usize> = 5..=8;
const HOPPER_ROWS_WITH_DELTAS: RangeInclusive<usize> = 5..=56;

pub(super) fn linear(
    be: &CudaBackend,
    x: &CudaMat,
    by: Projection<'_, CudaBackend>,
    (y, add): (&mut CudaMat, bool),
) -> Result<()> {
    match base(be, x, by, (y, add))? {
        Some(deltas) => deltas.expand(be, y),
        None => Ok(()),
    }
}

/// A gate and an up projection side by side, with their deltas, and the gating.
pub(super) fn gated_linear(
    be: &CudaBackend,
    x: &CudaMat,
    by: Projection<'_, CudaBackend>,
    (gate_up, y): (&mut CudaMat, &mut CudaMat),
) -> Result<()> {
    match base(be, x, by, (gate_up, false))? {
        Some(deltas) if deltas.can_gate(gate_up, y) => return deltas.expand_silu_mul(be, gate_up, y),
        Some(deltas) => deltas.expand(be, gate_up)?,
        None => {}
    }
    be.silu_mul(gate_up, y)
}

/// A projection onto the residual stream, with its deltas, and the norm of the stream.
pub(super) fn add_linear_norm(
    be: &CudaBackend,
    x: &CudaMat,
    by: Projection<'_, CudaBackend>,
    residual: &mut CudaMat,
    ((norm, eps), y): ((&CudaVector, f32), &mut CudaMat),
) -> Result<()> {
    expect_norm(residual, norm, y)?;
    match base(be, x, by, (residual, true))? {
        Some(deltas) if be.hopper && deltas.can_norm() => {
            return deltas.expand_norm(be, residual, (norm, eps), y);
        }
        Some(deltas) => deltas.expand(be, residual)?,
        None => {}
    }
    be.rms_norm(residual, norm, eps, y)
}

/// Refuses weights and a result that are not of the stream's width: before anything is added to it.
pub(super) fn expect_norm(x: &CudaMat, w: &CudaVector, y: &CudaMat) -> Result<()> {
    let op = "rms_norm";
    x.expect_wide(op)?;
    y.expect_half(op)?;
    y.expect_cols(op, "columns of y", x.cols())?;
    expect(op, "weights", w.len, x.cols())
}

/// The base product, added to what `y` holds or in place of it, and the shrink. Returns the deltas that are to be added.
fn base<'a>(
    be: &CudaBackend,
    x: &CudaMat,
    by: Projection<'a, CudaBackend>,
    (y, add): (&mut CudaMat, bool),
) -> Result<Option<Deltas<'a>>> {
    let op = "linear";
    let Projection { weight, bias, lora } = by;
    x.expect_half(op)?;
    x.expect_cols(op, "columns of x", weight.inputs)?;
    y.expect_cols(op, "columns of y", weight.outputs)?;
    if let Some(bias) = bias {
        expect(op, "elements of the bias", bias.len, weight.outputs)?;
    }
    if add {
        y.expect_wide(op)?;
        expect(op, "rows of y", y.rows(), x.rows())?;
    }
    y.resize(op, x.rows())?;
    let deltas = lora.map(|lora| Deltas::new(x, &lora, y)).transpose()?.flatten();
    if let Some(kernel) = kernel_of_few_rows(be, x.rows(), weight.inputs, deltas.is_some()) {
        few_rows(be, kernel, x, (weight, bias), deltas.as_ref(), (y, add))?;
    } else {
        many_rows(be, x, (weight, bias), deltas.as_ref(), (y, add))?;
    }
    Ok(deltas)
}

/// The kernel that multiplies so many rows, and shrinks them beside it, faster than cuBLASLt; none: cuBLASLt does.
fn kernel_of_few_rows(
    be: &CudaBackend,
    rows: usize,
    inputs: usize,
    deltas: bool,
) -> Option<ffi::LinearLauncher> {
    let (skinny, hopper) = match deltas {
        false => (SKINNY_ROWS, HOPPER_ROWS),
        true => (SKINNY_ROWS_WITH_DELTAS, HOPPER_ROWS_WITH_DELTAS),
    };
    if !inputs.is_multiple_of(8) {
        return None;
    }
    if be.hopper && hopper.contains(&rows) {
        return Some(ffi::lorax_linear_hopper);
    }
    (rows <= skinny).then_some(ffi::lorax_skinny)
}

/// The base product and the shrink of a few rows, in one launch.
fn few_rows(
    be: &CudaBackend,
    kernel: ffi::LinearLauncher,
    x: &CudaMat,
    (weight, bias): (&CudaWeight, Option<&CudaVector>),
    deltas: Option<&Deltas<'_>>,
    (y, add): (&CudaMat, bool),
) -> Result<()> {
    let args = ffi::LinearArgs {
        x: x.at(),
        w: weight.buffer.at(),
        bias: bias.map_or(0, |bias| bias.buffer.at()),
        y: y.at(),
        rows: x.rows() as i32,
        inputs: weight.inputs as i32,
        outputs: weight.outputs as i32,
        add: i32::from(add),
    };
    // The kernel does not split the inputs.
    let lora = deltas.map(|deltas| ffi::LoraArgs { splits: 1, ..deltas.args });
    let lora_at = lora.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let max_tiles = deltas.map_or(0, |deltas| deltas.max_tiles as i32);
    // SAFETY: shapes were checked; the tables hold only resident slots of these sites.
    be.launch("linear", x.rows(), |elem, stream| unsafe {
        kernel(&raw const args, lora_at, elem, y.wide(), max_tiles, stream)
    })
}

/// The base product of many rows, and their shrink.
fn many_rows(
    be: &CudaBackend,
    x: &CudaMat,
    weight: (&CudaWeight, Option<&CudaVector>),
    deltas: Option<&Deltas<'_>>,
    y: (&CudaMat, bool),
) -> Result<()> {
    let Some(deltas) = deltas else { return product(be, x, weight, y) };
    // Beside the large products of other steps there is no room for a shrink; and a replay launches nothing.
    if !deltas.batch.is_recording() || !be.is_launching() {
        deltas.shrink(be, &be.stream)?;
        return product(be, x, weight, y);
    }
    // The product first: it takes its multiprocessors, and the shrink those that it leaves.
    be.branch.fork(&be.stream)?;
    product(be, x, weight, y)?;
    deltas.shrink(be, be.branch.stream())?;
    be.branch.join(&be.stream)
}

/// The base product of many rows.
fn product(
    be: &CudaBackend,
    x: &CudaMat,
    (weight, bias): (&CudaWeight, Option<&CudaVector>),
    (y, add): (&CudaMat, bool),
) -> Result<()> {
    if x.rows() > 0 && be.is_launching() {
        let (inputs, outputs) = (weight.inputs, weight.outputs);
        let shape = Shape { rows: x.rows(), inputs, outputs, wide: y.wide() != 0, add };
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
struct Deltas<'a> {
    args: ffi::LoraArgs,
    max_tiles: usize,
    tile_rows: u32,
    batch: &'a CudaBatch,
    rows: RowSet,
}

impl<'a> Deltas<'a> {
    /// None if no row has an adapter.
    fn new(x: &CudaMat, lora: &LinearLora<'a, CudaBackend>, y: &CudaMat) -> Result<Option<Deltas<'a>>> {
        let op = "linear";
        let (slots, batch): (&CudaSlots, &'a CudaBatch) = (lora.slots, lora.batch);
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
        Ok(Some(Deltas { args, max_tiles, tile_rows, batch, rows: lora.rows }))
    }

    fn shrink(&self, be: &CudaBackend, stream: &Stream) -> Result<()> {
        // SAFETY: shapes were checked; the tables hold only resident slots of these sites.
        be.launch_on(stream, "linear", self.max_tiles, |elem, stream| unsafe {
            let (max_tiles, tile_rows) = (self.max_tiles as i32, self.tile_rows as i32);
            ffi::lorax_lora_shrink(&raw const self.args, elem, max_tiles, tile_rows, stream)
        })
    }

    /// Adds the deltas to y.
    fn expand(&self, be: &CudaBackend, y: &CudaMat) -> Result<()> {
        // SAFETY: as in `shrink`.
        be.launch("linear", self.max_tiles, |elem, stream| unsafe {
            ffi::lorax_lora_expand(&raw const self.args, elem, y.wide(), self.max_tiles as i32, stream)
        })
    }

    /// Whether `expand_silu_mul` takes these matrices, and is faster than a kernel for each: in large steps it saves
    /// reading and writing gate and up once, in small ones it has too few blocks.
    fn can_gate(&self, gate_up: &CudaMat, y: &CudaMat) -> bool {
        let inner = y.cols();
        let halves = self.args.slices == 2 && self.args.first_out[1] as usize == inner;
        let whole = inner.is_multiple_of(ffi::OUT_BLOCK) && gate_up.cols() == 2 * inner;
        let half_size = gate_up.wide() == 0 && y.wide() == 0;
        // Recorded steps, which have room for more tiles than there are, have small ones.
        halves && whole && half_size && self.rows == RowSet::All && self.tile_rows > SMALL_TILE
    }

    /// Adds the deltas to gate and up on their way into `y`; `gate_up` stays as it is.
    fn expand_silu_mul(&self, be: &CudaBackend, gate_up: &CudaMat, y: &mut CudaMat) -> Result<()> {
        y.resize("silu_mul", gate_up.rows())?;
        let tiles = self.batch.all_tiles();
        // SAFETY: as in `shrink`; the tiles cover the rows of `gate_up`, of which `y` has as many.
        be.launch("silu_mul", tiles, |elem, stream| unsafe {
            ffi::lorax_lora_expand_silu_mul(&raw const self.args, y.at(), elem, tiles as i32, stream)
        })
    }

    /// Whether `expand_norm` takes these outputs.
    fn can_norm(&self) -> bool {
        let outputs = self.args.out_cols as usize;
        self.args.slices == 1
            && outputs.is_multiple_of(ffi::OUT_BLOCK)
            && outputs <= ffi::MAX_NORMED
            && self.rows == RowSet::All
    }

    /// Adds the deltas to `residual`, and norms it.
    fn expand_norm(
        &self,
        be: &CudaBackend,
        residual: &CudaMat,
        (norm, eps): (&CudaVector, f32),
        y: &mut CudaMat,
    ) -> Result<()> {
        let op = "rms_norm";
        y.resize(op, residual.rows())?;
        let args = ffi::LoraArgs { num_tiles: self.batch.at.num_all_tiles(), ..self.args };
        let (tiles, tile_rows) = (self.batch.all_tiles(), self.tile_rows as i32);
        // SAFETY: as in `shrink`; the tiles lie within the rows of `residual`, of which `y` has as many. Spare rows of a
        // recorded step are in none: what `y` has there is never read but for themselves.
        be.launch(op, tiles, |elem, stream| unsafe {
            let (w, tiles) = (norm.buffer.at(), tiles as i32);
            ffi::lorax_expand_norm_hopper(&raw const args, w, eps, y.at(), elem, tiles, tile_rows, stream)
        })
    }
}
