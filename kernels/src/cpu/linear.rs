//! The one operation that most of a step's time goes to: `y = x · Wᵀ + bias`, with the rows' own low-rank deltas, and
//! with the activation behind it where there is one.

use std::ops::Range;

use super::{
    CpuBackend,
    elementwise::{SiluMul, silu_mul},
    gemm::{Begin, Output, Product, Shrink, prefetch},
    lora::{SiteDelta, SliceDelta},
    memory::{CpuMat, GROUP, Line, Panels},
    pool::Shards,
    simd::run,
};
use crate::{Error, LinearLora, Matrix, Result, RowSet, Segment};

/// Multiply-adds of a chunk of the base product, if all threads get several such chunks: the first lines of a chunk come
/// late from memory, since nobody asked for them while the one before was multiplied.
const CHUNK: usize = 1 << 20;
/// Rows times lines of A that make a chunk of the shrink.
const SHRINK_CHUNK: usize = 1 << 12;
/// Lines of an adapter's A that make a chunk of a few rows.
const CHUNK_LINES: usize = 512;

/// Memory between the phases of an operation; grows to the largest step and stays.
#[derive(Default)]
pub(super) struct Scratch {
    /// Padded activations.
    x: Vec<f32>,
    /// Shrunk rows of all deltas.
    t: Vec<Line>,
}

/// A segment whose adapter has a delta here.
struct Delta<'a> {
    segment: Segment,
    site: &'a SiteDelta,
    /// Where its shrunk rows are, in f32 of `t`.
    t: usize,
}

/// A piece of the first phase: rows of a delta's segment, times rows of its A.
struct ShrinkUnit<'a> {
    delta: &'a Delta<'a>,
    rows: (usize, usize),
    a: (usize, usize),
}

/// One slice's part of a delta: what is added to some columns of a segment's rows.
struct Expand<'a> {
    slice: &'a SliceDelta,
    rows: Range<usize>,
    /// Where the slice's part of the first shrunk row is, and f32 from one row to the next.
    t: (usize, usize),
}

/// Everything that the chunks of one call read.
struct Call<'a> {
    be: &'a CpuBackend,
    w: &'a Panels,
    bias: Option<&'a [f32]>,
    x: &'a [f32],
    /// Bytes of a row.
    x_stride: usize,
    rows: usize,
    y: Shards<f32>,
    t: Shards<f32>,
    expands: Vec<Expand<'a>>,
}

pub(super) fn linear(
    be: &CpuBackend,
    x: &CpuMat,
    weight: (&Panels, Option<&[f32]>),
    lora: Option<LinearLora<'_, CpuBackend>>,
    y: &mut CpuMat,
) -> Result<()> {
    let scratch = &mut *be.scratch();
    let call = Call::begin((be, scratch), x, weight, lora, y)?;
    call.for_chunks(call.w.panels(), call.rows, |panels| call.sum([panels]));
    Ok(())
}

/// As the contract says; a chunk is some columns of the gate with those of the projection beside it, so what is
/// multiplied with each other is still in the core's own cache.
pub(super) fn gated_linear(
    be: &CpuBackend,
    x: &CpuMat,
    weight: (&Panels, Option<&[f32]>),
    lora: Option<LinearLora<'_, CpuBackend>>,
    gate_up: &mut CpuMat,
    y: &mut CpuMat,
) -> Result<()> {
    let cols = y.cols();
    if !cols.is_multiple_of(16) || gate_up.cols() != 2 * cols {
        linear(be, x, weight, lora, gate_up)?;
        return silu_mul(be, gate_up, y);
    }
    y.resize("gated_linear", x.rows())?;
    let y = Shards(y.used_mut().as_mut_ptr());
    let scratch = &mut *be.scratch();
    let call = Call::begin((be, scratch), x, weight, lora, gate_up)?;
    let half = cols / 16;
    call.for_chunks(half, 2 * call.rows, |panels| {
        let (first, width) = (panels.start * 16, panels.len() * 16);
        call.sum([panels.clone(), panels.start + half..panels.end + half]);
        for row in 0..call.rows {
            // SAFETY: these columns are this chunk's own, of the sums as of their product.
            let [gate, up, y] = unsafe {
                let sums = |col: usize| call.y.slice(row * 2 * cols + col, width);
                [sums(first), sums(cols + first), y.slice(row * cols + first, width)]
            };
            run(be.tier, SiluMul { gate, up, y });
        }
    });
    Ok(())
}

