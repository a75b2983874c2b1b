//! Paged attention.
//!
//! The softmax is computed online over strides of blocks (Milakov and Gimelshein, 2018; Dao et al., 2022). Strides
//! begin at position 0 for every row, so that a row's result does not depend on the other rows.

use std::{cell::RefCell, ptr, slice};

use super::{
    CpuBackend,
    elementwise::each_row,
    gemm::{Arithmetic, Half, Single, tile},
    kv::CpuKv,
    memory::{CpuMat, Line},
    pool::Shards,
    simd::{Kernel, Simd, run},
};
use crate::{Attention, BLOCK_SIZE, Batch, DType, Error, Matrix, Result, SequenceRows, Span};

/// The number of positions of a stride, after which the online softmax is rescaled.
const POSITIONS: usize = 8 * BLOCK_SIZE;
/// The largest number of query vectors that are computed together. Fewer are padded with zeros to a multiple of 4.
const TILE: usize = 24;

pub(super) fn paged_attention(
    be: &CpuBackend,
    qkv: &CpuMat,
    attention: Attention<'_, CpuBackend>,
    batch: &Batch,
    kv: &CpuKv,
    y: &mut CpuMat,
) -> Result<()> {
    let op = "paged_attention";
    let heads = attention.shape.heads;
    let rows = qkv.rows();
    for (what, got, expected) in [
        ("columns of qkv", qkv.cols(), heads.qkv_cols()),
        ("columns of y", y.cols(), heads.query * heads.dim),
        ("rows of qkv", rows, batch.rows()),
        ("heads of the memory", kv.heads.kv, heads.kv),
        ("head size of the memory", kv.heads.dim, heads.dim),
    ] {
        if got != expected {
            return Err(Error::Shape { op, what, got, expected });
        }
    }
    for (what, vector) in [("sinks", attention.sinks), ("slopes", attention.slopes)] {
        if let Some(vector) = vector.filter(|vector| vector.len() != heads.query) {
            return Err(Error::Shape { op, what, got: vector.len(), expected: heads.query });
        }
    }
    let limit = kv.blocks();
    for sequence in &batch.sequences {
        if let Some(&block) =
            seen_blocks(batch, sequence, attention.shape.span).iter().find(|&&block| block as usize >= limit)
        {
            return Err(Error::Index { op, what: "block", index: block as usize, limit });
        }
    }
    y.resize(op, rows)?;
    let y = Shards(y.used_mut().as_mut_ptr());
    // A unit is a tile of query vectors of one sequence and one key head. It has all query heads of a few rows.
    let group = heads.query / heads.kv;
    let rows_per_unit = (TILE / group).max(1);
    let mut units = Vec::new();
    for sequence in &batch.sequences {
        for head in 0..heads.kv {
            units
                .extend((0..sequence.rows as usize).step_by(rows_per_unit).map(|row| (*sequence, head, row)));
        }
    }
    // Units are small, which balances the load without sorting them by the length of their contexts.
    be.pool.run(units.len(), |i| {
        let (sequence, head, row) = units[i];
        let vectors = rows_per_unit.min(sequence.rows as usize - row) * group;
        for first in (0..vectors).step_by(TILE) {
            let unit = Unit {
                qkv,
                attention,
                table: &batch.blocks[sequence.first_block as usize..],
                kv,
                y: &y,
                sequence,
                head,
                first: row * group + first,
                vectors: TILE.min(vectors - first),
            };
            ROOM.with_borrow_mut(|room| {
                let buffers = room.buffers(kv.layout.panels() * 16);
                run(be.tier, Attend { unit, buffers });
            });
        }
    });
    Ok(())
}

/// The blocks of a sequence that any of its rows attends to. Entries before all windows are not valid, because the
/// blocks have been released.
fn seen_blocks<'a>(batch: &'a Batch, sequence: &SequenceRows, span: Span) -> &'a [u32] {
    let before = (sequence.kv_len - sequence.rows) as usize;
    let first = match span {
        Span::Causal | Span::Bidirectional => 0,
        Span::Window(window) => (before + 1).saturating_sub(window as usize) / BLOCK_SIZE,
    };
    let blocks = &batch.blocks[sequence.first_block as usize..];
    &blocks[first..(sequence.kv_len as usize).div_ceil(BLOCK_SIZE)]
}

/// Up to [`TILE`] query vectors of one sequence and key head. Vector v belongs to row `v / group` and query head
/// `head · group + v % group`.
struct Unit<'a> {
    qkv: &'a CpuMat,
    attention: Attention<'a, CpuBackend>,
    table: &'a [u32],
    kv: &'a CpuKv,
    y: &'a Shards<f32>,
    sequence: SequenceRows,
    head: usize,
    first: usize,
    vectors: usize,
}

