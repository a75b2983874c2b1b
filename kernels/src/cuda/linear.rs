//! GEMM with a base weight, low-rank deltas, and their epilogues.

use std::ops::RangeInclusive;

use super::{
    CudaBackend, CudaBatch, CudaMat, CudaSlots,
    device::Stream,
    ffi,
    gemm::{Operands, Shape},
    lora::Needs,
    memory::expect,
    norm,
};
use crate::{
    Activation, Branch, Error, LinearLora, LogitShape, Matrix, Norm, NormKind, Ops, Output, Projection,
    Residual, Result, RowSet, SiteKind, compose,
};

/// Blocks that a shrink should have, about: two for each multiprocessor of a large GPU.
const SHRINK_BLOCKS: usize = 264;
/// Inputs that one block of a shrink reduces, at least: one step of each of its warps.
const MIN_SPLIT_INPUTS: usize = 256;
/// Most rows of the tiles of small steps; `kRows` in `lora.cu`.
const SMALL_TILE: u32 = 16;
/// Most rows that `skinny.cu` multiplies faster than cuBLASLt, and than cuBLASLt and a shrink one after the other.
const SKINNY_ROWS: usize = 8;
const SKINNY_ROWS_WITH_DELTAS: usize = 32;
/// Rows that `linear_hopper.cu` multiplies faster than either, on the GPU that it is for.
const HOPPER_ROWS: RangeInclusive<usize> = 5..=8;
const HOPPER_ROWS_WITH_DELTAS: RangeInclusive<usize> = 5..=56;

/// Where sums go.
struct Sum<'a> {
    y: &'a mut CudaMat,
    /// Whether they are added to what y holds.
    add: bool,
    /// Whether y may have more columns than the weight has rows: of logits, which become -∞ there.
    spare: bool,
}

