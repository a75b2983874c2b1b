//! Products of activations with panels of weights.
//!
//! Every output element is one chain of multiply-adds over the inputs, in ascending order, in one accumulator,
//! whatever the tile it is computed in: a row's result does not depend on how many rows there are.

use super::{
    memory::{GROUP, Line, View},
    pool::Shards,
    simd::{Kernel, Simd},
};
use crate::DType;

/// How a line of weights meets the activations.
pub(super) trait Arithmetic<S: Simd>: Copy {
    /// A line, ready to multiply.
    type Weights: Copy;
    /// The inputs of a line in all lanes.
    type Inputs: Copy;
    /// Bytes of one row's inputs of a line.
    const INPUT_BYTES: usize;

    unsafe fn weights(line: *const Line) -> Self::Weights;
    unsafe fn inputs(x: *const u8) -> Self::Inputs;
    unsafe fn multiply_add(acc: S::V, weights: Self::Weights, inputs: Self::Inputs) -> S::V;
}

/// f32 weights.
#[derive(Clone, Copy)]
pub(super) struct Single;

/// f16 in the order of the outputs widened to f32: keys and values.
#[derive(Clone, Copy)]
pub(super) struct Half;

/// bf16 weights widened to f32, f32 activations.
#[derive(Clone, Copy)]
pub(super) struct Widened;

impl<S: Simd> Arithmetic<S> for Single {
    type Weights = S::V;
    type Inputs = S::V;
    const INPUT_BYTES: usize = 4;

    #[inline(always)]
    unsafe fn weights(line: *const Line) -> S::V {
        // SAFETY: the caller's promise: a line.
        unsafe { S::load(line.cast()) }
    }
    #[inline(always)]
    unsafe fn inputs(x: *const u8) -> S::V {
        // SAFETY: the caller's promise: INPUT_BYTES bytes.
        unsafe { S::splat(x.cast::<f32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn multiply_add(acc: S::V, weights: S::V, inputs: S::V) -> S::V {
        // SAFETY: no memory is touched.
        unsafe { S::fma(inputs, weights, acc) }
    }
}

impl<S: Simd> Arithmetic<S> for Widened {
    type Weights = (S::V, S::V);
    type Inputs = (S::V, S::V);
    const INPUT_BYTES: usize = 8;

    #[inline(always)]
    unsafe fn weights(line: *const Line) -> (S::V, S::V) {
        // SAFETY: the caller's promise: a line.
        unsafe { (S::widen_low(line.cast()), S::widen_high(line.cast())) }
    }
    #[inline(always)]
    unsafe fn inputs(x: *const u8) -> (S::V, S::V) {
        // SAFETY: the caller's promise: INPUT_BYTES bytes.
        unsafe {
            let x = x.cast::<f32>();
            (S::splat(x.read_unaligned()), S::splat(x.add(1).read_unaligned()))
        }
    }
    #[inline(always)]
    unsafe fn multiply_add(acc: S::V, w: (S::V, S::V), x: (S::V, S::V)) -> S::V {
        // SAFETY: no memory is touched.
        unsafe { S::fma(x.1, w.1, S::fma(x.0, w.0, acc)) }
    }
}

impl<S: Simd> Arithmetic<S> for Half {
    type Weights = (S::V, S::V);
    type Inputs = (S::V, S::V);
    const INPUT_BYTES: usize = 8;

    #[inline(always)]
    unsafe fn weights(line: *const Line) -> (S::V, S::V) {
        // SAFETY: the caller's promise: a line.
        unsafe { (S::load_half(line.cast()), S::load_half(line.cast::<u16>().add(16))) }
    }
    #[inline(always)]
    unsafe fn inputs(x: *const u8) -> (S::V, S::V) {
        // SAFETY: the caller's promise.
        unsafe { <Widened as Arithmetic<S>>::inputs(x) }
    }
    #[inline(always)]
    unsafe fn multiply_add(acc: S::V, w: (S::V, S::V), x: (S::V, S::V)) -> S::V {
        // SAFETY: no memory is touched.
        unsafe { <Widened as Arithmetic<S>>::multiply_add(acc, w, x) }
    }
}

/// Lines of a panel that are asked for before `rows` rows are multiplied with them. A few rows wait for memory whatever
/// they ask for, and the processor asks by itself; many take longer than memory does, unless a line comes late.
const fn ahead(rows: usize) -> usize {
    if rows < 8 { 40 } else { 80 }
}

/// Asks for a line.
#[inline(always)]
pub(super) fn prefetch(line: *const Line) {
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; any address will do.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast())
    }
}

/// Adds the products of R rows with P panels to the accumulators.
///
/// # Safety
/// `x` holds R rows of `depth` lines' inputs, `x_stride` bytes apart; each of `w` points to a panel of `depth` lines,
/// `step` lines apart.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "iterators take closures")]
pub(super) unsafe fn tile<S: Simd, A: Arithmetic<S>, const R: usize, const P: usize>(
    (x, x_stride): (*const u8, usize),
    (w, step): ([*const Line; P], usize),
    depth: usize,
    acc: &mut [[S::V; P]; R],
) {
    for k in 0..depth {
        // SAFETY: k < depth, and the caller's promise.
        unsafe {
            // No closures here: they would be compiled without the instructions of `S`, and called.
            let mut weights = [A::weights(w[0].add(k * step)); P];
            for p in 1..P {
                weights[p] = A::weights(w[p].add(k * step));
            }
            for p in 0..P {
                // Behind the last line, the next tile's are: groups of panels lie behind each other.
                prefetch(w[p].wrapping_add((k + ahead(R)) * step));
            }
            for r in 0..R {
                let inputs = A::inputs(x.add(r * x_stride + k * A::INPUT_BYTES));
                for p in 0..P {
                    acc[r][p] = A::multiply_add(acc[r][p], weights[p], inputs);
                }
            }
        }
    }
}

/// Asks for the first lines of a product that nobody asked for yet: all at once they come soonest.
pub(super) fn prefetch_first(w: View<'_>, panel: usize, rows: usize) {
    let (first, step) = w.place(panel);
    w.lines[first..].iter().take(ahead(rows) * step).for_each(|line| prefetch(line));
}

/// Where the products go.
#[derive(Clone, Copy)]
pub(super) struct Output<'a> {
    /// First row, first column.
    pub(super) y: &'a Shards<f32>,
    /// Element of `y` to begin at.
    pub(super) offset: usize,
    /// Elements from one row to the next.
    pub(super) stride: usize,
    /// What the sums begin with, a value for each output; zeros if none.
    pub(super) bias: Option<&'a [f32]>,
    /// Whether the sums are added to what is there: at their end, since it may be far larger than they are.
    pub(super) add: bool,
}

