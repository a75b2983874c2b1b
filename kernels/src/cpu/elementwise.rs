//! Norms, rotary embeddings and activations: operations that touch each element of a row once.

use super::{
    CpuBackend,
    gemm::{load_some, store_some},
    memory::CpuMat,
    pool::Shards,
    simd::{Kernel, Simd, run},
};
use crate::{
    Activation, Error, Heads, LogitShape, Matrix, Norm, NormKind, Pairs, Result, RopeSpec, Stretch,
    ops::TABLE_POSITIONS,
};

/// The number of elements of a chunk, which are enough to be worth its overhead.
const CHUNK: usize = 1 << 13;

/// Calls `f` for every row, on all threads.
pub(super) fn each_row(be: &CpuBackend, rows: usize, cols: usize, f: impl Fn(usize) + Sync) {
    let mut chunks = (rows * cols).div_ceil(CHUNK).min(rows);
    if chunks > 1 {
        chunks = chunks.next_multiple_of(be.pool.threads()).min(rows);
    }
    be.pool.run(chunks, |i| (i * rows / chunks..(i + 1) * rows / chunks).for_each(&f));
}

/// The kernel that norms one row.
struct Normed<'a> {
    kind: NormKind,
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
    /// The row; `None` norms `y` in place.
    x: Option<&'a [f32]>,
    y: &'a mut [f32],
    /// If set, the normed row times this factor is added to `y`. Otherwise `y` is overwritten.
    add: Option<f32>,
}

impl Kernel for Normed<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise; all loads and stores stay in the chunks.
        unsafe {
            let x = self.x.unwrap_or(self.y);
            let cols = x.len() as f32;
            let mut mean = 0.0;
            if self.kind == NormKind::Layer {
                let mut sum = S::splat(0.0);
                for x in x.chunks(16) {
                    sum = S::add(sum, load_some::<S>(x));
                }
                mean = S::sum(sum) / cols;
            }
            let shift = S::splat(-mean);
            let mut squares = S::splat(0.0);
            let whole = x.chunks_exact(16);
            // The last chunk is padded with the mean, which adds nothing to the variance.
            let mut rest = [mean; 16];
            rest[..whole.remainder().len()].copy_from_slice(whole.remainder());
            for x in whole.chain([rest.as_slice()]) {
                let x = S::add(load_some::<S>(x), shift);
                squares = S::fma(x, x, squares);
            }
            let factor = S::splat(1.0 / (S::sum(squares) / cols + self.eps).sqrt());
            for (i, y) in self.y.chunks_mut(16).enumerate() {
                let x = self.x.map_or(&*y, |x| &x[16 * i..][..y.len()]);
                let weight = load_some::<S>(&self.weight[16 * i..][..x.len()]);
                let mut normed = S::mul(S::mul(S::add(load_some::<S>(x), shift), factor), weight);
                if let Some(bias) = self.bias {
                    normed = S::add(normed, load_some::<S>(&bias[16 * i..][..x.len()]));
                }
                if let Some(scale) = self.add {
                    normed = S::fma(normed, S::splat(scale), load_some::<S>(y));
                }
                store_some::<S>(y, normed);
            }
        }
    }
}

/// The kernel of `y += scale · x`.
struct Add<'a> {
    x: &'a [f32],
    scale: f32,
    y: &'a mut [f32],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise; all loads and stores stay in the chunks.
        unsafe {
            for (x, y) in self.x.chunks(16).zip(self.y.chunks_mut(16)) {
                store_some::<S>(y, S::fma(load_some::<S>(x), S::splat(self.scale), load_some::<S>(y)));
            }
        }
    }
}

fn expect_norm(op: &'static str, norm: &Norm<'_, CpuBackend>, cols: usize) -> Result<()> {
    let bias = norm.bias.map_or(cols, Vec::len);
    for (what, got) in [("elements of the weight", norm.weight.len()), ("elements of the norm's bias", bias)]
    {
        if got != cols {
            return Err(Error::Shape { op, what, got, expected: cols });
        }
    }
    Ok(())
}

/// Norms a part of a row in place, with the weights from `first`.
pub(super) fn norm_in_place(be: &CpuBackend, norm: &Norm<'_, CpuBackend>, first: usize, y: &mut [f32]) {
    let weight = &norm.weight[first..][..y.len()];
    let bias = norm.bias.map(|bias| &bias[first..][..y.len()]);
    run(be.tier, Normed { kind: norm.kind, weight, bias, eps: norm.eps, x: None, y, add: None });
}