impl<'a> Sum<'a> {
    fn store(y: &'a mut CudaMat) -> Sum<'a> {
        Sum { y, add: false, spare: false }
    }

    fn add(y: &'a mut CudaMat) -> Sum<'a> {
        Sum { y, add: true, spare: false }
    }
}

/// [`Ops::linear`]: SwiGLU and the additions to the residual stream are fused, everything else is composed.
pub(super) fn linear(
    be: &CudaBackend,
    x: &CudaMat,
    by: Projection<'_, CudaBackend>,
    out: Output<'_, CudaBackend>,
) -> Result<()> {
    match out {
        Output::Gate { activation, products, y } => gate(be, x, by, Gated { activation, products, y }),
        Output::Residual(to) => residual(be, x, by, to),
        out => compose::linear(be, x, by, out),
    }
}

/// The products, with deltas, in place of what y holds.
pub(super) fn matmul(
    be: &CudaBackend,
    x: &CudaMat,
    by: Projection<'_, CudaBackend>,
    y: &mut CudaMat,
) -> Result<()> {
    match base(be, x, by, Sum::store(y))? {
        Some(deltas) => deltas.expand(be, y),
        None => Ok(()),
    }
}

/// The products, with deltas, added to what y holds.
pub(super) fn matmul_add(
    be: &CudaBackend,
    x: &CudaMat,
    by: Projection<'_, CudaBackend>,
    y: &mut CudaMat,
) -> Result<()> {
    match base(be, x, by, Sum::add(y))? {
        Some(deltas) => deltas.expand(be, y),
        None => Ok(()),
    }
}

/// The products of the output projection, with deltas, scaled and capped.
pub(super) fn logits(
    be: &CudaBackend,
    x: &CudaMat,
    by: Projection<'_, CudaBackend>,
    shape: LogitShape,
    y: &mut CudaMat,
) -> Result<()> {
    y.expect_wide("logits")?;
    if let Some(deltas) = base(be, x, by, Sum { y, add: false, spare: true })? {
        deltas.expand(be, y)?;
    }
    if shape == LogitShape::PLAIN {
        return Ok(());
    }
    let (rows, cols) = (y.rows() as i32, y.cols() as i32);
    let (scale, cap) = (shape.scale, shape.softcap.unwrap_or(0.0));
    // SAFETY: y has that many rows and columns of f32.
    be.launch("logits", y.rows(), |_, stream| unsafe {
        ffi::lorax_shape_logits(y.at(), scale, cap, rows, cols, stream)
    })
}

/// The matrices of [`Output::Gate`].
struct Gated<'a> {
    activation: Activation,
    products: &'a mut CudaMat,
    y: &'a mut CudaMat,
}

/// A gate and an up projection side by side, with their deltas, and the gating.
fn gate(be: &CudaBackend, x: &CudaMat, by: Projection<'_, CudaBackend>, to: Gated<'_>) -> Result<()> {
    let Gated { activation, products, y } = to;
    match base(be, x, by, Sum::store(products))? {
        Some(deltas) if activation == Activation::Silu && deltas.can_gate(products, y) => {
            return deltas.expand_silu_mul(be, products, y);
        }
        Some(deltas) => deltas.expand(be, products)?,
        None => {}
    }
    be.gate(products, activation, y)
}

/// A projection onto the residual stream, with its deltas, and the norm of the stream.
fn residual(
    be: &CudaBackend,
    x: &CudaMat,
    by: Projection<'_, CudaBackend>,
    to: Residual<'_, CudaBackend>,
) -> Result<()> {
    let direct = compose::adds_directly(be, &by, &to);
    let Residual { stream, products, post, scale, branch, next } = to;
    if let Some((norm, y)) = &next {
        norm::expect(stream, norm, y)?;
    }
    if direct {
        let deltas = base(be, x, by, Sum::add(stream))?;
        return match (deltas, next) {
            (Some(deltas), Some((norm, y))) if deltas.can_norm(be, &norm, y) => {
                deltas.expand_norm(be, Normed { stream, products: None, norm, y })
            }
            (deltas, next) => {
                deltas.map_or(Ok(()), |deltas| deltas.expand(be, stream))?;
                next.map_or(Ok(()), |(norm, y)| be.normalize(stream, norm, y))
            }
        };
    }
    expect("linear", "rows of y", stream.rows(), x.rows())?;
    products.expect_wide("linear")?;
    let sums_both = be.ranks() > 1 && post.is_none();
    if sums_both && branch == Branch::First {
        return matmul(be, x, by, products);
    }
    let mut sum = Sum::store(products);
    if sums_both && branch == Branch::Second {
        // What adapters do to products must not be done to those of the first branch. Whether they need whole products may
        // differ between ranks, whether there are adapters does not.
        if has_adapters(&by) {
            be.comm.add(be, sum.y, norm::Added { post: None, scale, stream: &mut *stream, next: None })?;
        } else {
            sum.add = true;
        }
    }
    let deltas = base(be, x, by, sum)?;
    let fusable = post.is_none() && scale == 1.0 && be.comm.can_fuse(x.rows(), products.cols());
    match (deltas, next) {
        (Some(deltas), Some((norm, y))) if fusable && deltas.can_norm(be, &norm, y) => {
            deltas.expand_norm(be, Normed { stream, products: Some(products), norm, y })
        }
        (deltas, next) => {
            deltas.map_or(Ok(()), |deltas| deltas.expand(be, products))?;
            be.comm.add(be, products, norm::Added { post, scale, stream, next })
        }
    }
}

/// Whether some row of the step has an adapter.
fn has_adapters(by: &Projection<'_, CudaBackend>) -> bool {
    by.lora.as_ref().is_some_and(|lora| lora.batch.tiles(lora.rows).0 > 0)
}

/// The base product, added to what `y` holds or in place of it, and the shrink. Returns the deltas that are to be added.
fn base<'a>(
    be: &CudaBackend,
    x: &CudaMat,
    by: Projection<'a, CudaBackend>,
    to: Sum<'_>,
) -> Result<Option<Deltas<'a>>> {
    let op = "linear";
    let (Projection { weight, bias, lora }, Sum { y, add, spare }) = (by, to);
    x.expect_half(op)?;
    x.expect_cols(op, "columns of x", weight.inputs)?;
    y.expect_cols(op, "columns of y", if spare { y.cols().max(weight.outputs) } else { weight.outputs })?;
    if let Some(bias) = bias {
        expect(op, "elements of the bias", bias.len, weight.outputs)?;
    }
    if add {
        y.expect_wide(op)?;
        expect(op, "rows of y", y.rows(), x.rows())?;
    }
    y.resize(op, x.rows())?;
    let deltas = lora.map(|lora| Deltas::new(x, &lora, y)).transpose()?.flatten();
    let deltas = deltas.map(|mut deltas| {
        deltas.args.bias = bias.map_or(0, |bias| bias.buffer.at());
        deltas.args.base_cols = weight.outputs as i32;
        deltas
    });
    let to = Sum { y, add, spare };
    if let Some(kernel) = kernel_of_few_rows(be, x.rows(), weight.inputs, deltas.is_some()) {
        few_rows(be, kernel, x, by, deltas.as_ref(), &to)?;
    } else {
        many_rows(be, x, by, deltas.as_ref(), &to)?;
    }
    if to.y.cols() > weight.outputs {
        let (rows, first, cols) = (to.y.rows() as i32, weight.outputs as i32, to.y.cols() as i32);
        // SAFETY: y has that many rows and columns, of f32 as only logits have spare ones.
        be.launch(op, to.y.rows(), |_, stream| unsafe {
            ffi::lorax_fill_logits(to.y.at(), rows, first, cols, stream)
        })?;
    }
    if let Some(deltas) = &deltas {
        deltas.replace_rows(be, to.y)?;
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
    by: Projection<'_, CudaBackend>,
    deltas: Option<&Deltas<'_>>,
    to: &Sum<'_>,
) -> Result<()> {
    let args = ffi::LinearArgs {
        x: x.at(),
        w: by.weight.buffer.at(),
        bias: by.bias.map_or(0, |bias| bias.buffer.at()),
        y: to.y.at(),
        rows: x.rows() as i32,
        inputs: by.weight.inputs as i32,
        outputs: by.weight.outputs as i32,
        add: i32::from(to.add),
        stride: to.y.cols() as i32,
        unused: 0,
    };
    // The kernel does not split the inputs.
    let lora = deltas.map(|deltas| ffi::LoraArgs { splits: 1, ..deltas.args });
    let lora_at = lora.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let max_tiles = deltas.map_or(0, |deltas| deltas.max_tiles as i32);
    // SAFETY: shapes were checked; the tables hold only resident slots of these sites.
    be.launch("linear", x.rows(), |elem, stream| unsafe {
        kernel(&raw const args, lora_at, elem, to.y.wide(), max_tiles, stream)
    })
}