/// Rows whose number of columns is whole lines of every type, and that number: `x` itself, or a zero-padded copy.
fn padded<'a>(x: &'a CpuMat, copy: &'a mut Vec<f32>) -> (&'a [f32], usize) {
    let (cols, stride) = (x.cols(), x.cols().next_multiple_of(32));
    if stride == cols {
        return (x.used(), stride);
    }
    copy.clear();
    for i in 0..x.rows() {
        copy.extend(x.row(i));
        copy.resize((i + 1) * stride, 0.0);
    }
    (copy, stride)
}

/// Lists the segments that have a delta, and makes room for their shrunk rows.
fn find_deltas<'a>(
    lora: &LinearLora<'a, CpuBackend>,
    w: &Panels,
    rows: usize,
    room: &mut Vec<Line>,
) -> Result<Vec<Delta<'a>>> {
    let op = "linear";
    let segments = match lora.rows {
        RowSet::All => &lora.batch.segments,
        RowSet::Logits => &lora.batch.logit_segments,
    };
    let limit = lora.slots.sites.len();
    let site =
        lora.slots.sites.get(lora.site).ok_or(Error::Index { op, what: "site", index: lora.site, limit })?;
    for (what, got, expected) in [
        ("inputs of the site", site.inputs, w.inputs),
        ("outputs of the site", site.outputs.iter().sum(), w.outputs),
    ] {
        if got != expected {
            return Err(Error::Shape { op, what, got, expected });
        }
    }
    let (mut deltas, mut t) = (Vec::with_capacity(segments.len()), 0);
    for segment in segments {
        if segment.end as usize > rows {
            return Err(Error::Index {
                op,
                what: "row of a segment",
                index: segment.end as usize - 1,
                limit: rows,
            });
        }
        if let Some(site) = lora.slots.resident(op, segment.slot)?.site(lora.site) {
            deltas.push(Delta { segment: *segment, site, t });
            t += (segment.end - segment.start) as usize * site.width();
        }
    }
    if room.len() < t.div_ceil(16) {
        room.resize(t.div_ceil(16), Line([0; 16]));
    }
    Ok(deltas)
}

impl<'a> Delta<'a> {
    fn rows(&self) -> Range<usize> {
        self.segment.start as usize..self.segment.end as usize
    }

    /// The shrink in pieces, by rows and by rows of A.
    fn shrinks(&'a self) -> impl Iterator<Item = ShrinkUnit<'a>> {
        let (rows, width, depth) = (self.rows().len(), self.site.width(), self.site.depth.max(1));
        let a_step = (CHUNK_LINES / depth).max(1).next_multiple_of(4);
        let step = (SHRINK_CHUNK / (depth * a_step.min(width)).max(1)).max(1).next_multiple_of(4);
        (0..rows).step_by(step).flat_map(move |row| {
            (0..width).step_by(a_step).map(move |first| ShrinkUnit {
                delta: self,
                rows: (row, step.min(rows - row)),
                a: (first, a_step.min(width - first)),
            })
        })
    }

    fn expands(&self) -> impl Iterator<Item = Expand<'a>> {
        let (rows, t, width) = (self.rows(), self.t, self.site.width());
        let expand =
            move |slice: &'a SliceDelta| Expand { slice, rows: rows.clone(), t: (t + slice.first, width) };
        self.site.slices.iter().map(expand)
    }
}

impl Expand<'_> {
    /// The panels of B that lie on some panels of the base weight.
    fn panels(&self, base: &Range<usize>) -> Range<usize> {
        let (first, count) = (self.slice.panel, self.slice.b.panels());
        base.start.saturating_sub(first)..base.end.saturating_sub(first).min(count)
    }
}