/// Norms one row, and stores it in `y` or adds it to `y`.
fn norm_row(be: &CpuBackend, norm: &Norm<'_, CpuBackend>, x: &[f32], y: &mut [f32], add: Option<f32>) {
    let (weight, bias) = (norm.weight.as_slice(), norm.bias.map(Vec::as_slice));
    run(be.tier, Normed { kind: norm.kind, weight, bias, eps: norm.eps, x: Some(x), y, add });
}

pub(super) fn normalize(
    be: &CpuBackend,
    x: &CpuMat,
    norm: Norm<'_, CpuBackend>,
    y: &mut CpuMat,
) -> Result<()> {
    let op = "normalize";
    let (rows, cols) = (x.rows(), x.cols());
    expect_norm(op, &norm, cols)?;
    if y.cols() != cols {
        return Err(Error::Shape { op, what: "columns of y", got: y.cols(), expected: cols });
    }
    y.resize(op, rows)?;
    let y = Shards(y.used_mut().as_mut_ptr());
    each_row(be, rows, cols, |i| {
        // SAFETY: row i is this call's own.
        norm_row(be, &norm, x.row(i), unsafe { y.slice(i * cols, cols) }, None);
    });
    Ok(())
}

/// Norms the rows of the residual stream in place, and copies them.
pub(super) fn normalize_stream(
    be: &CpuBackend,
    stream: &mut CpuMat,
    norm: Norm<'_, CpuBackend>,
    y: &mut CpuMat,
) -> Result<()> {
    let op = "normalize_stream";
    let (rows, cols) = (stream.rows(), stream.cols());
    expect_norm(op, &norm, cols)?;
    if y.cols() != cols {
        return Err(Error::Shape { op, what: "columns of y", got: y.cols(), expected: cols });
    }
    y.resize(op, rows)?;
    let [stream, y] = [stream, y].map(|mat| Shards(mat.used_mut().as_mut_ptr()));
    each_row(be, rows, cols, |i| {
        // SAFETY: row i of both is this call's own.
        let [stream, y] = [&stream, &y].map(|mat| unsafe { mat.slice(i * cols, cols) });
        norm_in_place(be, &norm, 0, stream);
        y.copy_from_slice(stream);
    });
    Ok(())
}

/// Adds rows to the residual stream, after norm and scale.
pub(super) fn add(
    be: &CpuBackend,
    x: &CpuMat,
    post: Option<Norm<'_, CpuBackend>>,
    scale: f32,
    stream: &mut CpuMat,
) -> Result<()> {
    let op = "add";
    let (rows, cols) = (x.rows(), x.cols());
    if let Some(post) = &post {
        expect_norm(op, post, cols)?;
    }
    for (what, got, expected) in
        [("columns of the stream", stream.cols(), cols), ("rows of the stream", stream.rows(), rows)]
    {
        if got != expected {
            return Err(Error::Shape { op, what, got, expected });
        }
    }
    let stream = Shards(stream.used_mut().as_mut_ptr());
    each_row(be, rows, cols, |i| {
        // SAFETY: row i is this call's own.
        let y = unsafe { stream.slice(i * cols, cols) };
        match &post {
            Some(post) => norm_row(be, post, x.row(i), y, Some(scale)),
            None => run(be.tier, Add { x: x.row(i), scale, y }),
        }
    });
    Ok(())
}

/// Applies an activation to 16 lanes.
#[inline(always)]
unsafe fn apply<S: Simd>(f: Activation, x: S::V) -> S::V {
    // SAFETY: no memory is touched but an array of this function's own.
    unsafe {
        match f {
            Activation::Silu => S::div(x, S::add(S::splat(1.0), bounded_exp::<S>(S::mul(x, S::splat(-1.0))))),
            Activation::GeluTanh => {
                // x / 2 · (1 + tanh(u)) is x / (1 + e^(-2u)).
                let cube = S::mul(S::mul(x, x), S::mul(x, S::splat(0.044_715)));
                let u = S::mul(S::add(x, cube), S::splat(-2.0 * (2.0 / std::f32::consts::PI).sqrt()));
                S::div(x, S::add(S::splat(1.0), bounded_exp::<S>(u)))
            }
            Activation::Relu => S::max(x, S::splat(0.0)),
            Activation::Gelu => {
                // With e = erfc(|x| / √2), x · Φ(x) is max(x, 0) - |x| / 2 · e.
                let size = S::max(x, S::mul(x, S::splat(-1.0)));
                let e = erfc::<S>(S::mul(size, S::splat(std::f32::consts::FRAC_1_SQRT_2)));
                S::fma(S::mul(size, S::splat(-0.5)), e, S::max(x, S::splat(0.0)))
            }
            Activation::Tanh => {
                let mut values = [0.0; 16];
                store_some::<S>(&mut values, x);
                values.iter_mut().for_each(|x| *x = x.tanh());
                load_some::<S>(&values)
            }
        }
    }
}