/// `y[r, o] (+)= x[r] · w[o]` for `rows` rows and the outputs of some panels.
pub(super) struct Product<'a> {
    /// Rows of f32, padded with zeros to whole lines.
    pub(super) x: *const u8,
    /// Bytes from one row to the next.
    pub(super) x_stride: usize,
    pub(super) rows: usize,
    pub(super) w: View<'a>,
    pub(super) panels: std::ops::Range<usize>,
    pub(super) out: Output<'a>,
}

impl Product<'_> {
    /// # Safety
    /// `S`'s instructions; `x` and `out` as their fields say, R rows from `row` on, P panels of one group from `panel` on.
    #[inline(always)]
    unsafe fn at<S: Simd, A: Arithmetic<S>, const R: usize, const P: usize>(&self, row: usize, panel: usize) {
        let depth = self.w.depth();
        // SAFETY: the caller's promise; partial panels go through a buffer, so nothing beyond `outputs` is touched.
        unsafe {
            let mut acc = [[S::splat(0.0); P]; R];
            let out = |r: usize, p: usize| {
                let first = (panel + p) * 16;
                let width = (self.w.outputs - first).min(16);
                let place = self.out.y.slice(self.out.offset + (row + r) * self.out.stride + first, width);
                (first, place)
            };
            for (r, acc) in acc.iter_mut().enumerate() {
                for (p, acc) in acc.iter_mut().enumerate() {
                    if let Some(bias) = self.out.bias {
                        let (first, place) = out(r, p);
                        *acc = load_some::<S>(&bias[first..first + place.len()]);
                    }
                }
            }
            let x = self.x.add(row * self.x_stride);
            let (first, step) = self.w.place(panel);
            let mut w = [self.w.lines.as_ptr().add(first); P];
            for p in 1..P {
                w[p] = w[p - 1].add(1);
            }
            tile::<S, A, R, P>((x, self.x_stride), (w, step), depth, &mut acc);
            for (r, acc) in acc.iter().enumerate() {
                for (p, acc) in acc.iter().enumerate() {
                    let place = out(r, p).1;
                    let sum = if self.out.add { S::add(load_some::<S>(place), *acc) } else { *acc };
                    store_some::<S>(place, sum);
                }
            }
        }
    }

    /// Returns the number of rows done: R.
    ///
    /// # Safety
    /// As for `at`, R rows from `row` on and all panels.
    #[inline(always)]
    unsafe fn across<S: Simd, A: Arithmetic<S>, const R: usize, const P: usize>(&self, row: usize) -> usize {
        let mut panel = self.panels.start;
        // SAFETY: the caller's promise.
        unsafe {
            while panel < self.panels.end {
                if panel % GROUP + P <= GROUP && panel + P <= self.panels.end {
                    self.at::<S, A, R, P>(row, panel);
                    panel += P;
                } else {
                    self.at::<S, A, R, 1>(row, panel);
                    panel += 1;
                }
            }
        }
        R
    }

    /// # Safety
    /// As for `at`, all rows and panels.
    #[inline(always)]
    unsafe fn all<S: Simd, A: Arithmetic<S>>(&self) {
        let mut row = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while row < self.rows {
                row += match (self.rows - row, S::WIDE) {
                    (12.., true) => self.across::<S, A, 12, 2>(row),
                    (8.., true) => self.across::<S, A, 8, 2>(row),
                    (4.., true) => self.across::<S, A, 4, 2>(row),
                    (4.., false) => self.across::<S, A, 4, 1>(row),
                    (2.., _) => self.across::<S, A, 2, 2>(row),
                    _ => self.across::<S, A, 1, 2>(row),
                };
            }
        }
    }
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise, and whoever made the product keeps its fields' promises.
        unsafe {
            match self.w.dtype {
                DType::F32 => self.all::<S, Single>(),
                _ => self.all::<S, Widened>(),
            }
        }
    }
}

