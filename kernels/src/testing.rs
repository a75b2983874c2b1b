//! Helpers for tests of backends: reproducible inputs, batches of every shape, and tolerances.

use crate::{
    BLOCK_SIZE, Batch, DType, LoraPart, LoraSite, LowRank, MatrixSource, Result, Segment, SequenceRows,
    lora::{
        blocks::{OUT_BLOCK, Unfilled, blocks_of, rows_of},
        readers::Readers,
    },
    reference::Table,
};

/// The largest allowed |got - expected|, relative to the largest |expected| of the tensor. Activations may be rounded
/// to `dtype` before a GEMM.
pub fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 2e-6,
        DType::F16 => 2e-3,
        DType::Bf16 => 1.2e-2,
    }
}

/// Panics unless two tables agree within [`tolerance`].
pub fn assert_close(what: &str, got: &[f32], expected: &[f32], dtype: DType) {
    assert_eq!(got.len(), expected.len(), "{what}: number of elements");
    let size = expected.iter().fold(1e-3_f32, |size, x| size.max(x.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs() / size;
        assert!(error <= tolerance(dtype), "{what}[{i}]: {got}, expected {expected}, error {error}");
    }
}

/// A pseudo-random generator (linear congruential, with the constants of Knuth's MMIX).
#[derive(Debug, Clone)]
pub struct Numbers(pub u64);

impl Numbers {
    /// A number in [-1, 1), uniformly distributed, which bf16 represents exactly.
    pub fn number(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 56) as f32 - 128.0) / 128.0
    }

    /// An integer below `limit`, uniformly distributed.
    pub fn below(&mut self, limit: usize) -> usize {
        self.number();
        (self.0 >> 33) as usize % limit
    }

    /// A random matrix.
    pub fn table(&mut self, rows: usize, cols: usize) -> Table {
        Table { cols, data: (0..rows * cols).map(|_| self.number()).collect() }
    }

    /// A random low-rank delta of one slice.
    pub fn part(&mut self, (site, slice): (usize, usize), shape: &LoraSite, lora_rank: usize) -> LoraPart {
        let a = self.table(lora_rank, shape.inputs).data;
        let b = self.table(shape.outputs[slice], lora_rank).data;
        LoraPart::delta((site, slice), lora_rank, 1.0, &a, &b)
    }
}

/// The threads of a backend that read adapters, and memory in pieces of `size` bytes that they fill as a GPU has it: the A
/// of every part as it is stored, behind it its B in blocks, each at a multiple of 256 bytes.
pub struct Stage {
    readers: Readers,
    pieces: Vec<Vec<u8>>,
}

impl Stage {
    /// Memory of `bytes` bytes.
    pub fn new(bytes: usize, size: usize) -> Stage {
        let pieces = (0..bytes.div_ceil(size)).map(|_| vec![0xaa; size]).collect();
        Stage { readers: Readers::new(), pieces }
    }

    /// Reads on up to so many threads from now on.
    pub fn allow(&mut self, threads: usize) {
        self.readers = Readers::of(threads);
    }

    fn aligned(bytes: usize) -> usize {
        bytes.next_multiple_of(256)
    }

    /// Bytes that the deltas of parts take.
    pub fn bytes_of<M: MatrixSource>(dtype: DType, parts: &[LoraPart<M>]) -> usize {
        let deltas = parts.iter().filter_map(|part| part.low_rank.as_ref());
        let bytes = deltas.map(|LowRank { rank, a, b, .. }| {
            let matrices = [a.shape()[1], b.shape()[0].next_multiple_of(OUT_BLOCK)];
            matrices.map(|width| Self::aligned(width * rank * dtype.size())).iter().sum::<usize>()
        });
        bytes.sum()
    }

    /// Reads the deltas of parts.
    pub fn fill<M: MatrixSource>(&mut self, dtype: DType, parts: &[LoraPart<M>]) -> Result<(), M::Error> {
        let mut unfilled = Unfilled::new(self.pieces.iter_mut().map(Vec::as_mut_slice));
        let (mut chunks, mut at) = (Vec::new(), 0);
        for LowRank { rank, a, b, .. } in parts.iter().filter_map(|part| part.low_rank.as_ref()) {
            unfilled.skip_to(at);
            rows_of(dtype, a, &mut unfilled, &mut chunks);
            at += Self::aligned(rank * a.shape()[1] * dtype.size());
            unfilled.skip_to(at);
            at += Self::aligned(rank * b.shape()[0].next_multiple_of(OUT_BLOCK) * dtype.size());
            blocks_of(dtype, (b, b.shape()[0]), &mut unfilled, &mut chunks);
        }
        self.readers.run(Self::bytes_of(dtype, parts), chunks, |chunk, scratch| chunk.fill(dtype, scratch))
    }

    /// All of the memory.
    pub fn bytes(&self) -> Vec<u8> {
        self.pieces.concat()
    }
}

/// Makes a batch of sequences `(rows, tokens before them)`. Blocks of different sequences are interleaved, so that no
/// two blocks of a sequence are adjacent. All rows of sequence i use slot `slots[i]`, and its last row has logits.
pub fn batch(sequences: &[(usize, usize)], slots: &[Option<u32>]) -> Batch {
    let members: Vec<Vec<_>> =
        slots.iter().map(|slot| slot.map(|slot| (slot, 1.0)).into_iter().collect()).collect();
    batch_of_ensembles(sequences, &members)
}

/// As [`batch`], where all rows of sequence i use the adapters in `members[i]`: slots with weights.
pub fn batch_of_ensembles(sequences: &[(usize, usize)], members: &[Vec<(u32, f32)>]) -> Batch {
    let mut batch = Batch::default();
    let mut next_block = 0;
    for (i, &(rows, before)) in sequences.iter().enumerate() {
        let (start, first_block) = (batch.rows(), batch.blocks.len());
        // Blocks are two apart, in descending order.
        let count = (rows + before).div_ceil(BLOCK_SIZE);
        batch.blocks.extend((0..count).rev().map(|b| (next_block + 2 * b) as u32));
        next_block += 2 * count;
        for position in before..before + rows {
            let block = batch.blocks[first_block + position / BLOCK_SIZE] as usize;
            batch.tokens.push((7 * i + position) as i32 % 50);
            batch.positions.push(position as u32);
            batch.store_at.push((block * BLOCK_SIZE + position % BLOCK_SIZE) as u32);
        }
        batch.sequences.push(SequenceRows {
            start: start as u32,
            rows: rows as u32,
            kv_len: (rows + before) as u32,
            first_block: first_block as u32,
        });
        let logit = batch.logit_rows.len() as u32;
        batch.logit_rows.push((batch.rows() - 1) as u32);
        for &(slot, weight) in members.get(i).into_iter().flatten() {
            let end = batch.rows() as u32;
            batch.segments.push(Segment { weight, ..Segment::new(start as u32, end, slot) });
            batch.logit_segments.push(Segment { weight, ..Segment::new(logit, logit + 1, slot) });
        }
    }
    batch
}
