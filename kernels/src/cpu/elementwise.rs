//! Norms, rotations and activations: everything that touches each element of some rows once.

use super::{
    CpuBackend,
    gemm::{load_some, store_some},
    memory::CpuMat,
    pool::Shards,
    simd::{Kernel, Simd, run},
};
use crate::{Error, Heads, Matrix, Result};

/// Elements that make a chunk worth handing out.
const CHUNK: usize = 1 << 13;

/// Calls `f` for every row in some chunk.
pub(super) fn each_row(be: &CpuBackend, rows: usize, cols: usize, f: impl Fn(usize) + Sync) {
    let mut chunks = (rows * cols).div_ceil(CHUNK).min(rows);
    if chunks > 1 {
        chunks = chunks.next_multiple_of(be.pool.threads()).min(rows);
    }
    be.pool.run(chunks, |i| (i * rows / chunks..(i + 1) * rows / chunks).for_each(&f));
}

struct Norm<'a> {
    x: &'a [f32],
    w: &'a [f32],
    eps: f32,
    y: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise; all loads and stores stay in the chunks.
        unsafe {
            let mut squares = S::splat(0.0);
            for x in self.x.chunks(16) {
                let x = load_some::<S>(x);
                squares = S::fma(x, x, squares);
            }
            let mean = S::sum(squares) / self.w.len() as f32;
            let factor = S::splat(1.0 / (mean + self.eps).sqrt());
            for ((x, w), y) in self.x.chunks(16).zip(self.w.chunks(16)).zip(self.y.chunks_mut(16)) {
                let normed = S::mul(load_some::<S>(x), factor);
                store_some::<S>(y, S::mul(normed, load_some::<S>(w)));
            }
        }
    }
}

pub(super) fn rms_norm(be: &CpuBackend, x: &CpuMat, w: &[f32], eps: f32, y: &mut CpuMat) -> Result<()> {
    let op = "rms_norm";
    let (rows, cols) = (x.rows(), x.cols());
    for (what, got) in [("columns of y", y.cols()), ("elements of the weight", w.len())] {
        if got != cols {
            return Err(Error::Shape { op, what, got, expected: cols });
        }
    }
    y.resize(op, rows)?;
    let y = Shards(y.used_mut().as_mut_ptr());
    each_row(be, rows, cols, |i| {
        // SAFETY: row i is this call's own.
        run(be.tier, Norm { x: x.row(i), w, eps, y: unsafe { y.slice(i * cols, cols) } });
    });
    Ok(())
}

struct SiluMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise; all loads and stores stay in the chunks.
        unsafe {
            for ((gate, up), y) in self.gate.chunks(16).zip(self.up.chunks(16)).zip(self.y.chunks_mut(16)) {
                let gate = load_some::<S>(gate);
                // The exponent is bounded so that 2^n stays finite: beyond it the sigmoid is 0 or 1 to f32's precision.
                let exponent = S::max(S::mul(gate, S::splat(-1.0)), S::splat(-80.0));
                let exponent =
                    S::mul(S::max(S::mul(exponent, S::splat(-1.0)), S::splat(-80.0)), S::splat(-1.0));
                let silu = S::div(gate, S::add(S::splat(1.0), S::exp(exponent)));
                store_some::<S>(y, S::mul(silu, load_some::<S>(up)));
            }
        }
    }
}

pub(super) fn silu_mul(be: &CpuBackend, gate_up: &CpuMat, y: &mut CpuMat) -> Result<()> {
    let op = "silu_mul";
    let n = y.cols();
    if gate_up.cols() != 2 * n {
        return Err(Error::Shape { op, what: "columns of x", got: gate_up.cols(), expected: 2 * n });
    }
    let rows = gate_up.rows();
    y.resize(op, rows)?;
    let y = Shards(y.used_mut().as_mut_ptr());
    each_row(be, rows, n, |i| {
        let (gate, up) = gate_up.row(i).split_at(n);
        // SAFETY: row i is this call's own.
        run(be.tier, SiluMul { gate, up, y: unsafe { y.slice(i * n, n) } });
    });
    Ok(())
}

/// Cosines and sines of a rotary embedding, `[positions, dim / 2]` each.
#[derive(Debug)]
pub struct CpuRope {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl CpuRope {
    pub(super) fn new(inv_freq: &[f32], positions: usize, scale: f32) -> CpuRope {
        let angle = |i: usize| (i / inv_freq.len()) as f32 * inv_freq[i % inv_freq.len()];
        let len = positions * inv_freq.len();
        CpuRope {
            cos: (0..len).map(|i| angle(i).cos() * scale).collect(),
            sin: (0..len).map(|i| angle(i).sin() * scale).collect(),
            half: inv_freq.len(),
        }
    }

    pub(super) fn check(&self, op: &'static str, heads: Heads, positions: &[u32]) -> Result<()> {
        if self.half * 2 != heads.dim {
            return Err(Error::Shape {
                op,
                what: "head size of the rope",
                got: self.half * 2,
                expected: heads.dim,
            });
        }
        let limit = self.cos.len() / self.half.max(1);
        match positions.iter().find(|&&position| position as usize >= limit) {
            Some(&index) => Err(Error::Index { op, what: "position", index: index as usize, limit }),
            None => Ok(()),
        }
    }

    /// Rotates one head: element j with j + dim / 2.
    pub(super) fn rotate(&self, head: &mut [f32], position: u32) {
        let at = position as usize * self.half;
        let (low, high) = head.split_at_mut(self.half);
        let turns = self.cos[at..][..self.half].iter().zip(&self.sin[at..][..self.half]);
        for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(turns) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}
