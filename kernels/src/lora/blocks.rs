//! Reading matrices into memory as GPUs use them: A as it is stored, and B transposed in blocks of outputs.

use std::ops::Range;

use super::{readers::rows_at_a_time, source::MatrixSource};
use crate::{DType, Result};

/// Outputs of a block of B, which is stored as `[rank, OUT_BLOCK]`.
pub(crate) const OUT_BLOCK: usize = 64;

/// Memory that nobody has been given yet.
pub(crate) struct Unfilled<'a> {
    /// The pieces behind the present one.
    rest: std::vec::IntoIter<&'a mut [u8]>,
    /// What is left of the present piece.
    current: &'a mut [u8],
    /// The offset of its first byte.
    at: usize,
}

impl<'a> Unfilled<'a> {
    /// Pieces, of which each continues the one before.
    pub(crate) fn new(pieces: impl Iterator<Item = &'a mut [u8]>) -> Unfilled<'a> {
        Unfilled { rest: pieces.collect::<Vec<_>>().into_iter(), current: &mut [], at: 0 }
    }

    /// Takes the next bytes, in the pieces that they lie in.
    ///
    /// # Panics
    /// If there are not as many.
    pub(crate) fn take(&mut self, mut bytes: usize) -> Vec<&'a mut [u8]> {
        let mut taken = Vec::with_capacity(1);
        while bytes > 0 {
            if self.current.is_empty() {
                self.current = self.rest.next().expect("an adapter is laid out within its memory");
            }
            let current = std::mem::take(&mut self.current);
            let (own, rest) = current.split_at_mut(bytes.min(current.len()));
            self.current = rest;
            self.at += own.len();
            bytes -= own.len();
            taken.push(own);
        }
        taken
    }

    /// Leaves out what is before an offset.
    pub(crate) fn skip_to(&mut self, at: usize) {
        self.take(at - self.at);
    }
}

/// Some rows of a matrix, and the memory that they fill.
pub(crate) struct Chunk<'a, M> {
    matrix: &'a M,
    rows: Range<usize>,
    /// Whether they are outputs of B, to be transposed in blocks.
    is_blocked: bool,
    /// Consecutive memory, which is in several pieces where a chunk reaches over the end of one.
    to: Vec<&'a mut [u8]>,
}

/// Chunks of a matrix that is kept as it is stored.
pub(crate) fn rows_of<'a, M: MatrixSource>(
    dtype: DType,
    matrix: &'a M,
    unfilled: &mut Unfilled<'a>,
    chunks: &mut Vec<Chunk<'a, M>>,
) {
    let [rows, cols] = matrix.shape();
    let count = rows_at_a_time(dtype, matrix, 1);
    for first in (0..rows).step_by(count) {
        let rows = first..rows.min(first + count);
        let to = unfilled.take(rows.len() * cols * dtype.size());
        chunks.push(Chunk { matrix, rows, is_blocked: false, to });
    }
}

/// Chunks of a B. If there is room for more outputs than it has rows, as logits may have more columns than the base
/// weight has rows, the others are zero.
pub(crate) fn blocks_of<'a, M: MatrixSource>(
    dtype: DType,
    (matrix, outputs): (&'a M, usize),
    unfilled: &mut Unfilled<'a>,
    chunks: &mut Vec<Chunk<'a, M>>,
) {
    let ([rows, rank], count) = (matrix.shape(), rows_at_a_time(dtype, matrix, OUT_BLOCK));
    for first in (0..outputs).step_by(count) {
        let blocks = outputs.min(first + count).next_multiple_of(OUT_BLOCK) - first;
        let to = unfilled.take(blocks * rank * dtype.size());
        chunks.push(Chunk { matrix, rows: first.min(rows)..rows.min(first + count), is_blocked: true, to });
    }
}

impl<M: MatrixSource> Chunk<'_, M> {
    pub(crate) fn fill(mut self, dtype: DType, scratch: &mut Vec<u8>) -> Result<(), M::Error> {
        let cols = self.matrix.shape()[1];
        let read = self.rows.len() * cols * dtype.size();
        let filled: usize = self.to.iter().map(|to| to.len()).sum();
        if scratch.len() < read + filled {
            scratch.resize(read + filled, 0);
        }
        let (read, together) = scratch.split_at_mut(read);
        let mut to = std::mem::take(&mut self.to);
        let out = match &mut to[..] {
            [only] => &mut **only,
            _ => &mut together[..filled],
        };
        if self.is_blocked {
            self.matrix.read(self.rows, dtype, read)?;
            match dtype {
                DType::F32 => block(cols, read.as_chunks::<4>().0, out.as_chunks_mut::<4>().0),
                DType::Bf16 | DType::F16 => {
                    block(cols, read.as_chunks::<2>().0, out.as_chunks_mut::<2>().0);
                }
            }
        } else {
            self.matrix.read(self.rows, dtype, out)?;
        }
        if to.len() > 1 {
            let mut rest = &together[..filled];
            for to in to {
                let own;
                (own, rest) = rest.split_at(to.len());
                to.copy_from_slice(own);
            }
        }
        Ok(())
    }
}

/// Transposes rows of B in blocks, with zeros behind the last row.
fn block<const SIZE: usize>(rank: usize, rows: &[[u8; SIZE]], blocks: &mut [[u8; SIZE]]) {
    let mut rows = rows.chunks(OUT_BLOCK * rank);
    for block in blocks.chunks_exact_mut(OUT_BLOCK * rank) {
        let rows = rows.next().unwrap_or_default();
        if rows.len() < block.len() {
            block.fill([0; SIZE]);
        }
        for (output, row) in rows.chunks_exact(rank).enumerate() {
            for (of_rank, x) in block.chunks_exact_mut(OUT_BLOCK).zip(row) {
                of_rank[output] = *x;
            }
        }
    }
}
