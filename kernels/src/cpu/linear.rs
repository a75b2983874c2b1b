//! The one operation that most of a step's time goes to: `y = x · Wᵀ + bias`, with the rows' own low-rank deltas.

use std::ops::Range;

use super::{
    CpuBackend,
    gemm::{Output, Product, Shrink, prefetch, prefetch_first},
    lora::SiteDelta,
    memory::{CpuMat, GROUP, Line, Panels, View},
    pool::Shards,
    simd::run,
};
use crate::{Error, LinearLora, Matrix, Projection, Result, RowSet, Segment};

/// Multiply-adds of a chunk of the base product at most, if that leaves it a group of panels.
const CHUNK: usize = 1 << 20;
/// Chunks of a product that every thread gets at least, so that a late thread leaves some to the others.
const CHUNKS: usize = 4;
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

/// A piece of the first phase: rows of a delta's segment, times rows of its A. As in [`Expand`], all that a core must
/// know to begin: what leads to a delta is in nobody's cache, since a whole step has passed since it was used.
struct Unit<'a> {
    /// First row, and how many.
    rows: (usize, usize),
    a: &'a [Line],
    /// Factor of each row of A.
    scales: &'a [f32],
    /// Lines of a row of A.
    depth: usize,
    /// Where the result goes, and f32 from one row to the next.
    t: (usize, usize),
}

/// One slice's part of a delta: what is added to some columns of a segment's rows.
struct Expand<'a> {
    b: View<'a>,
    /// The panel of the base weight that B's first panel lies on.
    panel: usize,
    rows: Range<usize>,
    /// Where the slice's part of the first shrunk row is, and f32 from one row to the next.
    t: (usize, usize),
}

/// Everything that the chunks of one call read.
struct Call<'a> {
    be: &'a CpuBackend,
    w: View<'a>,
    bias: Option<&'a [f32]>,
    x: &'a [f32],
    /// Bytes of a row.
    x_stride: usize,
    rows: usize,
    y: Shards<f32>,
    /// Whether the sums are added to what `y` holds.
    add: bool,
    t: Shards<f32>,
    expands: Vec<Expand<'a>>,
}

/// Where sums go.
pub(super) struct Sum<'a> {
    pub(super) y: &'a mut CpuMat,
    /// Whether they are added to what `y` holds.
    pub(super) add: bool,
}

pub(super) fn linear(be: &CpuBackend, x: &CpuMat, by: Projection<'_, CpuBackend>, to: Sum<'_>) -> Result<()> {
    let scratch = &mut *be.scratch();
    Call::begin((be, scratch), x, by, to)?.sum();
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
    fn shrinks(&self) -> impl Iterator<Item = Unit<'a>> {
        let (segment, t, site) = (self.rows(), self.t, self.site);
        let (width, depth) = (self.site.width(), self.site.depth.max(1));
        let a_step = (CHUNK_LINES / depth).max(1).next_multiple_of(4);
        let step = (SHRINK_CHUNK / (depth * a_step.min(width)).max(1)).max(1).next_multiple_of(4);
        segment.clone().step_by(step).flat_map(move |row| {
            let (rows, t) = (step.min(segment.end - row), t + (row - segment.start) * width);
            site.a.chunks(a_step * depth).enumerate().map(move |(i, a)| Unit {
                rows: (row, rows),
                a,
                scales: &site.scales[i * a_step..],
                depth,
                t: (t + i * a_step, width),
            })
        })
    }

    fn expands(&self) -> impl Iterator<Item = Expand<'a>> {
        let (rows, t, width) = (self.rows(), self.t, self.site.width());
        self.site.slices.iter().map(move |slice| Expand {
            b: slice.b.view(),
            panel: slice.panel,
            rows: rows.clone(),
            t: (t + slice.first, width),
        })
    }
}

impl Unit<'_> {
    /// Asks for the first rows of A.
    fn prefetch(&self) {
        self.a.iter().take(8 * self.depth).for_each(|line| prefetch(line));
    }
}

impl Expand<'_> {
    /// The panels of B that lie on some panels of the base weight.
    fn panels(&self, base: &Range<usize>) -> Range<usize> {
        base.start.saturating_sub(self.panel)..base.end.saturating_sub(self.panel).min(self.b.panels())
    }
}

