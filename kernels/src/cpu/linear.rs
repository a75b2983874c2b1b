//! The one operation that most of a step's time goes to: `y = x · Wᵀ + bias`, with the rows' own low-rank deltas.

use std::ops::Range;

use super::{
    CpuBackend,
    gemm::{Begin, Output, Product, Shrink, prefetch},
    lora::{CpuSlots, SiteDelta, SliceDelta},
    memory::{CpuMat, GROUP, Line, Panels},
    pool::Shards,
    simd::run,
};
use crate::{Error, LinearLora, Matrix, Result, RowSet, Segment};

/// Multiply-adds of a chunk of the base product, if all threads get several such chunks: the first lines of a chunk come
/// late from memory, since nobody asked for them while the one before was multiplied.
const CHUNK: usize = 1 << 20;
/// Multiply-adds of a chunk of the shrink.
const SHRINK_CHUNK: usize = 1 << 17;
/// Lines of an adapter's A that make a chunk of a few rows.
const CHUNK_LINES: usize = 512;

/// Memory between the phases of an operation; grows to the largest step and stays.
#[derive(Default)]
pub(super) struct Scratch {
    /// Padded activations.
    x: Vec<f32>,
    /// Shrunk rows of all deltas.
    t: Vec<Line>,
    deltas: Vec<Delta>,
    shrinks: Vec<Unit>,
}

/// A segment whose adapter has a delta here.
#[derive(Clone, Copy)]
struct Delta {
    segment: Segment,
    /// Where its shrunk rows are, in f32 of `t`.
    t: usize,
}

