//! `matmul`: the GEMM `y = x · Wᵀ + bias` with the rows' own low-rank deltas, which takes most of a step's time.

use std::ops::Range;

use super::{
    CpuBackend,
    gemm::{Gemm, Output, Shrink, prefetch, prefetch_first},
    lora::{OwnRows, SiteChange, SiteDelta},
    memory::{CpuMat, GROUP, Line, Panels, View},
    pool::Shards,
    simd::run,
};
use crate::{
    Error, LinearLora, Matrix, Projection, Result, RowSet, Segment, SiteKind,
    batch::{ensembles, is_ensemble},
};

/// The largest number of multiply-adds of a chunk of the base GEMM, unless one group of panels has more.
const CHUNK: usize = 1 << 20;
/// The smallest number of chunks of each thread, so that others can steal some from a thread that is late.
const CHUNKS: usize = 4;
/// The size of a chunk of the shrink: rows times lines of A.
const SHRINK_CHUNK: usize = 1 << 12;
/// The size of a chunk of the shrink of few rows: lines of A.
const CHUNK_LINES: usize = 512;

/// Scratch memory of an operation, which grows to the size of the largest step and is kept.
#[derive(Default)]
pub(super) struct Scratch {
    /// Padded activations.
    x: Vec<f32>,
    /// The shrunk rows (x · Aᵀ) of all deltas.
    t: Vec<Line>,
    /// Products that a magnitude scales before they are stored or added, laid out as the output.
    products: Vec<Line>,
    /// Products with rows of the weight that are the adapter's own.
    own: Vec<Line>,
}

/// A segment whose adapter changes something at the operation's site.
struct Change<'a> {
    segment: Segment,
    site: &'a SiteChange,
    /// Offset of its shrunk rows in `t`, in f32.
    t: usize,
    /// Offset of its products with the adapter's own rows in `own`, in f32.
    own: usize,
}

/// A chunk of the shrink: some rows of a segment, times some rows of its A. Like [`Expand`], it has everything that a
/// core needs without following pointers to the adapter, which is in no cache any more since the step before.
struct Unit<'a> {
    /// The first row, and the number of rows.
    rows: (usize, usize),
    a: &'a [Line],
    /// Factor of each row of A, beside the weight of the adapter.
    scales: &'a [f32],
    weight: f32,
    /// Lines of a row of A.
    depth: usize,
    /// Offset and stride of the result in `t`, in f32.
    t: (usize, usize),
}

/// The expand of one slice of a delta, which is added to some columns of a segment's rows.
struct Expand<'a> {
    b: View<'a>,
    /// The panel of the base weight that B's first panel lies on.
    panel: usize,
    rows: Range<usize>,
    /// Offset and stride of the slice's shrunk rows in `t`, in f32.
    t: (usize, usize),
    /// Whether a magnitude scales the sums.
    scaled: bool,
}

/// The products of a segment with rows of the weight that are the adapter's own.
struct Own<'a> {
    rows: Range<usize>,
    weight: &'a OwnRows,
    /// Offset and stride of the products in `own`, in f32.
    place: (usize, usize),
}

/// What is done to the sums of a segment after its deltas.
struct Finish<'a> {
    rows: Range<usize>,
    change: &'a SiteChange,
    /// The factor of the bias.
    weight: f32,
}

/// The arguments that all chunks of one call share.
struct Call<'a> {
    be: &'a CpuBackend,
    w: View<'a>,
    bias: Option<&'a [f32]>,
    x: &'a [f32],
    /// Bytes from one row to the next.
    x_stride: usize,
    rows: usize,
    y: Shards<f32>,
    /// The number of columns of `y`.
    stride: usize,
    /// Whether the sums are added to what `y` holds.
    add: bool,
    t: Shards<f32>,
    /// Laid out as `y`, with the rows of segments that a magnitude scales.
    products: Shards<f32>,
    own: Shards<f32>,
    expands: Vec<Expand<'a>>,
    /// Segments whose sums have to be scaled by gains or get a bias after their deltas.
    finishes: Vec<Finish<'a>>,
    replaced: Vec<Own<'a>>,
}