/// The base product of many rows, and their shrink.
fn many_rows(
    be: &CudaBackend,
    x: &CudaMat,
    by: Projection<'_, CudaBackend>,
    deltas: Option<&Deltas<'_>>,
    to: &Sum<'_>,
) -> Result<()> {
    let Some(deltas) = deltas else { return gemm(be, x, by, to) };
    // Outside of graphs a second stream costs more launches than it saves time; and a replay launches nothing.
    if !deltas.batch.is_capturing() || !be.is_launching() {
        deltas.shrink(be, &be.stream)?;
        return gemm(be, x, by, to);
    }
    // The GEMM first: it takes its multiprocessors, and the shrink those that it leaves.
    be.branch.fork(&be.stream)?;
    gemm(be, x, by, to)?;
    deltas.shrink(be, be.branch.stream())?;
    be.branch.join(&be.stream)
}

/// The base product of many rows.
fn gemm(be: &CudaBackend, x: &CudaMat, by: Projection<'_, CudaBackend>, to: &Sum<'_>) -> Result<()> {
    let (weight, y) = (by.weight, &to.y);
    if x.rows() > 0 && be.is_launching() {
        let (inputs, outputs) = (weight.inputs, weight.outputs);
        let (stride, wide) = (y.cols(), y.wide() != 0);
        let shape = Shape { rows: x.rows(), inputs, outputs, stride, wide, add: to.add };
        be.count_launch();
        be.gemm.run(&be.stream, shape, Operands { x: x.at(), w: weight.buffer.at(), y: y.at() })?;
    }
    let Some(bias) = by.bias else { return Ok(()) };
    // SAFETY: y has that many rows and columns, the bias that many elements.
    be.launch("linear", y.rows(), |elem, stream| unsafe {
        let (rows, cols, stride) = (y.rows() as i32, weight.outputs as i32, y.cols() as i32);
        ffi::lorax_add_bias(elem, y.wide(), y.at(), bias.buffer.at(), rows, cols, stride, stream)
    })
}

