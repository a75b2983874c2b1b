//! The operations on queries, keys and values, from their projection to attention.

use super::{Norm, Table, dot};
use crate::{AttentionShape, BLOCK_SIZE, Batch, Heads, NormSpan, Pairs, RopeSpec, Span, Stretch};

/// The KV cache: keys and values, `[blocks · BLOCK_SIZE, kv · dim]` each.
#[derive(Debug, Clone)]
pub struct KvMemory {
    /// The rotated keys.
    pub keys: Table,
    /// The values.
    pub values: Table,
}

impl KvMemory {
    /// Makes a cache of zeros.
    pub fn new(blocks: usize, heads: Heads) -> KvMemory {
        let cols = heads.kv * heads.dim;
        let table = Table { cols, data: vec![0.0; blocks * BLOCK_SIZE * cols] };
        KvMemory { keys: table.clone(), values: table }
    }
}

/// What is done with queries, keys and values before attention; see [`crate::Qkv`].
#[derive(Debug, Clone)]
pub struct Qkv<'a> {
    /// The heads.
    pub heads: Heads,
    /// All elements are clamped to ± this value first.
    pub clamp: Option<f32>,
    /// The norms of queries and keys, and what is normed together.
    pub norms: Option<(&'a Norm, &'a Norm, NormSpan)>,
    /// The rotary embedding of queries and keys.
    pub rope: Option<(&'a RopeSpec, Pairs)>,
}

impl<'a> Qkv<'a> {
    /// Only a rotary embedding of halves.
    pub fn rotated(heads: Heads, spec: &'a RopeSpec) -> Qkv<'a> {
        Qkv { heads, clamp: None, norms: None, rope: Some((spec, Pairs::Halves)) }
    }
}

/// The frequency of a pair, for a row of a given length.
fn frequency(spec: &RopeSpec, pair: usize, length: u32) -> f32 {
    match &spec.stretch {
        Stretch::Long { original, inv_freq } if length > *original => inv_freq[pair],
        Stretch::Dynamic { original, factor } if length > *original => {
            let stretched = factor * length as f32 / *original as f32 - (factor - 1.0);
            let pairs = spec.inv_freq.len() as f32;
            spec.inv_freq[pair] / stretched.powf(2.0 * pair as f32 / (2.0 * pairs - 2.0))
        }
        _ => spec.inv_freq[pair],
    }
}

fn rotate(head: &mut [f32], (spec, pairs): (&RopeSpec, Pairs), position: u32, length: u32) {
    let count = spec.inv_freq.len();
    for pair in 0..count {
        let (sin, cos) = (position as f32 * frequency(spec, pair, length)).sin_cos();
        let (sin, cos) = (sin * spec.scale, cos * spec.scale);
        let [i, k] = match pairs {
            Pairs::Halves => [pair, pair + count],
            Pairs::Neighbours => [2 * pair, 2 * pair + 1],
        };
        (head[i], head[k]) = (head[i] * cos - head[k] * sin, head[k] * cos + head[i] * sin);
    }
}

/// Clamps, norms and rotates queries and keys in place, and stores keys and values.
pub fn rope_and_store(qkv: &mut Table, by: &Qkv<'_>, batch: &Batch, memory: &mut KvMemory) {
    let Heads { query, kv, dim } = by.heads;
    for i in 0..qkv.rows() {
        let row = qkv.row_mut(i);
        if let Some(most) = by.clamp {
            row.iter_mut().for_each(|x| *x = x.clamp(-most, most));
        }
        let (queries, rest) = row.split_at_mut(query * dim);
        let (keys, values) = rest.split_at_mut(kv * dim);
        if let Some((of_queries, of_keys, span)) = by.norms {
            for (norm, part) in [(of_queries, &mut *queries), (of_keys, &mut *keys)] {
                let width = if span == NormSpan::Row { part.len() } else { dim };
                for (head, part) in part.chunks_mut(width).enumerate() {
                    norm.apply(part, head * width);
                }
            }
        }
        if let Some(rope) = by.rope {
            for head in queries.chunks_mut(dim).chain(keys.chunks_mut(dim)) {
                rotate(head, rope, batch.positions[i], batch.length(i));
            }
        }
        let at = batch.store_at[i] as usize;
        memory.keys.row_mut(at).copy_from_slice(keys);
        memory.values.row_mut(at).copy_from_slice(values);
    }
}

/// The parameters of attention; see [`crate::Attention`].
#[derive(Debug, Clone)]
pub struct Attention<'a> {
    /// Heads, scale, span and softcap.
    pub shape: AttentionShape,
    /// Attention sinks: a score without a value for every query head.
    pub sinks: Option<&'a [f32]>,
    /// ALiBi: a slope for every query head.
    pub slopes: Option<&'a [f32]>,
}

impl From<&AttentionShape> for Attention<'_> {
    fn from(shape: &AttentionShape) -> Self {
        Attention { shape: *shape, sinks: None, slopes: None }
    }
}

/// Attention of every row over its sequence's keys and values.
pub fn paged_attention<'a>(
    qkv: &Table,
    attention: impl Into<Attention<'a>>,
    batch: &Batch,
    memory: &KvMemory,
) -> Table {
    let Attention { shape, sinks, slopes } = attention.into();
    let Heads { query, kv, dim } = shape.heads;
    let mut y = Table { cols: query * dim, data: Vec::new() };
    for sequence in &batch.sequences {
        let place = |position: usize| {
            batch.blocks[sequence.first_block as usize + position / BLOCK_SIZE] as usize * BLOCK_SIZE
                + position % BLOCK_SIZE
        };
        for r in 0..sequence.rows {
            let own = (sequence.kv_len - sequence.rows + r) as usize;
            let (begin, end) = match shape.span {
                Span::Causal => (0, own + 1),
                Span::Window(window) => ((own + 1).saturating_sub(window as usize), own + 1),
                Span::Bidirectional => (0, sequence.kv_len as usize),
            };
            for head in 0..query {
                let columns = head / (query / kv) * dim..(head / (query / kv) + 1) * dim;
                let q = &qkv.row((sequence.start + r) as usize)[head * dim..][..dim];
                let score = |t: usize| {
                    let score = dot(q, &memory.keys.row(place(t))[columns.clone()]) * shape.scale;
                    let score = shape.softcap.map_or(score, |cap| cap * (score / cap).tanh());
                    score + slopes.map_or(0.0, |slopes| slopes[head] * (t as f32 - own as f32))
                };
                let scores: Vec<f32> = (begin..end).map(score).collect();
                let sink = sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[head]);
                let max = scores.iter().copied().fold(sink, f32::max);
                let weights: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
                let total: f32 = weights.iter().sum::<f32>() + (sink - max).exp();
                y.data.extend((0..dim).map(|j| {
                    let value = |t: usize| memory.values.row(place(t))[columns.start + j];
                    (begin..end).zip(&weights).map(|(t, weight)| weight * value(t)).sum::<f32>() / total
                }));
            }
        }
    }
    y
}