/// What is done with the sums.
pub(super) enum Sum<'a> {
    /// They are stored.
    Store(&'a mut CpuMat),
    /// They are added to the matrix.
    Add(&'a mut CpuMat),
    /// They are stored as logits: columns without a row of the weight become -∞.
    Logits(&'a mut CpuMat),
}

pub(super) fn linear(be: &CpuBackend, x: &CpuMat, by: Projection<'_, CpuBackend>, to: Sum<'_>) -> Result<()> {
    let scratch = &mut *be.scratch();
    Call::begin((be, scratch), x, by, to)?.sum();
    Ok(())
}

/// Pads rows with zeros to whole lines of every type, in a copy if necessary. Returns the rows and their stride.
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

impl Scratch {
    /// Reserves memory for changes, and for as many products as the output has elements.
    fn reserve(&mut self, changes: &[Change<'_>], elements: usize) {
        let [t, own] = changes.last().map_or([0; 2], Change::ends);
        reserve(&mut self.t, t);
        reserve(&mut self.own, own);
        if changes.iter().any(Change::is_scaled) {
            reserve(&mut self.products, elements);
        }
    }
}

/// Reserves memory for `count` f32.
fn reserve(room: &mut Vec<Line>, count: usize) {
    if room.len() < count.div_ceil(16) {
        room.resize(count.div_ceil(16), Line([0; 16]));
    }
}

/// Finds the segments whose adapters change something at the site.
fn find_changes<'a>(
    lora: &LinearLora<'a, CpuBackend>,
    w: &Panels,
    [rows, cols]: [usize; 2],
) -> Result<Vec<Change<'a>>> {
    let op = "linear";
    let segments = match lora.rows {
        RowSet::All => &lora.batch.segments,
        RowSet::Logits => &lora.batch.logit_segments,
    };
    let site = lora.slots.site(op, lora.site)?;
    for (what, got, expected) in [
        ("inputs of the site", site.inputs, w.inputs),
        ("outputs of the site", site.outputs.iter().sum(), cols),
        ("sites of a table", usize::from(site.kind == SiteKind::Lookup), 0),
    ] {
        if got != expected {
            return Err(Error::Shape { op, what, got, expected });
        }
    }
    let (mut changes, mut t, mut own) = (Vec::with_capacity(segments.len()), 0, 0);
    for members in ensembles(segments) {
        let must_add = is_ensemble(members);
        for segment in members {
            if segment.end as usize > rows {
                let index = segment.end as usize - 1;
                return Err(Error::Index { op, what: "row of a segment", index, limit: rows });
            }
            let Some(site) = lora.slots.resident(op, segment.slot)?.site(lora.site) else { continue };
            if must_add && !site.is_sum() {
                return Err(Error::NoMember { op, slot: segment.slot as usize });
            }
            let change = Change { segment: *segment, site, t, own };
            [t, own] = change.ends();
            changes.push(change);
        }
    }
    Ok(changes)
}

impl<'a> Change<'a> {
    fn rows(&self) -> Range<usize> {
        self.segment.start as usize..self.segment.end as usize
    }

    /// Whether a magnitude scales the products.
    fn is_scaled(&self) -> bool {
        self.site.gains().is_some()
    }

    /// What its sums need after their deltas, if they have to be scaled or get a bias.
    fn finish(&self) -> Option<Finish<'a>> {
        let (change, weight) = (self.site, self.segment.weight);
        (!change.vectors.is_empty()).then(|| Finish { rows: self.rows(), change, weight })
    }

    /// The ends of its part of `t` and of `own`, in f32.
    fn ends(&self) -> [usize; 2] {
        let own = self.site.rows.as_ref().map_or(0, |own| own.values.outputs.next_multiple_of(16));
        [self.t + self.rows().len() * self.site.delta.width(), self.own + self.rows().len() * own]
    }

    fn own(&self) -> Option<Own<'a>> {
        let weight = self.site.rows.as_ref()?;
        let stride = weight.values.outputs.next_multiple_of(16);
        Some(Own { rows: self.rows(), weight, place: (self.own, stride) })
    }

    /// Divides the shrink into chunks, by rows and by rows of A.
    fn shrinks(&self) -> impl Iterator<Item = Unit<'a>> {
        let (segment, t, site): (_, _, &SiteDelta) = (self.rows(), self.t, &self.site.delta);
        let weight = self.segment.weight;
        let (width, depth) = (site.width(), site.depth.max(1));
        let a_step = (CHUNK_LINES / depth).max(1).next_multiple_of(4);
        let step = (SHRINK_CHUNK / (depth * a_step.min(width)).max(1)).max(1).next_multiple_of(4);
        segment.clone().step_by(step).flat_map(move |row| {
            let (rows, t) = (step.min(segment.end - row), t + (row - segment.start) * width);
            site.a.chunks(a_step * depth).enumerate().map(move |(i, a)| Unit {
                rows: (row, rows),
                a,
                scales: &site.scales[i * a_step..],
                weight,
                depth,
                t: (t + i * a_step, width),
            })
        })
    }

    fn expands(&self) -> impl Iterator<Item = Expand<'a>> {
        let (rows, t, width) = (self.rows(), self.t, self.site.delta.width());
        let scaled = self.is_scaled();
        self.site.delta.slices.iter().map(move |slice| Expand {
            b: slice.b.view(),
            panel: slice.panel(),
            rows: rows.clone(),
            t: (t + slice.first, width),
            scaled,
        })
    }
}