/// Up to 16 values, zeros behind them.
///
/// # Safety
/// `S`'s instructions.
#[inline(always)]
pub(super) unsafe fn load_some<S: Simd>(values: &[f32]) -> S::V {
    // SAFETY: 16 lanes are there or are made.
    unsafe {
        if values.len() >= 16 {
            return S::load(values.as_ptr());
        }
        let mut lanes = [0.0; 16];
        lanes[..values.len()].copy_from_slice(values);
        S::load(lanes.as_ptr())
    }
}

/// The first lanes, as many as there is room for.
///
/// # Safety
/// `S`'s instructions.
#[inline(always)]
pub(super) unsafe fn store_some<S: Simd>(place: &mut [f32], v: S::V) {
    // SAFETY: 16 lanes fit, in place or in the buffer.
    unsafe {
        if place.len() >= 16 {
            return S::store(place.as_mut_ptr(), v);
        }
        let mut lanes = [0.0; 16];
        S::store(lanes.as_mut_ptr(), v);
        let len = place.len();
        place.copy_from_slice(&lanes[..len]);
    }
}

/// Sums `x[r] · a[i]` over rows stored along the inputs: the shrink of a low-rank delta, whose A has too few rows to
/// make panels of. Written to `t[r, i]`.
pub(super) struct Shrink<'a> {
    /// Prepared rows of f32.
    pub(super) x: *const u8,
    pub(super) x_stride: usize,
    pub(super) rows: usize,
    /// A's rows, `depth` lines each: 16 f32 or 32 bf16 a line.
    pub(super) a: &'a [Line],
    pub(super) depth: usize,
    pub(super) dtype: DType,
    pub(super) t: &'a Shards<f32>,
    pub(super) t_offset: usize,
    pub(super) t_stride: usize,
}

impl Shrink<'_> {
    /// # Safety
    /// `S`'s instructions; R rows from `row` on, Q rows of A from `i` on.
    #[inline(always)]
    unsafe fn at<S: Simd, const R: usize, const Q: usize>(&self, row: usize, i: usize) {
        // SAFETY: the caller's promise; prepared rows are padded to whole lines.
        unsafe {
            let mut acc = [[S::splat(0.0); Q]; R];
            for k in 0..self.depth {
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = self.x.add((row + r) * self.x_stride);
                    for (q, acc) in acc.iter_mut().enumerate() {
                        let a = self.a.as_ptr().add((i + q) * self.depth + k);
                        prefetch(a.wrapping_add(2 * Q * self.depth));
                        *acc = match self.dtype {
                            DType::F32 => {
                                S::fma(S::load(x.cast::<f32>().add(k * 16)), S::load(a.cast()), *acc)
                            }
                            _ => {
                                // Such an A is packed half by half, see `super::lora`.
                                let x = x.cast::<f32>().add(k * 32);
                                let acc = S::fma(S::load(x), S::widen_low(a.cast()), *acc);
                                S::fma(S::load(x.add(16)), S::widen_high(a.cast()), acc)
                            }
                        };
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                let place = self.t.slice(self.t_offset + (row + r) * self.t_stride + i, Q);
                for (place, acc) in place.iter_mut().zip(acc) {
                    *place = S::sum(*acc);
                }
            }
        }
    }
}

impl Kernel for Shrink<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let lora_rank = self.a.len().checked_div(self.depth).unwrap_or(0);
        // SAFETY: the caller's promise, and whoever made the shrink keeps its fields' promises.
        unsafe {
            let mut row = 0;
            while row < self.rows {
                let four = self.rows - row >= 4;
                let mut i = 0;
                while i < lora_rank {
                    match (four, lora_rank - i) {
                        (true, 4..) => self.at::<S, 4, 4>(row, i),
                        (true, _) => self.at::<S, 4, 1>(row, i),
                        (false, 4..) => self.at::<S, 1, 4>(row, i),
                        (false, _) => self.at::<S, 1, 1>(row, i),
                    }
                    i += if lora_rank - i >= 4 { 4 } else { 1 };
                }
                row += if four { 4 } else { 1 };
            }
        }
    }
}