impl<'a> Call<'a> {
    /// Checks shapes, makes room in `y`, and shrinks the rows that have deltas.
    fn begin(
        (be, scratch): (&'a CpuBackend, &'a mut Scratch),
        x: &'a CpuMat,
        (w, bias): (&'a Panels, Option<&'a [f32]>),
        lora: Option<LinearLora<'a, CpuBackend>>,
        y: &mut CpuMat,
    ) -> Result<Call<'a>> {
        let op = "linear";
        for (what, got, expected) in [
            ("columns of x", x.cols(), w.inputs),
            ("columns of y", y.cols(), w.outputs),
            ("elements of the bias", bias.map_or(w.outputs, <[f32]>::len), w.outputs),
        ] {
            if got != expected {
                return Err(Error::Shape { op, what, got, expected });
            }
        }
        let rows = x.rows();
        y.resize(op, rows)?;
        let deltas = match &lora {
            Some(lora) => find_deltas(lora, w, rows, &mut scratch.t)?,
            None => Vec::new(),
        };
        let (x, x_stride) = padded(x, &mut scratch.x);
        let call = Call {
            be,
            w,
            bias,
            x,
            x_stride: x_stride * size_of::<f32>(),
            rows,
            y: Shards(y.used_mut().as_mut_ptr()),
            t: Shards(scratch.t.as_mut_ptr().cast()),
            expands: deltas.iter().flat_map(Delta::expands).collect(),
        };
        let units: Vec<_> = deltas.iter().flat_map(Delta::shrinks).collect();
        be.pool.run(units.len(), |i| call.shrink(&units[i]));
        Ok(call)
    }

    /// Calls `f` with panels that make a chunk, until all of `panels` had their turn, `rows` times each.
    fn for_chunks(&self, panels: usize, rows: usize, f: impl Fn(Range<usize>) + Sync) {
        let pool = &self.be.pool;
        let count = panels_per_unit((panels, self.w.inputs), rows, pool.threads());
        pool.run(panels.div_ceil(count), |i| f(i * count..((i + 1) * count).min(panels)));
    }

    /// The sums of some panels: the base product, and the deltas while it is in cache.
    fn sum<const N: usize>(&self, parts: [Range<usize>; N]) {
        parts.iter().for_each(|panels| self.prefetch_expands(panels));
        for panels in parts {
            self.base(panels.clone());
            self.expand(&panels);
        }
    }

    fn shrink(&self, unit: &ShrinkUnit<'_>) {
        let (delta, site) = (unit.delta, unit.delta.site);
        let (row, rows) = unit.rows;
        let (first, count) = unit.a;
        run(
            self.be.tier,
            Shrink {
                x: self.x.as_ptr().cast::<u8>().wrapping_add((delta.rows().start + row) * self.x_stride),
                x_stride: self.x_stride,
                rows,
                a: &site.a[first * site.depth..][..count * site.depth],
                depth: site.depth,
                dtype: self.be.dtype,
                t: &self.t,
                t_offset: delta.t + row * site.width() + first,
                t_stride: site.width(),
            },
        );
    }

    /// The base product of some panels.
    fn base(&self, panels: Range<usize>) {
        let begin = self.bias.map_or(Begin::Zero, Begin::Bias);
        run(
            self.be.tier,
            Product {
                x: self.x.as_ptr().cast(),
                x_stride: self.x_stride,
                rows: self.rows,
                w: self.w,
                panels,
                out: Output { y: &self.y, offset: 0, stride: self.w.outputs, begin },
            },
        );
    }

    /// Asks for what the expands of some panels will read, while the base product computes.
    fn prefetch_expands(&self, panels: &Range<usize>) {
        for expand in &self.expands {
            let panels = expand.panels(panels);
            if !panels.is_empty() {
                expand.slice.b.groups(&panels).iter().for_each(|line| prefetch(line));
            }
        }
    }

    /// Adds the deltas to some panels of the base product, while it is in cache.
    fn expand(&self, panels: &Range<usize>) {
        for expand in &self.expands {
            let (panels, slice, (t, t_stride)) = (expand.panels(panels), expand.slice, expand.t);
            if panels.is_empty() {
                continue;
            }
            run(
                self.be.tier,
                Product {
                    x: self.t.0.cast_const().wrapping_add(t).cast(),
                    x_stride: t_stride * size_of::<f32>(),
                    rows: expand.rows.len(),
                    w: &slice.b,
                    panels,
                    out: Output {
                        y: &self.y,
                        offset: expand.rows.start * self.w.outputs + slice.panel * 16,
                        stride: self.w.outputs,
                        begin: Begin::Present,
                    },
                },
            );
        }
    }
}

/// Panels that make a chunk: few enough that every thread gets several.
fn panels_per_unit((panels, inputs): (usize, usize), rows: usize, threads: usize) -> usize {
    let work = rows * inputs * 16;
    let by_work = CHUNK.div_ceil(work.max(1));
    let by_threads = panels.div_ceil(threads * 8);
    by_work.min(by_threads).max(1).next_multiple_of(GROUP)
}
