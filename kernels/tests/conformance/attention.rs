//! What happens to queries, keys and values, and attention over blocks of them.

use kernels::{
    Attention, AttentionShape, BLOCK_SIZE, Backend, Batch, Heads, NormKind, NormSpan, Pairs, QkNorms, Qkv,
    RopeSpec, Rotation, SequenceRows, Span, Stretch,
    reference::{self, KvMemory},
    testing::{Numbers, assert_close},
};

use super::{device_batch_for, mat, rows::Vectors};

/// Sequences with blocks for `most` tokens each, which are nobody's neighbours.
struct Sequences {
    count: usize,
    blocks_of_each: usize,
}

impl Sequences {
    fn new(count: usize, most: usize) -> Sequences {
        Sequences { count, blocks_of_each: most.div_ceil(BLOCK_SIZE) }
    }

    fn blocks(&self) -> usize {
        self.count * self.blocks_of_each
    }

    fn block(&self, sequence: usize, block: usize) -> usize {
        (self.blocks_of_each - 1 - block) * self.count + sequence
    }

    /// A step of `(rows, tokens before them)` of each sequence. Blocks that no row sees may be anybody's.
    fn step(&self, rows: &[(usize, usize)], span: Span) -> Batch {
        let mut batch = Batch::default();
        for (i, &(rows, before)) in rows.iter().enumerate().filter(|(_, rows)| rows.0 > 0) {
            let (start, first_block) = (batch.rows() as u32, batch.blocks.len() as u32);
            let released = match span {
                Span::Window(window) => (before + 1).saturating_sub(window as usize) / BLOCK_SIZE,
                Span::Causal | Span::Bidirectional => 0,
            };
            for block in 0..(before + rows).div_ceil(BLOCK_SIZE) {
                batch.blocks.push(if block < released { u32::MAX } else { self.block(i, block) as u32 });
            }
            for position in before..before + rows {
                let block = self.block(i, position / BLOCK_SIZE);
                batch.tokens.push(0);
                batch.positions.push(position as u32);
                batch.store_at.push((block * BLOCK_SIZE + position % BLOCK_SIZE) as u32);
            }
            let kv_len = (before + rows) as u32;
            batch.sequences.push(SequenceRows { start, rows: rows as u32, kv_len, first_block });
        }
        batch
    }
}

/// Runs prompts in two chunks and three single tokens behind them, and compares each step.
fn check_attention<B: Backend>(ops: &B, by: &reference::Attention<'_>, lens: &[usize]) {
    let mut numbers = Numbers(5);
    let reference::Attention { shape, sinks, slopes } = by;
    let heads = shape.heads;
    let sequences = Sequences::new(lens.len(), lens.iter().max().unwrap() + 3);
    let (mut kv, mut memory) =
        (ops.kv(sequences.blocks(), heads).unwrap(), KvMemory::new(sequences.blocks(), heads));
    assert!(ops.kv_block_bytes(heads) > 0);
    let vector = |values: &&[f32]| ops.vector(values).unwrap();
    let (sinks, slopes) = (sinks.as_ref().map(vector), slopes.as_ref().map(vector));
    let of_lens = |step: &dyn Fn(usize) -> (usize, usize)| lens.iter().map(|len| step(*len)).collect();
    let mut steps: Vec<Vec<(usize, usize)>> = match shape.span {
        Span::Bidirectional => vec![of_lens(&|len| (len, 0))],
        _ => vec![of_lens(&|len| (len - len / 3, 0)), of_lens(&|len| (len / 3, len - len / 3))],
    };
    if shape.span != Span::Bidirectional {
        steps.extend((0..3).map(|i| of_lens(&|len| (1, len + i))));
    }
    for rows in steps {
        let host = sequences.step(&rows, shape.span);
        if host.rows() == 0 {
            continue;
        }
        let mut qkv = numbers.table(host.rows(), heads.qkv_cols());
        let device = device_batch_for(ops, &host, shape.span);
        let mut x = mat(ops, &qkv);
        let plain = Qkv { heads, clamp: None, norms: None, rope: None };
        ops.rope_and_store(&mut x, plain, &device, &mut kv).unwrap();
        let plain = reference::Qkv { heads, clamp: None, norms: None, rope: None };
        reference::rope_and_store(&mut qkv, &plain, &host, &mut memory);
        let mut y = ops.mat(host.rows(), heads.query * heads.dim).unwrap();
        let attention = Attention { shape: *shape, sinks: sinks.as_ref(), slopes: slopes.as_ref() };
        ops.paged_attention(&x, attention, &device, &kv, &mut y).unwrap();
        let expected = reference::paged_attention(&qkv, by.clone(), &host, &memory);
        assert_close(&format!("{by:?}, {rows:?}"), &ops.download(&y).unwrap(), &expected.data, ops.dtype());
    }
}

