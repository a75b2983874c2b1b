//! The index data of one step: its rows, where their keys and values are stored, and which rows share an adapter.

use crate::{Error, Result};

/// The number of token positions of one KV block.
pub const BLOCK_SIZE: usize = 16;

/// The number of adapters that a row can have.
pub const MAX_MEMBERS: usize = 4;
/// The sum of the ranks that the adapters of a row may have where it has several, each rounded up to a multiple of
/// [`RANK_STEP`].
pub const MAX_MEMBER_RANKS: usize = 512;
/// What the ranks of the adapters of a row are rounded up to before they are added.
pub const RANK_STEP: usize = 16;

/// Consecutive rows that use an adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Segment {
    /// First row.
    pub start: u32,
    /// One past the last row.
    pub end: u32,
    /// The slot of the adapter.
    pub slot: u32,
    /// The factor of what the adapter adds.
    pub weight: f32,
}

impl Segment {
    /// Rows that use an adapter as it is.
    pub fn new(start: u32, end: u32, slot: u32) -> Segment {
        Segment { start, end, slot, weight: 1.0 }
    }

    /// Whether both have the same rows, and there are any.
    pub(crate) fn is_beside(&self, other: &Segment) -> bool {
        (self.start, self.end) == (other.start, other.end) && self.start < self.end
    }
}

/// Groups segments that have the same rows: the members of an ensemble, or an adapter alone.
pub(crate) fn ensembles(segments: &[Segment]) -> impl Iterator<Item = &[Segment]> {
    segments.chunk_by(Segment::is_beside)
}

/// Whether rows have several adapters, or one whose deltas have a weight. Such an adapter must be a sum: it may have
/// low-rank deltas and biases, but neither magnitudes nor replaced rows.
pub(crate) fn is_ensemble(members: &[Segment]) -> bool {
    members.len() > 1 || members.iter().any(|member| member.weight != 1.0)
}

/// The rows of one sequence in a step: consecutive, at consecutive positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceRows {
    /// First row of the sequence in this step.
    pub start: u32,
    /// The number of its rows: 1 for decode, the size of the chunk for prefill.
    pub rows: u32,
    /// The number of the sequence's tokens in the KV cache once this step's rows are stored. Its last row attends to
    /// all of them.
    pub kv_len: u32,
    /// The index in [`Batch::blocks`] at which its block table begins.
    pub first_block: u32,
}

/// The rows of one step. Sequences follow each other without gaps: the rows of sequence i end where those of i + 1
/// begin.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// The token id of every row. A negative value `-1 - seat` stands for the token that was sampled last at that seat,
    /// which the host does not know yet.
    pub tokens: Vec<i32>,
    /// The position of every row in its sequence, from 0.
    pub positions: Vec<u32>,
    /// For every row, the length by which rotary frequencies are scaled ([`crate::Stretch`]): the number of tokens of
    /// its sequence when it began to run, or the number up to this row if that is more. Empty if no scaling depends on
    /// it.
    pub lengths: Vec<u32>,
    /// The place where every row's key and value are stored: `block * BLOCK_SIZE + offset`.
    pub store_at: Vec<u32>,
    /// The sequences, in row order.
    pub sequences: Vec<SequenceRows>,
    /// The block tables of all sequences, one after the other.
    pub blocks: Vec<u32>,
    /// The segments of rows with an adapter, ascending. Two of them have no row in common or all of them: then their rows
    /// have several adapters, which are added in the order of the segments. Rows of the base model are in none.
    pub segments: Vec<Segment>,
    /// The rows whose logits are computed, ascending.
    pub logit_rows: Vec<u32>,
    /// As `segments`, but with indices into `logit_rows`.
    pub logit_segments: Vec<Segment>,
}

impl Batch {
    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The length by which the rotary frequencies of row i are scaled.
    pub fn length(&self, i: usize) -> u32 {
        self.lengths.get(i).copied().unwrap_or(self.positions[i] + 1)
    }

    /// Refuses indices that contradict each other, and sequences that store into the same block, because kernels store
    /// the rows of different blocks at the same time. Operations check whether indices fit the device's memory.
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

    /// Checks that no block is stored into by more than one run of rows.
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
    for members in ensembles(segments) {
        let [segment, ..] = members else { continue };
        if segment.start < after || segment.end < segment.start {
            let (got, expected) = (segment.start as usize, after as usize);
            return Err(Error::Shape { op, what: "first row of a segment", got, expected });
        }
        if members.len() > MAX_MEMBERS {
            let (index, limit) = (members.len() - 1, MAX_MEMBERS);
            return Err(Error::Index { op, what: "adapter of a row", index, limit });
        }
        after = segment.end;
    }
    if after as usize > rows {
        return Err(Error::Index { op, what: "row of a segment", index: after as usize - 1, limit: rows });
    }
    Ok(())
}

/// The rows of a step that a matrix has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowSet {
    /// All rows.
    All,
    /// Only [`Batch::logit_rows`].
    Logits,
}
