//! The one operation that most of a step's time goes to: `y = x · Wᵀ + bias`, with the rows' own low-rank deltas.

use super::{
    CpuBackend,
    gemm::{Begin, Output, Product, Shrink},
    lora::{CpuSlots, Delta},
    memory::{CpuMat, Line, Panels},
    pool::Shards,
    simd::run,
};
use crate::{DType, Error, LinearLora, Matrix, Result, RowSet, Segment};

/// Multiply-adds that make a chunk worth handing out.
const CHUNK: usize = 1 << 17;

/// Memory between the phases of an operation; grows to the largest step and stays.
#[derive(Default)]
pub(super) struct Scratch {
    /// Padded activations.
    x: Vec<f32>,
    /// Shrunk rows of all pairs of segment and slice.
    t: Vec<Line>,
    pairs: Vec<Pair>,
    units: Vec<Unit>,
}

/// A segment's rows meeting one slice of its adapter.
#[derive(Clone, Copy)]
struct Pair {
    segment: Segment,
    slice: usize,
    /// First column of the slice in `y`.
    column: usize,
    /// Where its shrunk rows are, in f32 of `t`.
    t: usize,
    /// f32 from one shrunk row to the next: the rank, rounded up to whole pairs of bf16.
    stride: usize,
}

/// A piece of work of a phase: panels of the base weight, or a range of rows or panels of a pair.
#[derive(Clone, Copy)]
enum Unit {
    Base { panel: usize, count: usize },
    Shrink { pair: usize, row: usize, rows: usize },
    Expand { pair: usize, panel: usize, count: usize },
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
    pairs: &'a [Pair],
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
    scratch.pairs.clear();
    if let Some(lora) = &lora {
        find_pairs(lora, w, rows, scratch)?;
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
        pairs: &scratch.pairs,
        slots: lora.map(|lora| (lora.slots, lora.site)),
    };
    call.first_phase(&mut scratch.units);
    call.run(&scratch.units);
    if !call.pairs.is_empty() {
        call.second_phase(&mut scratch.units);
        call.run(&scratch.units);
    }
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

/// Lists the pairs of segment and slice that have a delta, and makes room for their shrunk rows.
fn find_pairs(
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
        let adapter = lora.slots.resident(op, segment.slot)?;
        let mut column = 0;
        for (slice, width) in site.outputs.iter().enumerate() {
            if let Some(delta) = adapter.delta(lora.site, slice) {
                let stride = delta.lora_rank.next_multiple_of(2);
                scratch.pairs.push(Pair { segment: *segment, slice, column, t, stride });
                t += (segment.end - segment.start) as usize * stride;
            }
            column += width;
        }
    }
    if scratch.t.len() < t.div_ceil(16) {
        scratch.t.resize(t.div_ceil(16), Line([0; 16]));
    }
    Ok(())
}

impl Call<'_> {
    fn delta(&self, pair: &Pair) -> Option<&Delta> {
        let (slots, site) = self.slots?;
        slots.slots[pair.segment.slot as usize].as_ref()?.delta(site, pair.slice)
    }

    /// The base product and all shrinks: they read the same rows and write to different places.
    fn first_phase(&self, units: &mut Vec<Unit>) {
        units.clear();
        for (i, pair) in self.pairs.iter().enumerate() {
            let rows = (pair.segment.end - pair.segment.start) as usize;
            let per_unit = (CHUNK / (self.w.inputs * pair.stride).max(1)).max(1).next_multiple_of(4);
            units.extend((0..rows).step_by(per_unit).map(|row| Unit::Shrink {
                pair: i,
                row,
                rows: per_unit.min(rows - row),
            }));
        }
        let count = panels_per_unit(self.w, self.rows, self.be.pool.threads());
        let panels = self.w.panels();
        units.extend(
            (0..panels).step_by(count).map(|panel| Unit::Base { panel, count: count.min(panels - panel) }),
        );
    }

    /// All expands: slices and segments have their own columns and rows.
    fn second_phase(&self, units: &mut Vec<Unit>) {
        units.clear();
        for (i, pair) in self.pairs.iter().enumerate() {
            let Some(delta) = self.delta(pair) else { continue };
            let rows = (pair.segment.end - pair.segment.start) as usize;
            let count = panels_per_unit(&delta.b, rows, 1);
            let panels = delta.b.panels();
            units.extend((0..panels).step_by(count).map(|panel| Unit::Expand {
                pair: i,
                panel,
                count: count.min(panels - panel),
            }));
        }
    }

    fn run(&self, units: &[Unit]) {
        self.be.pool.run(units.len(), |i| match units[i] {
            Unit::Base { panel, count } => self.base(panel, count),
            Unit::Shrink { pair, row, rows } => self.shrink(&self.pairs[pair], row, rows),
            Unit::Expand { pair, panel, count } => self.expand(&self.pairs[pair], panel, count),
        });
    }

    fn base(&self, panel: usize, count: usize) {
        let begin = self.bias.map_or(Begin::Zero, Begin::Bias);
        run(
            self.be.tier,
            Product {
                x: self.x.as_ptr().cast(),
                x_stride: self.x_stride,
                rows: self.rows,
                w: self.w,
                panels: panel..panel + count,
                out: Output { y: &self.y, offset: 0, stride: self.w.outputs, begin },
            },
        );
    }

    fn shrink(&self, pair: &Pair, row: usize, rows: usize) {
        let Some(delta) = self.delta(pair) else { return };
        let first = pair.segment.start as usize + row;
        let t_offset = pair.t + row * pair.stride;
        if pair.stride > delta.lora_rank {
            for r in 0..rows {
                // SAFETY: the odd column behind the rank, in rows of this unit.
                let odd = unsafe { self.t.slice(t_offset + r * pair.stride + delta.lora_rank, 1) };
                odd.fill(0.0);
            }
        }
        run(
            self.be.tier,
            Shrink {
                x: self.x.as_ptr().cast::<u8>().wrapping_add(first * self.x_stride),
                x_stride: self.x_stride,
                rows,
                a: &delta.a,
                depth: delta.depth,
                dtype: self.be.dtype,
                t: &self.t,
                t_offset,
                t_stride: pair.stride,
            },
        );
    }

    fn expand(&self, pair: &Pair, panel: usize, count: usize) {
        let Some(delta) = self.delta(pair) else { return };
        let rows = (pair.segment.end - pair.segment.start) as usize;
        run(
            self.be.tier,
            Product {
                x: self.t.0.cast_const().wrapping_add(pair.t).cast(),
                x_stride: pair.stride * size_of::<f32>(),
                rows,
                w: &delta.b,
                panels: panel..panel + count,
                out: Output {
                    y: &self.y,
                    offset: pair.segment.start as usize * self.w.outputs + pair.column,
                    stride: self.w.outputs,
                    begin: Begin::Present,
                },
            },
        );
    }
}

/// Panels that make a chunk: few enough that every thread gets several, enough to be worth a claim.
fn panels_per_unit(w: &Panels, rows: usize, threads: usize) -> usize {
    let work = rows * w.inputs * 16;
    let by_work = CHUNK.div_ceil(work.max(1));
    let by_threads = w.panels().div_ceil(threads * 4);
    by_work.min(by_threads).max(1).next_multiple_of(if w.dtype == DType::F32 { 2 } else { 4 })
}
