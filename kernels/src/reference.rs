//! What every operation means, as plain loops over f32: the oracle of the conformance tests.

use crate::{AttentionShape, BLOCK_SIZE, Batch, Heads, LoraPart, LoraSite, LowRank, Segment, Span};

/// A row-major matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    /// Number of columns.
    pub cols: usize,
    /// Row after row.
    pub data: Vec<f32>,
}

impl Table {
    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.cols..][..self.cols]
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

/// Adds the deltas of `adapters[slot]` at a site to the rows of its segments.
pub fn add_lora(
    x: &Table,
    site: (usize, &LoraSite),
    segments: &[Segment],
    adapters: &[Vec<LoraPart>],
    y: &mut Table,
) {
    for segment in segments {
        for part in adapters[segment.slot as usize].iter().filter(|part| part.site == site.0) {
            let column: usize = site.1.outputs[..part.slice].iter().sum();
            for i in segment.start as usize..segment.end as usize {
                let Some(LowRank { rank, scale, a, b }) = &part.low_rank else { continue };
                let (a, b) = (a.to_f32(), b.to_f32());
                let shrunk: Vec<f32> = a.chunks(site.1.inputs).map(|a| dot(x.row(i), a)).collect();
                for (o, b) in b.chunks(*rank).enumerate() {
                    y.data[i * y.cols + column + o] += scale * dot(&shrunk, b);
                }
            }
        }
    }
}

/// `y[i] = w · x[i] / √(mean(x[i]²) + eps)`
pub fn rms_norm(x: &Table, w: &[f32], eps: f32) -> Table {
    let row = |i: usize| {
        let row = x.row(i);
        let factor = 1.0 / (dot(row, row) / x.cols as f32 + eps).sqrt();
        row.iter().zip(w).map(move |(x, w)| x * factor * w)
    };
    Table { cols: x.cols, data: (0..x.rows()).flat_map(row).collect() }
}

/// `y[i, j] = silu(x[i, j]) · x[i, n + j]`
pub fn silu_mul(x: &Table) -> Table {
    let n = x.cols / 2;
    let row = |i: usize| (0..n).map(move |j| x.row(i)[j] / (1.0 + (-x.row(i)[j]).exp()) * x.row(i)[n + j]);
    Table { cols: n, data: (0..x.rows()).flat_map(row).collect() }
}

/// Keys and values of all places in KV memory, `[blocks · BLOCK_SIZE, kv · dim]` each.
#[derive(Debug, Clone)]
pub struct KvMemory {
    /// Keys, rotated.
    pub keys: Table,
    /// Values.
    pub values: Table,
}

impl KvMemory {
    /// Zeros.
    pub fn new(blocks: usize, heads: Heads) -> KvMemory {
        let cols = heads.kv * heads.dim;
        let table = Table { cols, data: vec![0.0; blocks * BLOCK_SIZE * cols] };
        KvMemory { keys: table.clone(), values: table }
    }
}

/// Rotates queries and keys in place and stores keys and values.
pub fn rope_and_store(qkv: &mut Table, heads: Heads, inv_freq: &[f32], batch: &Batch, memory: &mut KvMemory) {
    let (dim, half) = (heads.dim, heads.dim / 2);
    for i in 0..qkv.rows() {
        let cols = qkv.cols;
        let row = &mut qkv.data[i * cols..][..cols];
        for head in row[..(heads.query + heads.kv) * dim].chunks_mut(dim) {
            for j in 0..half {
                let (sin, cos) = (batch.positions[i] as f32 * inv_freq[j]).sin_cos();
                let (a, b) = (head[j], head[j + half]);
                head[j] = a * cos - b * sin;
                head[j + half] = b * cos + a * sin;
            }
        }
        let (keys, values) = row[heads.query * dim..].split_at(heads.kv * dim);
        let at = batch.store_at[i] as usize * heads.kv * dim;
        memory.keys.data[at..][..keys.len()].copy_from_slice(keys);
        memory.values.data[at..][..values.len()].copy_from_slice(values);
    }
}

/// Causal attention of every row over its sequence.
pub fn paged_attention(qkv: &Table, attention: &AttentionShape, batch: &Batch, memory: &KvMemory) -> Table {
    let Heads { query, kv, dim } = attention.heads;
    let mut y = Table { cols: query * dim, data: Vec::new() };
    for sequence in &batch.sequences {
        let place = |position: usize| {
            batch.blocks[sequence.first_block as usize + position / BLOCK_SIZE] as usize * BLOCK_SIZE
                + position % BLOCK_SIZE
        };
        for r in 0..sequence.rows {
            let end = (sequence.kv_len - sequence.rows + r + 1) as usize;
            let (begin, end) = match attention.span {
                Span::Causal => (0, end),
                Span::Window(window) => (end.saturating_sub(window as usize), end),
                Span::Bidirectional => (0, sequence.kv_len as usize),
            };
            for head in 0..query {
                let columns = head / (query / kv) * dim..(head / (query / kv) + 1) * dim;
                let q = &qkv.row((sequence.start + r) as usize)[head * dim..][..dim];
                let score = |t| {
                    let score = dot(q, &memory.keys.row(place(t))[columns.clone()]) * attention.scale;
                    attention.softcap.map_or(score, |cap| cap * (score / cap).tanh())
                };
                let scores: Vec<f32> = (begin..end).map(score).collect();
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
                let total: f32 = weights.iter().sum();
                y.data.extend((0..dim).map(|j| {
                    let value = |t: usize| memory.values.row(place(t))[columns.start + j];
                    (begin..end).zip(&weights).map(|(t, weight)| weight * value(t)).sum::<f32>() / total
                }));
            }
        }
    }
    y
}

/// Log-probabilities of one row of logits.
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    logits.iter().map(|x| x - max - sum.ln() as f32).collect()
}
