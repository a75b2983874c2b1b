//! The GEMM of activations with panels of weights.
//!
//! Every output element is one chain of multiply-adds over the inputs in ascending order, in one accumulator, whatever
//! the size of the tile. So a row's result does not depend on the number of rows.

use super::{
    memory::{GROUP, Line, View},
    pool::Shards,
    simd::{Kernel, Simd},
};
use crate::DType;

/// How a line of weights is multiplied with activations.
pub(super) trait Arithmetic<S: Simd>: Copy {
    /// A line of weights in registers.
    type Weights: Copy;
    /// The inputs that a line is multiplied with, each in all lanes.
    type Inputs: Copy;
    /// Bytes of a line's inputs in one row.
    const INPUT_BYTES: usize;

    unsafe fn weights(line: *const Line) -> Self::Weights;
    unsafe fn inputs(x: *const u8) -> Self::Inputs;
    unsafe fn multiply_add(acc: S::V, weights: Self::Weights, inputs: Self::Inputs) -> S::V;
}

/// f32 weights.
#[derive(Clone, Copy)]
pub(super) struct Single;

/// f16 keys and values, in the order of the outputs, widened to f32.
#[derive(Clone, Copy)]
pub(super) struct Half;

/// bf16 weights, widened to f32.
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

/// The prefetch distance in lines of a panel. Few rows are bound by memory bandwidth, and the hardware prefetches by
/// itself. Many rows take longer than memory does, and a longer distance keeps a line that is late from delaying them.
const fn ahead(rows: usize) -> usize {
    if rows < 8 { 40 } else { 80 }
}

/// Prefetches a line.
#[inline(always)]
pub(super) fn prefetch(line: *const Line) {
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, for which any address is valid.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast())
    }
}

/// The micro-kernel: adds the products of R rows and P panels to the accumulators.
///
/// # Safety
/// `x` has R rows with the inputs of `depth` lines, `x_stride` bytes apart. Each of `w` points to a panel of
/// `depth` lines, which are `step` lines apart.
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
            // No closures here: they would be compiled as functions without the instructions of `S`.
            let mut weights = [A::weights(w[0].add(k * step)); P];
            for p in 1..P {
                weights[p] = A::weights(w[p].add(k * step));
            }
            for p in 0..P {
                // Past the last line this prefetches the next tile's first lines, since groups are stored one after the
                // other.
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

/// Prefetches the first lines of a GEMM all at once, as no earlier tile has prefetched them.
pub(super) fn prefetch_first(w: View<'_>, panel: usize, rows: usize) {
    let (first, step) = w.place(panel);
    w.lines[first..].iter().take(ahead(rows) * step).for_each(|line| prefetch(line));
}

/// Where a GEMM stores its sums.
#[derive(Clone, Copy)]
pub(super) struct Output<'a> {
    /// The output matrix.
    pub(super) y: &'a Shards<f32>,
    /// The element of `y` that is row 0, column 0.
    pub(super) offset: usize,
    /// Elements from one row to the next.
    pub(super) stride: usize,
    /// The initial value of each output's sums; zero if there is none.
    pub(super) bias: Option<&'a [f32]>,
    /// Whether the sums are added to `y`. They are added once they are complete, because elements of `y` may be much
    /// larger.
    pub(super) add: bool,
}

/// `y[r, o] (+)= x[r] · w[o]` for `rows` rows and the outputs of some panels.
pub(super) struct Gemm<'a> {
    /// Rows of f32, which are padded with zeros to whole lines.
    pub(super) x: *const u8,
    /// Bytes from one row to the next.
    pub(super) x_stride: usize,
    pub(super) rows: usize,
    pub(super) w: View<'a>,
    pub(super) panels: std::ops::Range<usize>,
    pub(super) out: Output<'a>,
}

impl Gemm<'_> {
    /// # Safety
    /// The machine has `S`'s instructions. `x` and `out` are as their fields say. There are R rows from `row`,
    /// and P panels of one group from `panel`.
    #[inline(always)]
    unsafe fn at<S: Simd, A: Arithmetic<S>, const R: usize, const P: usize>(&self, row: usize, panel: usize) {
        let depth = self.w.depth();
        // SAFETY: the caller's promise. Partial panels are stored through a buffer, so that nothing beyond `outputs` is
        // touched.
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

    /// Computes R rows of all panels, and returns R.
    ///
    /// # Safety
    /// As for `at`, with R rows from `row` and all panels.
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

    /// Computes all rows of all panels.
    ///
    /// # Safety
    /// As for `at`, with all rows and panels.
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

impl Kernel for Gemm<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise. The fields are as the struct says.
        unsafe {
            match self.w.dtype {
                DType::F32 => self.all::<S, Single>(),
                _ => self.all::<S, Widened>(),
            }
        }
    }
}

/// Loads up to 16 values, and zeros in the other lanes.
///
/// # Safety
/// The machine has `S`'s instructions.
#[inline(always)]
pub(super) unsafe fn load_some<S: Simd>(values: &[f32]) -> S::V {
    // SAFETY: 16 values are there, or are in a buffer.
    unsafe {
        if values.len() >= 16 {
            return S::load(values.as_ptr());
        }
        let mut lanes = [0.0; 16];
        lanes[..values.len()].copy_from_slice(values);
        S::load(lanes.as_ptr())
    }
}

/// Stores as many of the first lanes as there is room for.
///
/// # Safety
/// The machine has `S`'s instructions.
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

/// The shrink of a low-rank delta, `t[r, i] = x[r] · a[i]`. A has too few rows for panels, so its rows are stored along
/// the inputs.
pub(super) struct Shrink<'a> {
    /// Rows of f32, padded with zeros to whole lines.
    pub(super) x: *const u8,
    pub(super) x_stride: usize,
    pub(super) rows: usize,
    /// The rows of A, of `depth` lines each. A line has 16 f32 or 32 bf16.
    pub(super) a: &'a [Line],
    pub(super) depth: usize,
    pub(super) dtype: DType,
    pub(super) t: &'a Shards<f32>,
    pub(super) t_offset: usize,
    pub(super) t_stride: usize,
}

impl Shrink<'_> {
    /// # Safety
    /// The machine has `S`'s instructions. There are R rows from `row`, and Q rows of A from `i`.
    #[inline(always)]
    unsafe fn at<S: Simd, const R: usize, const Q: usize>(&self, row: usize, i: usize) {
        // SAFETY: the caller's promise. Rows are padded to whole lines.
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
                                // A line of bf16 has the first 16 elements in its lower halves: see `super::lora`.
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
        // SAFETY: the caller's promise, as above.
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
