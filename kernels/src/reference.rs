//! The reference of every operation, as plain loops over f32, with which the conformance tests compare backends.

mod adapters;
mod attention;

pub use adapters::{Base, adapted_linear, add_lora, embed};
pub use attention::{Attention, KvMemory, Qkv, paged_attention, rope_and_store};

use crate::{Activation, LogitShape, NormKind};

/// A row-major matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    /// Number of columns.
    pub cols: usize,
    /// The elements, row-major.
    pub data: Vec<f32>,
}

impl Table {
    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.cols..][..self.cols]
    }

    /// Row `i`.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.cols..][..self.cols]
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.data.len() / self.cols
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
}

/// `y[i] = x[i] · Wᵀ + bias`
pub fn linear(x: &Table, w: &Table, bias: Option<&[f32]>) -> Table {
    let row =
        |i: usize| (0..w.rows()).map(move |o| dot(x.row(i), w.row(o)) + bias.map_or(0.0, |bias| bias[o]));
    Table { cols: w.rows(), data: (0..x.rows()).flat_map(row).collect() }
}

/// Adds one table to another.
pub fn add(x: &Table, y: &mut Table) {
    y.data.iter_mut().zip(&x.data).for_each(|(y, x)| *y += x);
}

/// A norm of rows; see [`crate::Norm`].
#[derive(Debug, Clone)]
pub struct Norm {
    /// The formula.
    pub kind: NormKind,
    /// w, one element for each column, or for the columns of one head that all heads share.
    pub weight: Vec<f32>,
    /// b, with as many elements.
    pub bias: Option<Vec<f32>>,
    /// Epsilon, which is added under the root.
    pub eps: f32,
}

impl Norm {
    /// Norms a part of a row, with the weights from `first`. Weights that heads share are repeated.
    fn apply(&self, row: &mut [f32], first: usize) {
        let count = row.len() as f64;
        let mean = match self.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => row.iter().map(|x| f64::from(*x)).sum::<f64>() / count,
        };
        let square = row.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / count;
        let factor = 1.0 / (square + f64::from(self.eps)).sqrt();
        for (k, x) in row.iter_mut().enumerate() {
            let k = (first + k) % self.weight.len();
            *x = ((f64::from(*x) - mean) * factor) as f32 * self.weight[k]
                + self.bias.as_ref().map_or(0.0, |bias| bias[k]);
        }
    }
}

/// `y[i] = norm(x[i])`
pub fn normalize(x: &Table, norm: &Norm) -> Table {
    let mut y = x.clone();
    (0..y.rows()).for_each(|i| norm.apply(y.row_mut(i), 0));
    y
}

/// `y[i] = w · x[i] / √(mean(x[i]²) + eps)`
pub fn rms_norm(x: &Table, w: &[f32], eps: f32) -> Table {
    normalize(x, &Norm { kind: NormKind::Rms, weight: w.to_vec(), bias: None, eps })
}

/// `f(x)`
pub fn activation(f: Activation, x: f32) -> f32 {
    let x = f64::from(x);
    let y = match f {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => x / 2.0 * libm::erfc(-x / 2.0_f64.sqrt()),
        Activation::GeluTanh => {
            x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::Tanh => x.tanh(),
    };
    y as f32
}

/// `y[i, j] = f(x[i, j])`
pub fn activate(x: &Table, f: Activation) -> Table {
    Table { cols: x.cols, data: x.data.iter().map(|x| activation(f, *x)).collect() }
}

/// `y[i, j] = f(x[i, j]) · x[i, n + j]`
pub fn gate(x: &Table, f: Activation) -> Table {
    let n = x.cols / 2;
    let row = |i: usize| (0..n).map(move |j| activation(f, x.row(i)[j]) * x.row(i)[n + j]);
    Table { cols: n, data: (0..x.rows()).flat_map(row).collect() }
}

/// `y = cap(scale · y)`, where a logit of -∞ stays -∞.
pub fn shape_logits(y: &mut Table, shape: LogitShape) {
    for logit in y.data.iter_mut().filter(|logit| **logit != f32::NEG_INFINITY) {
        *logit *= shape.scale;
        *logit = shape.softcap.map_or(*logit, |cap| cap * (*logit / cap).tanh());
    }
}

/// Log-probabilities of one row of logits.
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    logits.iter().map(|x| x - max - sum.ln() as f32).collect()
}