/// The deltas of one operation, ready to launch.
struct Deltas<'a> {
    args: ffi::LoraArgs,
    max_tiles: usize,
    tile_rows: u32,
    batch: &'a CudaBatch,
    rows: RowSet,
    kind: SiteKind,
    needs: Needs,
}

/// A residual stream, what is added to it besides deltas, and its norm.
struct Normed<'a> {
    stream: &'a CudaMat,
    products: Option<&'a CudaMat>,
    norm: Norm<'a, CudaBackend>,
    y: &'a mut CudaMat,
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
        slots.expect_members(op, batch)?;
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
            ensembles: batch.ensembles_at(),
            tiles: batch.at.tiles(lora.rows),
            num_tiles: batch.at.num_tiles(lora.rows),
            x: x.at(),
            y: y.at(),
            mid: batch.sums.mid.at(),
            parts: batch.sums.parts.at(),
            arrived: batch.sums.arrived.at(),
            bias: 0,
            entry_stride: slots.entry_stride() as i32,
            rows: x.rows() as i32,
            inputs: site.inputs as i32,
            out_cols: y.cols() as i32,
            slices: site.outputs.len() as i32,
            splits: wanted.min(most).max(1) as i32,
            base_cols: y.cols() as i32,
            first_out,
        };
        let (kind, needs) = (site.kind, slots.needs(batch));
        Ok(Some(Deltas { args, max_tiles, tile_rows, batch, rows: lora.rows, kind, needs }))
    }

    fn affine(&self) -> i32 {
        i32::from(self.needs.affine)
    }

    fn shrink(&self, be: &CudaBackend, stream: &Stream) -> Result<()> {
        // SAFETY: shapes were checked; the tables hold only resident slots of these sites.
        be.launch_on(stream, "linear", self.max_tiles, |elem, stream| unsafe {
            let (max_tiles, tile_rows) = (self.max_tiles as i32, self.tile_rows as i32);
            ffi::lorax_lora_shrink(&raw const self.args, elem, max_tiles, tile_rows, stream)
        })
    }

    /// Puts products with replaced rows of the output projection where those with the base model's are.
    fn replace_rows(&self, be: &CudaBackend, y: &CudaMat) -> Result<()> {
        if self.kind != SiteKind::Head || !self.needs.head_rows {
            return Ok(());
        }
        // SAFETY: as in `shrink`; ids of replaced rows were checked when the adapter was staged.
        be.launch("linear", self.max_tiles, |elem, stream| unsafe {
            ffi::lorax_lora_replace_rows(&raw const self.args, elem, y.wide(), stream)
        })
    }

    /// Adds the deltas to y.
    fn expand(&self, be: &CudaBackend, y: &CudaMat) -> Result<()> {
        // SAFETY: as in `shrink`.
        be.launch("linear", self.max_tiles, |elem, stream| unsafe {
            let (wide, affine, max_tiles) = (y.wide(), self.affine(), self.max_tiles as i32);
            ffi::lorax_lora_expand(&raw const self.args, elem, wide, affine, max_tiles, stream)
        })
    }

    /// Whether `expand_silu_mul` takes these matrices, and is faster than a kernel for each: in large steps it saves
    /// reading and writing gate and up once, in small ones it has too few blocks.
    fn can_gate(&self, gate_up: &CudaMat, y: &CudaMat) -> bool {
        let inner = y.cols();
        let halves = self.args.slices == 2 && self.args.first_out[1] as usize == inner;
        let whole = inner.is_multiple_of(ffi::OUT_BLOCK) && gate_up.cols() == 2 * inner;
        let half_size = gate_up.wide() == 0 && y.wide() == 0;
        let alone = self.batch.ensembles().is_empty();
        // Captured steps, which have room for more tiles than there are, have small ones.
        halves && whole && half_size && alone && self.rows == RowSet::All && self.tile_rows > SMALL_TILE
    }

    /// Adds the deltas to gate and up on their way into `y`; `gate_up` stays as it is.
    fn expand_silu_mul(&self, be: &CudaBackend, gate_up: &CudaMat, y: &mut CudaMat) -> Result<()> {
        y.resize("gate", gate_up.rows())?;
        let tiles = self.batch.all_tiles();
        // SAFETY: as in `shrink`; the tiles cover the rows of `gate_up`, of which `y` has as many.
        be.launch("gate", tiles, |elem, stream| unsafe {
            let (affine, tiles) = (self.affine(), tiles as i32);
            ffi::lorax_lora_expand_silu_mul(&raw const self.args, y.at(), elem, affine, tiles, stream)
        })
    }

    /// Whether `expand_norm` runs here, and takes these outputs and this norm.
    fn can_norm(&self, be: &CudaBackend, norm: &Norm<'_, CudaBackend>, y: &CudaMat) -> bool {
        let outputs = self.args.out_cols as usize;
        let width = outputs.is_multiple_of(ffi::OUT_BLOCK) && outputs <= ffi::MAX_NORMED;
        let plain = norm.kind == NormKind::Rms && norm.bias.is_none() && y.wide() == 0;
        be.comm.hopper() && self.args.slices == 1 && width && plain && self.rows == RowSet::All
    }

    /// Adds products and deltas to a stream, and norms it.
    fn expand_norm(&self, be: &CudaBackend, to: Normed<'_>) -> Result<()> {
        let (op, Normed { stream: sums, products, norm, y }) = ("normalize", to);
        y.resize(op, sums.rows())?;
        let num_tiles = self.batch.at.num_all_tiles();
        let args = ffi::LoraArgs { num_tiles, y: sums.at(), ..self.args };
        let (tiles, tile_rows) = (self.batch.all_tiles(), self.tile_rows as i32);
        let products = products.map_or(0, CudaMat::at);
        // SAFETY: as in `shrink`; the tiles lie within the rows of the stream, of which `y` and the products have as many.
        // Spare rows of a captured step are in none: what `y` has there is never read but for themselves.
        be.launch(op, tiles, |elem, stream| unsafe {
            let (w, y, tiles) = (norm.weight.buffer.at(), y.at(), tiles as i32);
            let (args, eps) = (&raw const args, norm.eps);
            match be.comm.fused(sums.rows(), sums.cols()) {
                Some(peers) => ffi::lorax_expand_norm_ranks_hopper(
                    args,
                    &raw const peers,
                    products,
                    w,
                    eps,
                    y,
                    elem,
                    tiles,
                    tile_rows,
                    stream,
                ),
                None => {
                    ffi::lorax_expand_norm_hopper(args, products, w, eps, y, elem, tiles, tile_rows, stream)
                }
            }
        })
    }
}