/// The coefficients of [`erfc`], from that of the highest power of t on.
const ERFC: [f32; 10] = [
    0.170_872_77,
    -0.822_152_23,
    1.488_515_9,
    -1.135_204,
    0.278_868_07,
    -0.186_288_06,
    0.096_784_18,
    0.374_091_96,
    1.000_023_7,
    -1.265_512_2,
];

/// The complementary error function of x ≥ 0, with a relative error below 1.2e-7 before rounding: `t · e^(p(t) - x²)` with
/// `t = 1 / (1 + x / 2)` and a polynomial p (Press et al., Numerical Recipes, section 6.2).
#[inline(always)]
unsafe fn erfc<S: Simd>(x: S::V) -> S::V {
    // SAFETY: no memory is touched.
    unsafe {
        let t = S::div(S::splat(1.0), S::fma(x, S::splat(0.5), S::splat(1.0)));
        let mut power = S::splat(ERFC[0]);
        for coefficient in &ERFC[1..] {
            power = S::fma(power, t, S::splat(*coefficient));
        }
        S::mul(t, S::exp(S::fma(S::mul(x, S::splat(-1.0)), x, power)))
    }
}

/// eˣ, for x of at most 80: larger x are clamped, because 1 + eˣ equals eˣ in f32 then.
#[inline(always)]
unsafe fn bounded_exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: no memory is touched.
    unsafe { S::exp(S::min(S::splat(80.0), x)) }
}

struct Activate<'a> {
    f: Activation,
    x: &'a [f32],
    /// The row that the activations are multiplied with, if they gate.
    up: Option<&'a [f32]>,
    y: &'a mut [f32],
}

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise; all loads and stores stay in the chunks.
        unsafe {
            for (i, (x, y)) in self.x.chunks(16).zip(self.y.chunks_mut(16)).enumerate() {
                let mut activated = apply::<S>(self.f, load_some::<S>(x));
                if let Some(up) = self.up {
                    activated = S::mul(activated, load_some::<S>(&up[16 * i..][..x.len()]));
                }
                store_some::<S>(y, activated);
            }
        }
    }
}

pub(super) fn activate(be: &CpuBackend, x: &CpuMat, f: Activation, y: &mut CpuMat) -> Result<()> {
    let op = "activate";
    let (rows, n) = (x.rows(), y.cols());
    if x.cols() != n {
        return Err(Error::Shape { op, what: "columns of x", got: x.cols(), expected: n });
    }
    y.resize(op, rows)?;
    let y = Shards(y.used_mut().as_mut_ptr());
    each_row(be, rows, n, |i| {
        // SAFETY: row i is this call's own.
        run(be.tier, Activate { f, x: x.row(i), up: None, y: unsafe { y.slice(i * n, n) } });
    });
    Ok(())
}

pub(super) fn gate(be: &CpuBackend, x: &CpuMat, f: Activation, y: &mut CpuMat) -> Result<()> {
    let op = "gate";
    let (rows, n) = (x.rows(), y.cols());
    if x.cols() != 2 * n {
        return Err(Error::Shape { op, what: "columns of x", got: x.cols(), expected: 2 * n });
    }
    y.resize(op, rows)?;
    let y = Shards(y.used_mut().as_mut_ptr());
    each_row(be, rows, n, |i| {
        let (gate, up) = x.row(i).split_at(n);
        // SAFETY: row i is this call's own.
        run(be.tier, Activate { f, x: gate, up: Some(up), y: unsafe { y.slice(i * n, n) } });
    });
    Ok(())
}