/// A piece of the first phase: rows of a delta's segment, times rows of its A.
#[derive(Clone, Copy)]
struct Unit {
    delta: usize,
    rows: (usize, usize),
    a: (usize, usize),
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
    deltas: &'a [Delta],
    slots: Option<(&'a CpuSlots, usize)>,
}

pub(super) fn linear(
    be: &CpuBackend,
    x: &CpuMat,
    w: &Panels,
    bias: Option<&[f32]>,
    lora: Option<LinearLora<'_, CpuBackend>>,
    y: &mut CpuMat,
) -> Result<()> {
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
    let scratch = &mut *be.scratch();
    scratch.deltas.clear();
    if let Some(lora) = &lora {
        find_deltas(lora, w, rows, scratch)?;
    }
    let t = Shards(scratch.t.as_mut_ptr().cast());
    let (x, x_stride) = padded(x, &mut scratch.x);
    let call = Call {
        be,
        w,
        bias,
        x,
        x_stride: x_stride * size_of::<f32>(),
        rows,
        y: Shards(y.used_mut().as_mut_ptr()),
        t,
        deltas: &scratch.deltas,
        slots: lora.map(|lora| (lora.slots, lora.site)),
    };
    if !call.deltas.is_empty() {
        call.list_shrinks(&mut scratch.shrinks);
        be.pool.run(scratch.shrinks.len(), |i| call.shrink(scratch.shrinks[i]));
    }
    let count = panels_per_unit(w, rows, be.pool.threads());
    be.pool.run(w.panels().div_ceil(count), |i| {
        let panels = i * count..((i + 1) * count).min(w.panels());
        call.prefetch_expands(&panels);
        call.base(panels.clone());
        call.expand(&panels);
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
fn find_deltas(
    lora: &LinearLora<'_, CpuBackend>,
    w: &Panels,
    rows: usize,
    scratch: &mut Scratch,
) -> Result<()> {
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
    let mut t = 0;
    for segment in segments {
        if segment.end as usize > rows {
            return Err(Error::Index {
                op,
                what: "row of a segment",
                index: segment.end as usize - 1,
                limit: rows,
            });
        }
        if let Some(delta) = lora.slots.resident(op, segment.slot)?.site(lora.site) {
            scratch.deltas.push(Delta { segment: *segment, t });
            t += (segment.end - segment.start) as usize * delta.width();
        }
    }
    if scratch.t.len() < t.div_ceil(16) {
        scratch.t.resize(t.div_ceil(16), Line([0; 16]));
    }
    Ok(())
}

impl Call<'_> {
    fn site(&self, delta: &Delta) -> Option<&SiteDelta> {
        let (slots, site) = self.slots?;
        slots.slots[delta.segment.slot as usize].as_ref()?.site(site)
    }

    /// Splits the shrinks by rows and by rows of A.
    fn list_shrinks(&self, units: &mut Vec<Unit>) {
        units.clear();
        for (i, delta) in self.deltas.iter().enumerate() {
            let Some(site) = self.site(delta) else { continue };
            let (rows, width) = ((delta.segment.end - delta.segment.start) as usize, site.width());
            let a_step = (CHUNK_LINES / site.depth.max(1)).max(1).next_multiple_of(4);
            let step = (SHRINK_CHUNK / (self.w.inputs * a_step.min(width)).max(1)).max(1).next_multiple_of(4);
            for row in (0..rows).step_by(step) {
                units.extend((0..width).step_by(a_step).map(|first| Unit {
                    delta: i,
                    rows: (row, step.min(rows - row)),
                    a: (first, a_step.min(width - first)),
                }));
            }
        }
    }

    fn shrink(&self, unit: Unit) {
        let delta = &self.deltas[unit.delta];
        let Some(site) = self.site(delta) else { return };
        let (row, rows) = unit.rows;
        let (first, count) = unit.a;
        let x_row = delta.segment.start as usize + row;
        run(
            self.be.tier,
            Shrink {
                x: self.x.as_ptr().cast::<u8>().wrapping_add(x_row * self.x_stride),
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

    /// All B that meet some panels of the base weight: the delta, its width, the slice, and the panels of the slice.
    fn slices(
        &self,
        panels: &Range<usize>,
    ) -> impl Iterator<Item = (&Delta, usize, &SliceDelta, Range<usize>)> {
        let panels = panels.clone();
        self.deltas.iter().filter_map(|delta| Some((delta, self.site(delta)?))).flat_map(
            move |(delta, site)| {
                let panels = panels.clone();
                site.slices.iter().filter_map(move |slice| {
                    let first = panels.start.max(slice.panel);
                    let end = panels.end.min(slice.panel + slice.b.panels());
                    (first < end)
                        .then(|| (delta, site.width(), slice, first - slice.panel..end - slice.panel))
                })
            },
        )
    }

    /// Asks for what the expands of some panels will read, while the base product computes.
    fn prefetch_expands(&self, panels: &Range<usize>) {
        for (_, _, slice, panels) in self.slices(panels) {
            slice.b.groups(&panels).iter().for_each(|line| prefetch(line));
        }
    }

    /// Adds the deltas to some panels of the base product, while it is in cache.
    fn expand(&self, panels: &Range<usize>) {
        for (delta, width, slice, panels) in self.slices(panels) {
            let start = delta.segment.start as usize;
            run(
                self.be.tier,
                Product {
                    x: self.t.0.cast_const().wrapping_add(delta.t + slice.first).cast(),
                    x_stride: width * size_of::<f32>(),
                    rows: delta.segment.end as usize - start,
                    w: &slice.b,
                    panels,
                    out: Output {
                        y: &self.y,
                        offset: start * self.w.outputs + slice.panel * 16,
                        stride: self.w.outputs,
                        begin: Begin::Present,
                    },
                },
            );
        }
    }
}

/// Panels that make a chunk: few enough that every thread gets several.
fn panels_per_unit(w: &Panels, rows: usize, threads: usize) -> usize {
    let work = rows * w.inputs * 16;
    let by_work = CHUNK.div_ceil(work.max(1));
    let by_threads = w.panels().div_ceil(threads * 8);
    by_work.min(by_threads).max(1).next_multiple_of(GROUP)
}