impl<'a> Call<'a> {
    /// Checks shapes, makes room in `y`, and shrinks the rows that have deltas.
    fn begin(
        (be, scratch): (&'a CpuBackend, &'a mut Scratch),
        x: &'a CpuMat,
        by: Projection<'a, CpuBackend>,
        Sum { y, add }: Sum<'_>,
    ) -> Result<Call<'a>> {
        let op = "linear";
        let (w, bias) = (by.weight, by.bias.map(Vec::as_slice));
        for (what, got, expected) in [
            ("columns of x", x.cols(), w.inputs),
            ("columns of y", y.cols(), w.outputs),
            ("elements of the bias", bias.map_or(w.outputs, <[f32]>::len), w.outputs),
            ("rows of y", if add { y.rows() } else { x.rows() }, x.rows()),
        ] {
            if got != expected {
                return Err(Error::Shape { op, what, got, expected });
            }
        }
        let rows = x.rows();
        y.resize(op, rows)?;
        let deltas = match &by.lora {
            Some(lora) => find_deltas(lora, w, rows, &mut scratch.t)?,
            None => Vec::new(),
        };
        let (x, x_stride) = padded(x, &mut scratch.x);
        let call = Call {
            be,
            w: w.view(),
            bias,
            x,
            x_stride: x_stride * size_of::<f32>(),
            rows,
            y: Shards(y.used_mut().as_mut_ptr()),
            add,
            t: Shards(scratch.t.as_mut_ptr().cast()),
            expands: deltas.iter().flat_map(Delta::expands).collect(),
        };
        let units: Vec<_> = deltas.iter().flat_map(Delta::shrinks).collect();
        be.pool.run(units.len(), |i| {
            // Its own if it is the first of its core, and those of the next while it computes.
            units[i..].iter().take(2).for_each(Unit::prefetch);
            call.shrink(&units[i]);
        });
        Ok(call)
    }

    /// All sums, in chunks of panels.
    fn sum(&self) {
        let (pool, panels) = (&self.be.pool, self.w.panels());
        let by_work = (self.rows * self.w.inputs * panels * 16).div_ceil(CHUNK);
        let groups = panels.div_ceil(GROUP);
        let chunks = by_work.max(pool.threads() * CHUNKS).next_multiple_of(pool.threads()).min(groups);
        let bound = |i: usize| (i * groups / chunks * GROUP).min(panels);
        pool.run(chunks, |i| self.sum_panels(&(bound(i)..bound(i + 1))));
    }

    /// The base product of some panels, and the deltas while it is in cache.
    fn sum_panels(&self, panels: &Range<usize>) {
        prefetch_first(self.w, panels.start, self.rows);
        self.prefetch_expands(panels);
        self.base(panels.clone());
        self.expand(panels);
    }

    fn shrink(&self, unit: &Unit<'_>) {
        let ((row, rows), (t_offset, t_stride)) = (unit.rows, unit.t);
        run(
            self.be.tier,
            Shrink {
                x: self.x.as_ptr().cast::<u8>().wrapping_add(row * self.x_stride),
                x_stride: self.x_stride,
                rows,
                a: unit.a,
                depth: unit.depth,
                dtype: self.be.dtype,
                t: &self.t,
                t_offset,
                t_stride,
            },
        );
        let width = unit.a.len() / unit.depth;
        for row in 0..rows {
            // SAFETY: the unit's own part of its rows' sums.
            let sums = unsafe { self.t.slice(t_offset + row * t_stride, width) };
            sums.iter_mut().zip(unit.scales).for_each(|(sum, scale)| *sum *= scale);
        }
    }

    /// The base product of some panels.
    fn base(&self, panels: Range<usize>) {
        run(
            self.be.tier,
            Product {
                x: self.x.as_ptr().cast(),
                x_stride: self.x_stride,
                rows: self.rows,
                w: self.w,
                panels,
                out: Output { y: &self.y, offset: 0, stride: self.w.outputs, bias: self.bias, add: self.add },
            },
        );
    }

    /// Asks for what the expands of some panels will read, while the base product computes.
    fn prefetch_expands(&self, panels: &Range<usize>) {
        for expand in &self.expands {
            let panels = expand.panels(panels);
            if !panels.is_empty() {
                expand.b.groups(&panels).iter().for_each(|line| prefetch(line));
            }
        }
    }

    /// Adds the deltas to some panels of the base product, while it is in cache.
    fn expand(&self, panels: &Range<usize>) {
        for expand in &self.expands {
            let (panels, (t, t_stride)) = (expand.panels(panels), expand.t);
            if panels.is_empty() {
                continue;
            }
            run(
                self.be.tier,
                Product {
                    x: self.t.0.cast_const().wrapping_add(t).cast(),
                    x_stride: t_stride * size_of::<f32>(),
                    rows: expand.rows.len(),
                    w: expand.b,
                    panels,
                    out: Output {
                        y: &self.y,
                        offset: expand.rows.start * self.w.outputs + expand.panel * 16,
                        stride: self.w.outputs,
                        bias: None,
                        add: true,
                    },
                },
            );
        }
    }
}
