//! The index data of one step: which rows there are, where their keys and values go, which rows share an adapter.

use crate::{Error, Result};

/// Token positions in one block of KV memory.
pub const BLOCK_SIZE: usize = 16;

/// A run of consecutive rows that use the adapter in one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First row.
    pub start: u32,
    /// One past the last row.
    pub end: u32,
    /// The slot whose adapter these rows use.
    pub slot: u32,
}

/// The rows of one sequence in a step: consecutive, at consecutive positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceRows {
    /// First row of the sequence in this step.
    pub start: u32,
    /// Number of its rows: 1 for decode, the chunk for prefill.
    pub rows: u32,
    /// Tokens of the sequence in KV memory once this step's rows are stored; its last row attends to all of them.
    pub kv_len: u32,
    /// Where its block table begins in [`Batch::blocks`].
    pub first_block: u32,
}

/// One step's rows. Sequences follow each other without gaps: sequence i's rows end where those of i + 1 begin.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Token id of every row. A negative value `-1 - seat` stands for the id sampled last at that seat, which the
    /// host does not know yet.
    pub tokens: Vec<i32>,
    /// Position of every row in its sequence, from 0.
    pub positions: Vec<u32>,
    /// For every row, the number of tokens that the rotary scaling goes by ([`crate::Stretch`]): those of its sequence
    /// when it began to run, or up to this row if that is more. Empty where no scaling depends on it.
    pub lengths: Vec<u32>,
    /// Where every row's key and value are stored: `block * BLOCK_SIZE + offset`.
    pub store_at: Vec<u32>,
    /// The sequences, in row order.
    pub sequences: Vec<SequenceRows>,
    /// Block tables of all sequences, one after the other.
    pub blocks: Vec<u32>,
    /// Runs of rows with an adapter, ascending and disjoint. Rows of the base model are in none.
    pub segments: Vec<Segment>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// As `segments`, in terms of indices into `logit_rows`.
    pub logit_segments: Vec<Segment>,
}

impl Batch {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The number of tokens that the rotary scaling of row i goes by.
    pub fn length(&self, i: usize) -> u32 {
        self.lengths.get(i).copied().unwrap_or(self.positions[i] + 1)
    }

    /// Refuses indices that contradict each other, and two sequences that store into the same block: kernels may store
    /// the rows of different blocks at the same time. Whether indices fit a device's memory is checked where they are used.
    pub fn check(&self) -> Result<()> {
        let op = "upload";
        let rows = self.rows();
        let lengths = if self.lengths.is_empty() { rows } else { self.lengths.len() };
        for (what, got) in [
            ("positions", self.positions.len()),
            ("places to store at", self.store_at.len()),
            ("lengths", lengths),
        ] {
            if got != rows {
                return Err(Error::Shape { op, what, got, expected: rows });
            }
        }
        let mut next = 0;
        for sequence in &self.sequences {
            if sequence.start != next || sequence.rows == 0 || sequence.kv_len < sequence.rows {
                let (got, expected) = (sequence.start as usize, next as usize);
                return Err(Error::Shape { op, what: "first row of a sequence", got, expected });
            }
            next += sequence.rows;
            let limit = self.blocks.len();
            let last = sequence.first_block as usize + (sequence.kv_len as usize).div_ceil(BLOCK_SIZE);
            if last > limit {
                return Err(Error::Index { op, what: "block table entry", index: last - 1, limit });
            }
        }
        if next as usize != rows {
            return Err(Error::Shape {
                op,
                what: "rows of all sequences",
                got: next as usize,
                expected: rows,
            });
        }
        self.check_stores()?;
        check_segments(&self.segments, rows)?;
        check_segments(&self.logit_segments, self.logit_rows.len())?;
        match self.logit_rows.iter().find(|&&row| row as usize >= rows) {
            Some(&row) => Err(Error::Index { op, what: "logit row", index: row as usize, limit: rows }),
            None => Ok(()),
        }
    }

    /// Every run of rows that a sequence stores into one block has that block for itself.
    fn check_stores(&self) -> Result<()> {
        let block = |row: u32| self.store_at[row as usize] / BLOCK_SIZE as u32;
        let mut blocks: Vec<u32> = Vec::with_capacity(self.sequences.len() + self.rows() / BLOCK_SIZE);
        for sequence in &self.sequences {
            let rows = sequence.start..sequence.start + sequence.rows;
            let begins = rows.clone().filter(|&row| row == rows.start || block(row) != block(row - 1));
            blocks.extend(begins.map(block));
        }
        blocks.sort_unstable();
        match blocks.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Error::SharedBlock(pair[0])),
            None => Ok(()),
        }
    }
}

fn check_segments(segments: &[Segment], rows: usize) -> Result<()> {
    let op = "upload";
    let mut after = 0;
    for segment in segments {
        if segment.start < after || segment.end < segment.start {
            let (got, expected) = (segment.start as usize, after as usize);
            return Err(Error::Shape { op, what: "first row of a segment", got, expected });
        }
        after = segment.end;
    }
    if after as usize > rows {
        return Err(Error::Index { op, what: "row of a segment", index: after as usize - 1, limit: rows });
    }
    Ok(())
}

/// Which rows of a step a matrix holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowSet {
    /// All rows.
    All,
    /// [`Batch::logit_rows`] only.
    Logits,
}