/// Calls `f` for those elements of a row for which a vector has an element, too. The vector's first element belongs to
/// column `first`.
fn each_shared(
    row: &mut [f32],
    columns: &Range<usize>,
    (first, vector): (usize, &[f32]),
    mut f: impl FnMut(&mut f32, f32),
) {
    let start = first.max(columns.start);
    let end = (first + vector.len()).min(columns.end);
    if start < end {
        let row = &mut row[start - columns.start..end - columns.start];
        row.iter_mut().zip(&vector[start - first..end - first]).for_each(|(x, by)| f(x, *by));
    }
}

impl Unit<'_> {
    /// Prefetches the first rows of A.
    fn prefetch(&self) {
        self.a.iter().take(8 * self.depth).for_each(|line| prefetch(line));
    }
}

impl Expand<'_> {
    /// The panels of B that correspond to some panels of the base weight.
    fn panels(&self, base: &Range<usize>) -> Range<usize> {
        base.start.saturating_sub(self.panel)..base.end.saturating_sub(self.panel).min(self.b.panels())
    }
}

impl<'a> Call<'a> {
    /// Checks shapes, resizes the output, and computes the shrink of all deltas.
    fn begin(
        (be, scratch): (&'a CpuBackend, &'a mut Scratch),
        x: &'a CpuMat,
        by: Projection<'a, CpuBackend>,
        to: Sum<'_>,
    ) -> Result<Call<'a>> {
        let op = "linear";
        let (w, bias) = (by.weight, by.bias.map(Vec::as_slice));
        let (is_logits, add) = (matches!(to, Sum::Logits(_)), matches!(to, Sum::Add(_)));
        let (Sum::Store(y) | Sum::Add(y) | Sum::Logits(y)) = to;
        let least = if is_logits { y.cols().max(w.outputs) } else { w.outputs };
        for (what, got, expected) in [
            ("columns of x", x.cols(), w.inputs),
            ("columns of y", y.cols(), least),
            ("elements of the bias", bias.map_or(w.outputs, <[f32]>::len), w.outputs),
            ("rows of y", if add { y.rows() } else { x.rows() }, x.rows()),
        ] {
            if got != expected {
                return Err(Error::Shape { op, what, got, expected });
            }
        }
        let rows = x.rows();
        y.resize(op, rows)?;
        let stride = y.cols();
        let changes = match &by.lora {
            Some(lora) => find_changes(lora, w, [rows, stride])?,
            None => Vec::new(),
        };
        scratch.reserve(&changes, rows * stride);
        let (x, x_stride) = padded(x, &mut scratch.x);
        let call = Call {
            be,
            w: w.view(),
            bias,
            x,
            x_stride: x_stride * size_of::<f32>(),
            rows,
            y: Shards(y.used_mut().as_mut_ptr()),
            stride,
            add,
            t: Shards(scratch.t.as_mut_ptr().cast()),
            products: Shards(scratch.products.as_mut_ptr().cast()),
            own: Shards(scratch.own.as_mut_ptr().cast()),
            expands: changes.iter().flat_map(Change::expands).collect(),
            finishes: changes.iter().filter_map(Change::finish).collect(),
            replaced: changes.iter().filter_map(Change::own).collect(),
        };
        let units: Vec<_> = changes.iter().flat_map(Change::shrinks).collect();
        be.pool.run(units.len(), |i| {
            // Prefetches this unit, in case it is the core's first one, and the next unit.
            units[i..].iter().take(2).for_each(Unit::prefetch);
            call.shrink(&units[i]);
        });
        Ok(call)
    }

    /// Computes all sums, in chunks of panels.
    fn sum(&self) {
        let (pool, panels) = (&self.be.pool, self.w.panels());
        let by_work = (self.rows * self.w.inputs * panels * 16).div_ceil(CHUNK);
        let groups = panels.div_ceil(GROUP);
        let chunks = by_work.max(pool.threads() * CHUNKS).next_multiple_of(pool.threads()).min(groups);
        let bound = |i: usize| (i * groups / chunks * GROUP).min(panels);
        pool.run(chunks, |i| self.sum_panels(&(bound(i)..bound(i + 1))));
        if self.stride > self.w.outputs {
            for row in 0..self.rows {
                // SAFETY: no other thread writes now.
                let row = unsafe { self.y.slice(row * self.stride, self.stride) };
                row[self.w.outputs..].fill(f32::NEG_INFINITY);
            }
        }
        self.replaced.iter().for_each(|own| self.replace(own));
    }

    /// Replaces the products with rows of the base weight by those with the adapter's own rows, which have no deltas.
    fn replace(&self, own: &Own<'_>) {
        let (values, (place, stride)) = (own.weight.values.view(), own.place);
        self.be.pool.run(values.panels(), |panel| {
            let out = Output { y: &self.own, offset: place, stride, bias: None, add: false };
            let x = self.x.as_ptr().cast::<u8>().wrapping_add(own.rows.start * self.x_stride);
            let (x_stride, rows) = (self.x_stride, own.rows.len());
            run(self.be.tier, Gemm { x, x_stride, rows, w: values, panels: panel..panel + 1, out });
        });
        for (i, row) in own.rows.clone().enumerate() {
            // SAFETY: no other thread reads or writes now.
            let (y, products) = unsafe {
                let products = self.own.slice(place + i * stride, values.outputs);
                (self.y.slice(row * self.stride, self.stride), products)
            };
            if own.weight.ids.is_none() {
                y.fill(f32::NEG_INFINITY);
            }
            for (k, product) in products.iter().enumerate() {
                let id = own.weight.ids.as_ref().map_or(k, |ids| ids[k] as usize);
                y[id] = product + self.bias.and_then(|bias| bias.get(id)).unwrap_or(&0.0);
            }
        }
    }

    /// Computes the base GEMM of some panels, and adds the deltas while the result is in cache.
    fn sum_panels(&self, panels: &Range<usize>) {
        prefetch_first(self.w, panels.start, self.rows);
        self.prefetch_expands(panels);
        self.base(panels);
        self.expand(panels);
        let columns = panels.start * 16..(panels.end * 16).min(self.w.outputs);
        self.finishes.iter().for_each(|finish| self.finish(finish, &columns));
    }

    /// Scales some columns of a segment's products by the gains, and adds the biases.
    fn finish(&self, finish: &Finish<'_>, columns: &Range<usize>) {
        let (change, weight) = (finish.change, finish.weight);
        for row in finish.rows.clone() {
            let at = row * self.stride + columns.start;
            // SAFETY: the columns are this chunk's alone.
            let y = unsafe { self.y.slice(at, columns.len()) };
            if let Some(gains) = change.gains() {
                // SAFETY: as above. If there are gains, `products` is as large as `y`.
                let products = unsafe { self.products.slice(at, columns.len()) };
                for (vectors, gain) in change.vectors.iter().zip(&gains.0) {
                    let Some(gain) = gain else { continue };
                    each_shared(products, columns, (vectors.columns.start, gain), |x, gain| *x *= gain);
                }
                if let Some(bias) = self.bias {
                    products.iter_mut().zip(&bias[columns.clone()]).for_each(|(x, bias)| *x += bias);
                }
                if self.add {
                    y.iter_mut().zip(&*products).for_each(|(y, x)| *y += x);
                } else {
                    y.copy_from_slice(products);
                }
            }
            for vectors in &change.vectors {
                let Some(bias) = &vectors.bias else { continue };
                each_shared(y, columns, (vectors.columns.start, bias), |y, bias| *y += weight * bias);
            }
        }
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
            // SAFETY: this part of the sums belongs to the unit.
            let sums = unsafe { self.t.slice(t_offset + row * t_stride, width) };
            sums.iter_mut().zip(unit.scales).for_each(|(sum, scale)| *sum *= unit.weight * scale);
        }
    }

    /// Computes the base GEMM of some panels. Runs of rows that a magnitude scales go to `products`, all others to `y`.
    fn base(&self, panels: &Range<usize>) {
        let mut next = 0;
        for Finish { rows, .. } in self.finishes.iter().filter(|finish| finish.change.gains().is_some()) {
            self.base_of(next..rows.start, panels, false);
            self.base_of(rows.clone(), panels, true);
            next = rows.end;
        }
        self.base_of(next..self.rows, panels, false);
    }

    fn base_of(&self, rows: Range<usize>, panels: &Range<usize>, scaled: bool) {
        if rows.is_empty() {
            return;
        }
        let (y, bias, add) =
            if scaled { (&self.products, None, false) } else { (&self.y, self.bias, self.add) };
        let out = Output { y, offset: rows.start * self.stride, stride: self.stride, bias, add };
        let x = self.x.as_ptr().cast::<u8>().wrapping_add(rows.start * self.x_stride);
        let (x_stride, panels) = (self.x_stride, panels.clone());
        run(self.be.tier, Gemm { x, x_stride, rows: rows.len(), w: self.w, panels, out });
    }

    /// Prefetches what the expands of some panels read, so that it arrives while the base GEMM is computed.
    fn prefetch_expands(&self, panels: &Range<usize>) {
        for expand in &self.expands {
            let panels = expand.panels(panels);
            if !panels.is_empty() {
                expand.b.groups(&panels).iter().for_each(|line| prefetch(line));
            }
        }
    }

    /// Adds the deltas to some panels of the output, while these are in cache.
    fn expand(&self, panels: &Range<usize>) {
        for expand in &self.expands {
            let (panels, (t, t_stride)) = (expand.panels(panels), expand.t);
            if panels.is_empty() {
                continue;
            }
            run(
                self.be.tier,
                Gemm {
                    x: self.t.0.cast_const().wrapping_add(t).cast(),
                    x_stride: t_stride * size_of::<f32>(),
                    rows: expand.rows.len(),
                    w: expand.b,
                    panels,
                    out: Output {
                        y: if expand.scaled { &self.products } else { &self.y },
                        offset: expand.rows.start * self.stride + expand.panel * 16,
                        stride: self.stride,
                        bias: None,
                        add: true,
                    },
                },
            );
        }
    }
}
