//! Attention, and the operation that rotates queries and keys and fills the KV cache.

use kernels::{
    AttentionShape, Batch, Heads, Matrix, Pairs, Qkv, RopeSpec, Rotation, SequenceRows, Stretch,
    prelude::*,
    reference::{self, KvMemory, Table},
    testing::{Numbers, assert_close, batch},
};

use crate::{Bench, Cost, Machine, Outcome, mat, rows::gathered, uploaded};

pub(crate) fn all<M: Machine>(bench: &Bench<M>) -> Outcome<()> {
    bench.shapes.attention.iter().try_for_each(|shape| attention(bench, *shape))
}

/// The KV cache of one layer, and its reference.
struct Stored<B: Backend> {
    heads: Heads,
    rope: B::Rope,
    spec: RopeSpec,
    kv: B::Kv,
    memory: KvMemory,
    numbers: Numbers,
}

impl<B: Backend> Stored<B> {
    fn new(ops: &B, heads: Heads, blocks: usize) -> kernels::Result<Self> {
        let inv_freq: Vec<f32> = (0..heads.dim / 2).map(|j| 0.8_f32.powi(j as i32)).collect();
        let spec = RopeSpec { inv_freq, scale: 1.0, positions: 8192, stretch: Stretch::None };
        Ok(Stored {
            heads,
            rope: ops.rope(&spec)?,
            spec,
            kv: ops.kv(blocks, heads)?,
            memory: KvMemory::new(blocks, heads),
            numbers: Numbers(3),
        })
    }

    /// Rotates and stores random rows, and returns them.
    fn store(&mut self, ops: &B, host: &Batch) -> kernels::Result<B::Mat> {
        let mut table = self.numbers.table(host.rows(), self.heads.qkv_cols());
        let mut x = mat(ops, &table)?;
        let by = rotated(self.heads, &self.rope);
        ops.rope_and_store(&mut x, by, &uploaded(ops, host)?, &mut self.kv)?;
        let by = reference::Qkv::rotated(self.heads, &self.spec);
        reference::rope_and_store(&mut table, &by, host, &mut self.memory);
        assert_close("rope_and_store", &ops.download(&x)?, &table.data, ops.dtype());
        Ok(x)
    }

    /// Compares the last row of every sequence with the reference.
    fn check(
        &self,
        ops: &B,
        attention: &AttentionShape,
        host: &Batch,
        (x, y): (&B::Mat, &B::Mat),
    ) -> kernels::Result<()> {
        let last = |m: &B::Mat| -> kernels::Result<Table> {
            Ok(gathered(&Table { cols: m.cols(), data: ops.download(m)? }, &host.logit_rows))
        };
        let sequences = host.sequences.iter().zip(0..);
        let rows = Batch {
            sequences: sequences.map(|(s, start)| SequenceRows { start, rows: 1, ..*s }).collect(),
            blocks: host.blocks.clone(),
            ..Batch::default()
        };
        let expected = reference::paged_attention(&last(x)?, attention, &rows, &self.memory);
        assert_close("paged_attention", &last(y)?.data, &expected.data, ops.dtype());
        Ok(())
    }
}

/// Rotates all elements of queries and keys.
fn rotated<B: Backend>(heads: Heads, table: &B::Rope) -> Qkv<'_, B> {
    Qkv { heads, clamp: None, norms: None, rope: Some(Rotation { table, pairs: Pairs::Halves }) }
}

/// One sequence of a batch as a batch of its own.
fn alone(host: &Batch, sequence: &SequenceRows) -> Batch {
    let rows = sequence.start as usize..(sequence.start + sequence.rows) as usize;
    Batch {
        tokens: host.tokens[rows.clone()].to_vec(),
        positions: host.positions[rows.clone()].to_vec(),
        store_at: host.store_at[rows].to_vec(),
        sequences: vec![SequenceRows { start: 0, ..*sequence }],
        blocks: host.blocks.clone(),
        ..Batch::default()
    }
}

/// Attention of some sequences of so many rows, with so many tokens before them.
fn attention<M: Machine>(bench: &Bench<M>, (count, rows, before): (usize, usize, usize)) -> Outcome<()> {
    let (ops, heads) = (bench.ops(), bench.shapes.heads);
    let shape = format!("{count}x{rows}, {before} before");
    let (store, attend) = (format!("rope_and_store {shape}"), format!("paged_attention {shape}"));
    if !bench.wants(&store) && !bench.wants(&attend) {
        return Ok(());
    }
    let host = batch(&vec![(rows, before); count], &[]);
    let blocks = host.blocks.iter().max().map_or(0, |block| *block as usize + 1);
    let mut stored = Stored::new(ops, heads, blocks)?;
    // What comes before, in the same blocks; then the rows themselves.
    let whole = batch(&vec![(before + rows, 0); count], &[]);
    for sequence in &whole.sequences {
        stored.store(ops, &alone(&whole, sequence))?;
    }
    let (mut x, device) = (stored.store(ops, &host)?, uploaded(ops, &host)?);
    let mut y = ops.mat(host.rows(), heads.query * heads.dim)?;
    let attention = AttentionShape::causal(heads);
    ops.paged_attention(&x, attention.into(), &device, &stored.kv, &mut y)?;
    stored.check(ops, &attention, &host, (&x, &y))?;
    let seen = count * (rows * before + rows * (rows + 1) / 2);
    if bench.wants(&attend) {
        let cost = Cost {
            bytes: 2 * count * (rows + before) * heads.kv * heads.dim * ops.dtype().size(),
            flops: 4 * seen * heads.query * heads.dim,
        };
        bench.time(&attend, cost, |_| {
            ops.paged_attention(&x, attention.into(), &device, &stored.kv, &mut y)
        })?;
    }
    if bench.wants(&store) {
        // Reads all columns, writes the rotated ones in place and two parts to memory.
        let moved = (2 * heads.query + 3 * heads.kv) * M::ELEMENT + 2 * heads.kv * ops.dtype().size();
        let cost = Cost { bytes: host.rows() * heads.dim * moved, flops: host.rows() * heads.qkv_cols() * 3 };
        let Stored { rope, kv, .. } = &mut stored;
        bench.time(&store, cost, |_| ops.rope_and_store(&mut x, rotated(heads, rope), &device, kv))?;
    }
    Ok(())
}