const HEADS: [(usize, usize, usize); 6] =
    [(4, 2, 16), (9, 3, 64), (2, 2, 24), (12, 1, 32), (1, 1, 256), (5, 5, 80)];
const LENS: [usize; 6] = [1, 5, 16, 17, 150, 261];

fn each_of_heads(mut check: impl FnMut(AttentionShape)) {
    for (query, kv, dim) in HEADS {
        let heads = Heads { query, kv, dim };
        check(AttentionShape { scale: 0.2, ..AttentionShape::causal(heads) });
    }
}

pub(super) fn attention_over_blocks<B: Backend>(ops: &B) {
    each_of_heads(|shape| {
        check_attention(ops, &(&shape).into(), &LENS);
        check_attention(ops, &(&AttentionShape { softcap: Some(3.0), ..shape }).into(), &[40, 7]);
    });
}

/// Blocks that lie before all windows were given to others: their numbers mean nothing.
pub(super) fn attention_over_windows<B: Backend>(ops: &B) {
    each_of_heads(|shape| {
        for window in [1, 16, 20, 100, 1000] {
            let shape = AttentionShape { span: Span::Window(window), ..shape };
            check_attention(ops, &(&shape).into(), &[7, 190, 33]);
        }
    });
}

pub(super) fn attention_to_both_sides<B: Backend>(ops: &B) {
    each_of_heads(|shape| {
        check_attention(ops, &(&AttentionShape { span: Span::Bidirectional, ..shape }).into(), &LENS);
    });
}

pub(super) fn sinks_and_slopes<B: Backend>(ops: &B) {
    let mut numbers = Numbers(6);
    each_of_heads(|shape| {
        let sinks: Vec<f32> = numbers.table(1, shape.heads.query).data.iter().map(|x| 4.0 * x).collect();
        let slopes: Vec<f32> = (1..=shape.heads.query).map(|h| 0.5_f32.powi(h as i32)).collect();
        let (sinks, slopes) = (Some(sinks.as_slice()), Some(slopes.as_slice()));
        let windowed = AttentionShape { span: Span::Window(20), softcap: Some(3.0), ..shape };
        for by in [
            reference::Attention { shape, sinks, slopes: None },
            reference::Attention { shape, sinks: None, slopes },
            reference::Attention { shape: windowed, sinks, slopes },
        ] {
            check_attention(ops, &by, &[3, 16, 50, 170]);
        }
    });
}

/// Prepares queries and keys, and compares them and what is attended to.
fn check_qkv<B: Backend>(ops: &B, by: &reference::Qkv<'_>, lengths: &[u32]) {
    let heads = by.heads;
    let sequences = Sequences::new(3, 120);
    let mut host = sequences.step(&[(1, 40), (23, 0), (9, 90)], Span::Causal);
    host.lengths = host.positions.iter().zip(lengths.iter().cycle()).map(|(p, l)| (*l).max(p + 1)).collect();
    let device = device_batch_for(ops, &host, Span::Causal);
    let mut qkv = Numbers(8).table(host.rows(), heads.qkv_cols());
    let mut x = mat(ops, &qkv);
    let mut kv = ops.kv(sequences.blocks(), heads).unwrap();
    let table = by.rope.map(|(spec, _)| ops.rope(spec).unwrap());
    let vectors = by.norms.map(|(query, key, _)| [Vectors::new(ops, query), Vectors::new(ops, key)]);
    let norms = by.norms.zip(vectors.as_ref()).map(|((query, key, over), [of_query, of_key])| QkNorms {
        query: of_query.as_norm(query),
        key: of_key.as_norm(key),
        over,
    });
    let rope = by.rope.zip(table.as_ref()).map(|((_, pairs), table)| Rotation { table, pairs });
    ops.rope_and_store(&mut x, Qkv { heads, clamp: by.clamp, norms, rope }, &device, &mut kv).unwrap();
    let mut memory = KvMemory::new(sequences.blocks(), heads);
    reference::rope_and_store(&mut qkv, by, &host, &mut memory);
    // Values stay as they came, or are clamped in memory only.
    let rotated = (heads.query + heads.kv) * heads.dim;
    let got = ops.download(&x).unwrap();
    let parts = |data: &[f32]| -> Vec<f32> {
        data.chunks(heads.qkv_cols()).flat_map(|row| row[..rotated].to_vec()).collect()
    };
    assert_close(&format!("{by:?}"), &parts(&got), &parts(&qkv.data), ops.dtype());
    // The keys and values in memory, seen by the sequence that begins in this step.
    let sequence = host.sequences[1];
    let shape = AttentionShape::causal(heads);
    let mut y = ops.mat(host.rows(), heads.query * heads.dim).unwrap();
    ops.paged_attention(&x, shape.into(), &device, &kv, &mut y).unwrap();
    let expected = reference::paged_attention(&qkv, &shape, &host, &memory);
    let rows =
        sequence.start as usize * y_cols(heads)..(sequence.start + sequence.rows) as usize * y_cols(heads);
    let got = ops.download(&y).unwrap();
    assert_close(&format!("attention after {by:?}"), &got[rows.clone()], &expected.data[rows], ops.dtype());
}