/// The state of one vector's online softmax.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
}

/// The queries, sums of values, and scores of up to [`TILE`] vectors.
struct Buffers<'a> {
    q: &'a mut [f32],
    out: &'a mut [f32],
    scores: &'a mut [f32],
    /// Elements of a query and of a sum: the head size, padded to whole panels.
    width: usize,
}

/// A thread's memory for buffers.
#[derive(Default)]
struct Room(Vec<Line>);

thread_local! {
    static ROOM: RefCell<Room> = RefCell::default();
}

impl Room {
    fn buffers(&mut self, width: usize) -> Buffers<'_> {
        let lines = TILE * (2 * width + POSITIONS) / 16;
        if self.0.len() < lines {
            self.0.resize(lines, Line([0; 16]));
        }
        // SAFETY: these are the words of that many lines, all of which are valid f32.
        let all = unsafe { slice::from_raw_parts_mut(self.0.as_mut_ptr().cast::<f32>(), lines * 16) };
        let (q, rest) = all.split_at_mut(TILE * width);
        let (out, scores) = rest.split_at_mut(TILE * width);
        Buffers { q, out, scores, width }
    }
}

/// The kernel that computes a unit, with its memory.
struct Attend<'a> {
    unit: Unit<'a>,
    buffers: Buffers<'a>,
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.unit.kv.layout.dtype {
                DType::F32 => self.unit.attend::<S, Single>(&mut self.buffers),
                _ => self.unit.attend::<S, Half>(&mut self.buffers),
            }
        }
    }
}