pub(super) fn shape_logits(be: &CpuBackend, shape: LogitShape, y: &mut CpuMat) {
    if shape == LogitShape::PLAIN {
        return;
    }
    let (rows, cols) = (y.rows(), y.cols());
    let y = Shards(y.used_mut().as_mut_ptr());
    each_row(be, rows, cols, |i| {
        // SAFETY: row i is this call's own.
        for logit in unsafe { y.slice(i * cols, cols) } {
            *logit *= shape.scale;
            // The logit of a token without a row stays -∞.
            if let Some(cap) = shape.softcap.filter(|_| *logit != f32::NEG_INFINITY) {
                *logit = cap * (*logit / cap).tanh();
            }
        }
    });
}

/// The cosines and sines of a rotary embedding, `[positions, pairs]` each.
#[derive(Debug)]
struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    fn new(inv_freq: &[f32], spec: &RopeSpec) -> Angles {
        let angle = |i: usize| (i / inv_freq.len()) as f32 * inv_freq[i % inv_freq.len()];
        let len = spec.positions * inv_freq.len();
        Angles {
            cos: (0..len).map(|i| angle(i).cos() * spec.scale).collect(),
            sin: (0..len).map(|i| angle(i).sin() * spec.scale).collect(),
        }
    }
}

/// The angles of a rotary embedding.
#[derive(Debug)]
pub struct CpuRope {
    spec: RopeSpec,
    /// The angles of [`RopeSpec::inv_freq`], unless they are computed row by row.
    short: Option<Angles>,
    /// Those of longer sequences, with LongRoPE.
    long: Option<Angles>,
}

impl CpuRope {
    pub(super) fn new(spec: &RopeSpec) -> CpuRope {
        let table =
            |inv_freq: &[f32]| (spec.positions <= TABLE_POSITIONS).then(|| Angles::new(inv_freq, spec));
        let long = match &spec.stretch {
            Stretch::Long { inv_freq, .. } => table(inv_freq),
            Stretch::None | Stretch::Dynamic { .. } => None,
        };
        CpuRope { short: table(&spec.inv_freq), long, spec: spec.clone() }
    }

    /// The number of pairs of a head that are rotated.
    pub(super) fn pairs(&self) -> usize {
        self.spec.inv_freq.len()
    }

    pub(super) fn check(&self, op: &'static str, heads: Heads, positions: &[u32]) -> Result<()> {
        if self.pairs() * 2 > heads.dim {
            let (got, expected) = (self.pairs() * 2, heads.dim);
            return Err(Error::Shape { op, what: "elements that are rotated", got, expected });
        }
        let limit = self.spec.positions;
        match positions.iter().find(|&&position| position as usize >= limit) {
            Some(&index) => Err(Error::Index { op, what: "position", index: index as usize, limit }),
            None => Ok(()),
        }
    }

    /// Calls `turn` with the index, cosine and sine of every pair, for a row at `position` whose length is `length`.
    pub(super) fn each_pair(&self, position: u32, length: u32, mut turn: impl FnMut(usize, f32, f32)) {
        let RopeSpec { inv_freq, scale, stretch, .. } = &self.spec;
        let pairs = self.pairs();
        let mut compute = |frequency: &dyn Fn(usize) -> f32| {
            for j in 0..pairs {
                let (sin, cos) = (position as f32 * frequency(j)).sin_cos();
                turn(j, cos * scale, sin * scale);
            }
        };
        let (table, inv_freq) = match stretch {
            Stretch::Dynamic { original, factor } if length > *original => {
                let stretched = factor * length as f32 / *original as f32 - (factor - 1.0);
                let power = |j: usize| 2.0 * j as f32 / (2.0 * pairs as f32 - 2.0);
                return compute(&|j| inv_freq[j] / stretched.powf(power(j)));
            }
            Stretch::Long { original, inv_freq } if length > *original => (&self.long, inv_freq),
            _ => (&self.short, inv_freq),
        };
        let Some(angles) = table else { return compute(&|j| inv_freq[j]) };
        let at = position as usize * pairs;
        let turns = angles.cos[at..][..pairs].iter().zip(&angles.sin[at..][..pairs]);
        turns.enumerate().for_each(|(j, (cos, sin))| turn(j, *cos, *sin));
    }

    /// Rotates one head.
    pub(super) fn rotate(&self, which: Pairs, head: &mut [f32], position: u32, length: u32) {
        let pairs = self.pairs();
        self.each_pair(position, length, |j, cos, sin| {
            let (i, k) = match which {
                Pairs::Halves => (j, j + pairs),
                Pairs::Neighbours => (2 * j, 2 * j + 1),
            };
            let (a, b) = (head[i], head[k]);
            (head[i], head[k]) = (a * cos - b * sin, b * cos + a * sin);
        });
    }
}