fn y_cols(heads: Heads) -> usize {
    heads.query * heads.dim
}

fn frequencies(pairs: usize) -> Vec<f32> {
    (0..pairs).map(|j| 0.1_f32.powf(j as f32 / pairs as f32 * 2.0)).collect()
}

pub(super) fn rotations_of_every_kind<B: Backend>(ops: &B) {
    for (query, kv, dim) in [(4, 2, 16), (9, 3, 64), (2, 1, 80), (1, 1, 256), (6, 6, 128)] {
        let heads = Heads { query, kv, dim };
        // A table of so many positions would take terabytes.
        let many = i32::MAX as usize;
        let stretches = [
            (Stretch::None, 120),
            (Stretch::None, many),
            (Stretch::Long { original: 64, inv_freq: vec![] }, 120),
            (Stretch::Dynamic { original: 64, factor: 3.0 }, 120),
            (Stretch::Dynamic { original: 64, factor: 3.0 }, many),
        ];
        for rotated in [dim, dim / 2, 2 * (dim / 5).max(2)] {
            for (stretch, positions) in &stretches {
                let inv_freq = frequencies(rotated / 2);
                let mut stretch = stretch.clone();
                if let Stretch::Long { inv_freq: long, .. } = &mut stretch {
                    *long = inv_freq.iter().map(|f| f / 3.0).collect();
                }
                let spec = RopeSpec { inv_freq, scale: 1.25, positions: *positions, stretch };
                for pairs in [Pairs::Halves, Pairs::Neighbours] {
                    let by = reference::Qkv { heads, clamp: None, norms: None, rope: Some((&spec, pairs)) };
                    // Rows below and above the original context beside each other.
                    check_qkv(ops, &by, &[1, 100, 64, 65]);
                }
            }
        }
    }
}

pub(super) fn queries_and_keys_are_clamped_and_normed<B: Backend>(ops: &B) {
    let mut numbers = Numbers(11);
    for (query, kv, dim) in [(4, 2, 16), (9, 3, 64), (2, 1, 80), (1, 1, 256), (6, 6, 128)] {
        let heads = Heads { query, kv, dim };
        let spec =
            RopeSpec { inv_freq: frequencies(dim / 2), scale: 1.0, positions: 120, stretch: Stretch::None };
        for rope in [None, Some((&spec, Pairs::Halves))] {
            check_qkv(ops, &reference::Qkv { heads, clamp: Some(0.3), norms: None, rope }, &[1]);
            for (kind, bias) in [(NormKind::Rms, false), (NormKind::Rms, true), (NormKind::Layer, true)] {
                for (span, own) in [(NormSpan::Head, false), (NormSpan::Head, true), (NormSpan::Row, true)] {
                    let mut norm = |heads: usize| {
                        let width = if own { heads * dim } else { dim };
                        let weight = numbers.table(1, width).data;
                        let bias = bias.then(|| numbers.table(1, width).data);
                        reference::Norm { kind, weight, bias, eps: 1e-4 }
                    };
                    let (of_queries, of_keys) = (norm(query), norm(kv));
                    let norms = Some((&of_queries, &of_keys, span));
                    for clamp in [None, Some(0.6)] {
                        check_qkv(ops, &reference::Qkv { heads, clamp, norms, rope }, &[1]);
                    }
                }
            }
        }
    }
}