impl Unit<'_> {
    fn place(&self, v: usize) -> (usize, usize) {
        let group = self.attention.shape.heads.query / self.attention.shape.heads.kv;
        let v = self.first + v;
        (v / group, self.head * group + v % group)
    }

    /// The positions that a vector attends to.
    fn sees(&self, v: usize) -> std::ops::Range<usize> {
        let before = (self.sequence.kv_len - self.sequence.rows) as usize;
        let end = before + self.place(v).0 + 1;
        match self.attention.shape.span {
            Span::Causal => 0..end,
            Span::Window(window) => end.saturating_sub(window as usize)..end,
            Span::Bidirectional => 0..self.sequence.kv_len as usize,
        }
    }

    /// Stores the scaled queries, padded with zeros to whole tiles, and zeroes the sums.
    fn begin(&self, buffers: &mut Buffers<'_>) {
        let (dim, width) = (self.attention.shape.heads.dim, buffers.width);
        let used = self.vectors.next_multiple_of(4) * width;
        buffers.q[..used].fill(0.0);
        buffers.out[..used].fill(0.0);
        for v in 0..self.vectors {
            let (row, head) = self.place(v);
            let q = &self.qkv.row(self.sequence.start as usize + row)[head * dim..][..dim];
            for (to, from) in buffers.q[v * width..].iter_mut().zip(q) {
                *to = from * self.attention.shape.scale;
            }
        }
    }

    #[inline(always)]
    unsafe fn attend<S: Simd, A: Arithmetic<S>>(&self, buffers: &mut Buffers<'_>) {
        self.begin(buffers);
        let mut running = [Running { max: f32::NEG_INFINITY, sum: 0.0 }; TILE];
        if let Some(sinks) = self.attention.sinks {
            for (v, running) in running.iter_mut().enumerate().take(self.vectors) {
                *running = Running { max: sinks[self.place(v).1], sum: 1.0 };
            }
        }
        let end = self.sees(self.vectors - 1).end;
        // Blocks before all windows are skipped: they may hold anything.
        let mut next = self.sees(0).start / BLOCK_SIZE * BLOCK_SIZE;
        while next < end {
            let start = next;
            next = (start + 1).next_multiple_of(POSITIONS);
            let blocks = &self.table[start / BLOCK_SIZE..end.min(next).div_ceil(BLOCK_SIZE)];
            // SAFETY: the caller's promise, and blocks have been checked.
            unsafe {
                self.scores::<S, A>(buffers, blocks);
                for (v, running) in running.iter_mut().enumerate().take(self.vectors) {
                    self.softmax::<S>(buffers, v, running, start, blocks.len() * BLOCK_SIZE);
                }
                self.values::<S, A>(buffers, blocks);
            }
        }
        let dim = self.attention.shape.heads.dim;
        for (v, running) in running.iter().enumerate().take(self.vectors) {
            let (row, head) = self.place(v);
            let cols = self.attention.shape.heads.query * dim;
            // SAFETY: units have their own rows and heads.
            let y = unsafe { self.y.slice((self.sequence.start as usize + row) * cols + head * dim, dim) };
            for (y, out) in y.iter_mut().zip(&buffers.out[v * buffers.width..]) {
                *y = out / running.sum;
            }
        }
    }

    /// `scores[v, t] = q[v] · k[t]` for all positions of the blocks.
    #[inline(always)]
    unsafe fn scores<S: Simd, A: Arithmetic<S>>(&self, buffers: &mut Buffers<'_>, blocks: &[u32]) {
        let mut v = 0;
        while v < self.vectors {
            // SAFETY: the caller's promise. The buffers have room for whole tiles.
            v += unsafe {
                match (S::WIDE, self.vectors - v) {
                    (true, 9..) => self.scores_across::<S, A, 12, 2>(buffers, v, blocks),
                    (true, 4..) => self.scores_across::<S, A, 4, 4>(buffers, v, blocks),
                    (true, _) => self.scores_across::<S, A, 3, 4>(buffers, v, blocks),
                    (false, _) => self.scores_across::<S, A, 4, 1>(buffers, v, blocks),
                }
            };
        }
    }

    /// R vectors from `v` on; returns R.
    #[inline(always)]
    unsafe fn scores_across<S: Simd, A: Arithmetic<S>, const R: usize, const P: usize>(
        &self,
        buffers: &mut Buffers<'_>,
        v: usize,
        blocks: &[u32],
    ) -> usize {
        let mut block = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while block + P <= blocks.len() {
                self.score_tile::<S, A, R, P>(buffers, v, blocks, block);
                block += P;
            }
            while block < blocks.len() {
                self.score_tile::<S, A, R, 1>(buffers, v, blocks, block);
                block += 1;
            }
        }
        R
    }

    #[inline(always)]
    unsafe fn score_tile<S: Simd, A: Arithmetic<S>, const R: usize, const P: usize>(
        &self,
        buffers: &mut Buffers<'_>,
        v: usize,
        blocks: &[u32],
        block: usize,
    ) {
        let stride = buffers.width * size_of::<f32>();
        let q = buffers.q[v * buffers.width..][..R * buffers.width].as_ptr().cast();
        let scores = buffers.scores[v * POSITIONS..][..R * POSITIONS].as_mut_ptr();
        let mut keys = [ptr::null(); P];
        for (keys, block) in keys.iter_mut().zip(&blocks[block..]) {
            *keys = self.kv.block(*block, self.head);
        }
        // SAFETY: the caller's promise. A block has 16 lanes of scores.
        unsafe {
            let mut acc = [[S::splat(0.0); P]; R];
            tile::<S, A, R, P>((q, stride), (keys, 1), self.kv.layout.key, &mut acc);
            for (r, acc) in acc.iter().enumerate() {
                for (p, acc) in acc.iter().enumerate() {
                    S::store(scores.add(r * POSITIONS + (block + p) * BLOCK_SIZE), *acc);
                }
            }
        }
    }

    /// Turns a vector's scores into softmax weights, and rescales its sum so far.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(
        &self,
        buffers: &mut Buffers<'_>,
        v: usize,
        running: &mut Running,
        start: usize,
        len: usize,
    ) {
        let sees = self.sees(v);
        let scores = &mut buffers.scores[v * POSITIONS..][..len];
        if let Some(cap) = self.attention.shape.softcap {
            scores.iter_mut().for_each(|score| *score = cap * (*score / cap).tanh());
        }
        if let Some(slopes) = self.attention.slopes {
            let (row, head) = self.place(v);
            let position = (self.sequence.kv_len - self.sequence.rows) as usize + row;
            for (t, score) in (start..).zip(scores.iter_mut()) {
                *score += slopes[head] * (t as f32 - position as f32);
            }
        }
        let (low, high) =
            (sees.start.saturating_sub(start).min(len), sees.end.saturating_sub(start).min(len));
        scores[..low].fill(f32::NEG_INFINITY);
        scores[high..].fill(f32::NEG_INFINITY);
        // SAFETY: `len` is a multiple of 16, and so is the head's padded size.
        unsafe {
            let mut max = S::splat(running.max);
            for chunk in scores.chunks(16) {
                max = S::max(max, S::load(chunk.as_ptr()));
            }
            let max = S::largest(max);
            if max == f32::NEG_INFINITY {
                scores.fill(0.0);
                return;
            }
            let mut sum = S::splat(0.0);
            for chunk in scores.chunks_mut(16) {
                let weight = S::exp(S::add(S::load(chunk.as_ptr()), S::splat(-max)));
                S::store(chunk.as_mut_ptr(), weight);
                sum = S::add(sum, weight);
            }
            if max != running.max {
                let factor = (running.max - max).exp();
                running.sum *= factor;
                for chunk in buffers.out[v * buffers.width..][..buffers.width].chunks_mut(16) {
                    S::store(chunk.as_mut_ptr(), S::mul(S::load(chunk.as_ptr()), S::splat(factor)));
                }
            }
            running.sum += S::sum(sum);
            running.max = max;
        }
    }

    /// `out[v] += weights[v, t] · v[t]` over all positions of the blocks.
    #[inline(always)]
    unsafe fn values<S: Simd, A: Arithmetic<S>>(&self, buffers: &mut Buffers<'_>, blocks: &[u32]) {
        let mut v = 0;
        while v < self.vectors {
            // SAFETY: as in `scores`.
            v += unsafe {
                match (S::WIDE, self.vectors - v) {
                    (true, 9..) => self.values_across::<S, A, 12, 2>(buffers, v, blocks),
                    (true, 4..) => self.values_across::<S, A, 4, 4>(buffers, v, blocks),
                    (true, _) => self.values_across::<S, A, 3, 4>(buffers, v, blocks),
                    (false, _) => self.values_across::<S, A, 4, 1>(buffers, v, blocks),
                }
            };
        }
    }

    /// R vectors from `v` on; returns R.
    #[inline(always)]
    unsafe fn values_across<S: Simd, A: Arithmetic<S>, const R: usize, const P: usize>(
        &self,
        buffers: &mut Buffers<'_>,
        v: usize,
        blocks: &[u32],
    ) -> usize {
        let panels = self.kv.layout.panels();
        let mut panel = 0;
        // SAFETY: the caller's promise.
        unsafe {
            while panel + P <= panels {
                self.value_tile::<S, A, R, P>(buffers, v, blocks, panel);
                panel += P;
            }
            while panel < panels {
                self.value_tile::<S, A, R, 1>(buffers, v, blocks, panel);
                panel += 1;
            }
        }
        R
    }

    #[inline(always)]
    unsafe fn value_tile<S: Simd, A: Arithmetic<S>, const R: usize, const P: usize>(
        &self,
        buffers: &mut Buffers<'_>,
        v: usize,
        blocks: &[u32],
        panel: usize,
    ) {
        let (layout, width) = (self.kv.layout, buffers.width);
        let out = buffers.out[v * width..][..R * width].as_mut_ptr();
        let weights = buffers.scores[v * POSITIONS..][..R * POSITIONS].as_ptr();
        // SAFETY: the caller's promise. Each vector's sum has room for 16 elements.
        unsafe {
            let mut acc = [[S::splat(0.0); P]; R];
            for (r, acc) in acc.iter_mut().enumerate() {
                for (p, acc) in acc.iter_mut().enumerate() {
                    *acc = S::load(out.add(r * width + (panel + p) * 16));
                }
            }
            for (i, &block) in blocks.iter().enumerate() {
                let mut values = [self.kv.block(block, self.head).add(layout.key + panel * layout.value); P];
                for p in 1..P {
                    values[p] = values[p - 1].add(layout.value);
                }
                let weights = weights.add(i * BLOCK_SIZE).cast();
                let stride = POSITIONS * size_of::<f32>();
                tile::<S, A, R, P>((weights, stride), (values, 1), layout.value, &mut acc);
            }
            for (r, acc) in acc.iter().enumerate() {
                for (p, acc) in acc.iter().enumerate() {
                    S::store(out.add(r * width + (panel + p) * 16), *acc);
                }
            }
        }
    }
}

/// Copies the logit rows of a matrix.
pub(super) fn gather(be: &CpuBackend, x: &CpuMat, batch: &Batch, y: &mut CpuMat) -> Result<()> {
    let op = "gather_logit_rows";
    let (cols, limit) = (x.cols(), x.rows());
    if y.cols() != cols {
        return Err(Error::Shape { op, what: "columns of y", got: y.cols(), expected: cols });
    }
    if let Some(&row) = batch.logit_rows.iter().find(|&&row| row as usize >= limit) {
        return Err(Error::Index { op, what: "row", index: row as usize, limit });
    }
    y.resize(op, batch.logit_rows.len())?;
    let y = Shards(y.used_mut().as_mut_ptr());
    each_row(be, batch.logit_rows.len(), cols, |i| {
        // SAFETY: row i is this call's own.
        unsafe { y.slice(i * cols, cols) }.copy_from_slice(x.row(batch.logit_rows[i] as usize));
    });
    Ok(())
}
