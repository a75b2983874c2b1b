//! Attention over keys and values in blocks.
//!
//! A block of one head is laid out as panels, so that both products of attention are those of [`super::gemm`]: the keys
//! as one panel whose outputs are the block's 16 positions, the values as panels whose outputs are 16 elements of the
//! head. Softmax is online over strides of blocks (Milakov and Gimelshein, 2018; Dao et al., 2022); strides
//! begin at position 0 for every row, so a row's result does not depend on the rows beside it.

use super::{
    CpuBackend,
    elementwise::{CpuRope, each_row},
    gemm::{Arithmetic, Single, Widened, tile},
    memory::{CpuMat, Line, Lines, round},
    pool::Shards,
    simd::{Kernel, Simd, run},
};
use crate::{Attention, BLOCK_SIZE, Batch, DType, Error, Heads, Matrix, Result, SequenceRows};

/// Blocks between two rescalings of the online softmax.
const STRIDE: usize = 8;
/// Query vectors that are computed together at most; fewer are padded with zeros to a multiple of 4.
const TILE: usize = 12;

/// Keys and values of one layer: by block and head, first the keys, then the values.
#[derive(Debug)]
pub struct CpuKv {
    lines: Lines,
    heads: Heads,
    layout: Layout,
}

/// Where things are in a block of one head.
#[derive(Debug, Clone, Copy)]
struct Layout {
    dtype: DType,
    dim: usize,
    /// Lines of the keys: one panel over the head's elements.
    key: usize,
    /// Lines of one panel of values: over the block's positions.
    value: usize,
}

impl Layout {
    fn new(dtype: DType, dim: usize) -> Layout {
        let per_line = if dtype == DType::F32 { 1 } else { 2 };
        Layout { dtype, dim, key: dim.div_ceil(per_line), value: BLOCK_SIZE / per_line }
    }

    fn panels(self) -> usize {
        self.dim.div_ceil(16)
    }

    fn lines(self) -> usize {
        self.key + self.panels() * self.value
    }

    /// Writes the key and value at `offset` of a block. A block's first position clears it: what was there belonged
    /// to another sequence, and even multiplied by zero it must not be seen.
    fn store(self, block: &mut [Line], offset: usize, key: &[f32], value: &[f32]) {
        if offset == 0 {
            block.fill(Line([0; 16]));
        }
        let (keys, values) = block.split_at_mut(self.key);
        for j in 0..self.dim {
            self.put(keys, j, offset, key[j]);
            self.put(&mut values[j / 16 * self.value..], offset, j % 16, value[j]);
        }
    }

    /// Puts `x` at depth `k` of a panel, in lane `lane`.
    fn put(self, panel: &mut [Line], k: usize, lane: usize, x: f32) {
        if self.dtype == DType::F32 {
            panel[k].0[lane] = x.to_bits();
        } else {
            let bits = round(x);
            let word = &mut panel[k / 2].0[lane];
            *word =
                if k.is_multiple_of(2) { *word & 0xffff_0000 | bits } else { *word & 0xffff | bits << 16 };
        }
    }
}

impl CpuKv {
    pub(super) fn new(dtype: DType, blocks: usize, heads: Heads) -> Result<CpuKv> {
        let layout = Layout::new(dtype, heads.dim);
        Ok(CpuKv { lines: Lines::new(blocks * heads.kv * layout.lines(), "keys and values")?, heads, layout })
    }

    pub(super) fn block_bytes(dtype: DType, heads: Heads) -> usize {
        heads.kv * Layout::new(dtype, heads.dim).lines() * size_of::<Line>()
    }

    fn blocks(&self) -> usize {
        self.lines.len() / (self.heads.kv * self.layout.lines()).max(1)
    }

    fn block(&self, block: u32, head: usize) -> *const Line {
        self.lines[(block as usize * self.heads.kv + head) * self.layout.lines()..].as_ptr()
    }
}

pub(super) fn rope_and_store(
    be: &CpuBackend,
    qkv: &mut CpuMat,
    heads: Heads,
    rope: &CpuRope,
    batch: &Batch,
    kv: &mut CpuKv,
) -> Result<()> {
    let op = "rope_and_store";
    let (rows, cols, dim) = (qkv.rows(), qkv.cols(), heads.dim);
    for (what, got, expected) in [
        ("columns of qkv", cols, heads.qkv_cols()),
        ("rows of qkv", rows, batch.rows()),
        ("heads of the memory", kv.heads.kv, heads.kv),
        ("head size of the memory", kv.heads.dim, dim),
    ] {
        if got != expected {
            return Err(Error::Shape { op, what, got, expected });
        }
    }
    rope.check(op, heads, &batch.positions)?;
    let limit = kv.blocks() * BLOCK_SIZE;
    if let Some(&at) = batch.store_at.iter().find(|&&at| at as usize >= limit) {
        return Err(Error::Index { op, what: "place in KV memory", index: at as usize, limit });
    }
    let per_head = kv.layout.lines();
    let layout = kv.layout;
    let memory = Shards(kv.lines.as_mut_ptr());
    let data = Shards(qkv.used_mut().as_mut_ptr());
    // By sequence, since the rows of one share words of a block.
    let sequences = &batch.sequences;
    be.pool.run(sequences.len() * heads.kv, |chunk| {
        let (sequence, head) = (sequences[chunk / heads.kv], chunk % heads.kv);
        let group = heads.query / heads.kv;
        for i in sequence.start as usize..(sequence.start + sequence.rows) as usize {
            // SAFETY: chunks have their own heads of their own rows, and their own blocks: a sequence stores into
            // blocks that no other sequence of the step stores into.
            unsafe {
                let position = batch.positions[i];
                for q in 0..group {
                    rope.rotate(data.slice(i * cols + (head * group + q) * dim, dim), position);
                }
                let key = data.slice(i * cols + (heads.query + head) * dim, dim);
                rope.rotate(key, position);
                let value = data.slice(i * cols + (heads.query + heads.kv + head) * dim, dim);
                let at = batch.store_at[i] as usize;
                let block = memory.slice((at / BLOCK_SIZE * heads.kv + head) * per_head, per_head);
                layout.store(block, at % BLOCK_SIZE, key, value);
            }
        }
    });
    Ok(())
}

pub(super) fn paged_attention(
    be: &CpuBackend,
    qkv: &CpuMat,
    attention: &Attention,
    batch: &Batch,
    kv: &CpuKv,
    y: &mut CpuMat,
) -> Result<()> {
    let op = "paged_attention";
    let heads = attention.heads;
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
    let limit = kv.blocks();
    if let Some(&block) = batch.blocks.iter().find(|&&block| block as usize >= limit) {
        return Err(Error::Index { op, what: "block", index: block as usize, limit });
    }
    y.resize(op, rows)?;
    let y = Shards(y.used_mut().as_mut_ptr());
    // A unit is a tile of query vectors of one sequence and one key head: all query heads of a few rows.
    let group = heads.query / heads.kv;
    let rows_per_unit = (TILE / group).max(1);
    let mut units = Vec::new();
    for sequence in &batch.sequences {
        for head in 0..heads.kv {
            units
                .extend((0..sequence.rows as usize).step_by(rows_per_unit).map(|row| (*sequence, head, row)));
        }
    }
    // Units of the longest context first would need a sort; small units even the load out as well.
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
            run(be.tier, unit);
        }
    });
    Ok(())
}

/// Up to [`TILE`] query vectors of one sequence and key head. Vector v is row `v / group`, query head
/// `head · group + v % group`.
struct Unit<'a> {
    qkv: &'a CpuMat,
    attention: &'a Attention,
    table: &'a [u32],
    kv: &'a CpuKv,
    y: &'a Shards<f32>,
    sequence: SequenceRows,
    head: usize,
    first: usize,
    vectors: usize,
}

/// State of the online softmax of one vector.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
}

/// Largest head size that fits the buffers on the stack.
pub(super) const MAX_DIM: usize = 256;

/// What one unit computes on.
#[repr(C, align(64))]
struct Buffers {
    q: [[f32; MAX_DIM]; TILE],
    out: [[f32; MAX_DIM]; TILE],
    scores: [[f32; STRIDE * BLOCK_SIZE]; TILE],
}

impl Kernel for Unit<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.kv.layout.dtype {
                DType::F32 => self.attend::<S, Single>(),
                _ => self.attend::<S, Widened>(),
            }
        }
    }
}

impl Unit<'_> {
    fn place(&self, v: usize) -> (usize, usize) {
        let group = self.attention.heads.query / self.attention.heads.kv;
        let v = self.first + v;
        (v / group, self.head * group + v % group)
    }

    /// Positions that a vector sees.
    fn sees(&self, v: usize) -> std::ops::Range<usize> {
        let before = (self.sequence.kv_len - self.sequence.rows) as usize;
        let end = before + self.place(v).0 + 1;
        let window = self.attention.window.map_or(usize::MAX, |window| window as usize);
        end.saturating_sub(window)..end
    }

    #[inline(always)]
    unsafe fn attend<S: Simd, A: Arithmetic<S>>(&self) {
        let dim = self.attention.heads.dim;
        let mut buffers = Buffers {
            q: [[0.0; MAX_DIM]; TILE],
            out: [[0.0; MAX_DIM]; TILE],
            scores: [[0.0; STRIDE * BLOCK_SIZE]; TILE],
        };
        for v in 0..self.vectors {
            let (row, head) = self.place(v);
            let q = &self.qkv.row(self.sequence.start as usize + row)[head * dim..][..dim];
            for (to, from) in buffers.q[v].iter_mut().zip(q) {
                *to = from * self.attention.scale;
            }
        }
        let mut running = [Running { max: f32::NEG_INFINITY, sum: 0.0 }; TILE];
        let end = self.sees(self.vectors - 1).end;
        let positions = STRIDE * BLOCK_SIZE;
        let begin = self.sees(0).start / positions * positions;
        for start in (begin..end).step_by(positions) {
            let blocks = &self.table[start / BLOCK_SIZE..end.min(start + positions).div_ceil(BLOCK_SIZE)];
            // SAFETY: the caller's promise; blocks were checked, buffers hold TILE vectors of MAX_DIM.
            unsafe {
                self.scores::<S, A>(&mut buffers, blocks);
                for (v, running) in running.iter_mut().enumerate().take(self.vectors) {
                    self.softmax::<S>(&mut buffers, v, running, start, blocks.len() * BLOCK_SIZE);
                }
                self.values::<S, A>(&mut buffers, blocks);
            }
        }
        for (v, running) in running.iter().enumerate().take(self.vectors) {
            let (row, head) = self.place(v);
            let cols = self.attention.heads.query * dim;
            // SAFETY: units have their own rows and heads.
            let y = unsafe { self.y.slice((self.sequence.start as usize + row) * cols + head * dim, dim) };
            for (y, out) in y.iter_mut().zip(&buffers.out[v]) {
                *y = out / running.sum;
            }
        }
    }

    /// `scores[v, t] = q[v] · k[t]` for all positions of the blocks.
    #[inline(always)]
    unsafe fn scores<S: Simd, A: Arithmetic<S>>(&self, buffers: &mut Buffers, blocks: &[u32]) {
        let stride = MAX_DIM * size_of::<f32>();
        for (i, &block) in blocks.iter().enumerate() {
            let keys = self.kv.block(block, self.head);
            let mut v = 0;
            while v < self.vectors {
                let q = (buffers.q[v].as_ptr().cast(), stride);
                // SAFETY: the caller's promise; the buffers have room for a multiple of 4 vectors.
                unsafe {
                    if self.vectors - v > 8 {
                        self.score_tile::<S, A, 12>(q, keys, &mut buffers.scores[v..v + 12], i);
                        v += 12;
                    } else {
                        self.score_tile::<S, A, 4>(q, keys, &mut buffers.scores[v..v + 4], i);
                        v += 4;
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn score_tile<S: Simd, A: Arithmetic<S>, const R: usize>(
        &self,
        q: (*const u8, usize),
        keys: *const Line,
        scores: &mut [[f32; STRIDE * BLOCK_SIZE]],
        block: usize,
    ) {
        // SAFETY: the caller's promise; a block has 16 lanes of scores.
        unsafe {
            let mut acc = [[S::splat(0.0); 1]; R];
            tile::<S, A, R, 1>(q, (keys, 0), self.kv.layout.key, &mut acc);
            for (scores, acc) in scores.iter_mut().zip(acc) {
                S::store(scores[block * BLOCK_SIZE..].as_mut_ptr(), acc[0]);
            }
        }
    }

    /// Turns a vector's scores into weights, and rescales what it has gathered.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(
        &self,
        buffers: &mut Buffers,
        v: usize,
        running: &mut Running,
        start: usize,
        len: usize,
    ) {
        let sees = self.sees(v);
        let scores = &mut buffers.scores[v][..len];
        if let Some(cap) = self.attention.softcap {
            scores.iter_mut().for_each(|score| *score = cap * (*score / cap).tanh());
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
                for chunk in buffers.out[v][..self.kv.layout.panels() * 16].chunks_mut(16) {
                    S::store(chunk.as_mut_ptr(), S::mul(S::load(chunk.as_ptr()), S::splat(factor)));
                }
            }
            running.sum += S::sum(sum);
            running.max = max;
        }
    }

    /// `out[v] += weights[v, t] · v[t]` over all positions of the blocks.
    #[inline(always)]
    unsafe fn values<S: Simd, A: Arithmetic<S>>(&self, buffers: &mut Buffers, blocks: &[u32]) {
        for panel in 0..self.kv.layout.panels() {
            let mut v = 0;
            while v < self.vectors {
                // SAFETY: as in `scores`.
                unsafe {
                    if self.vectors - v > 8 {
                        self.value_tile::<S, A, 12>(buffers, v, panel, blocks);
                        v += 12;
                    } else {
                        self.value_tile::<S, A, 4>(buffers, v, panel, blocks);
                        v += 4;
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn value_tile<S: Simd, A: Arithmetic<S>, const R: usize>(
        &self,
        buffers: &mut Buffers,
        v: usize,
        panel: usize,
        blocks: &[u32],
    ) {
        let layout = self.kv.layout;
        let stride = STRIDE * BLOCK_SIZE * size_of::<f32>();
        // SAFETY: the caller's promise; 16 elements of each vector's output are there.
        unsafe {
            let mut acc = [[S::splat(0.0); 1]; R];
            for (r, acc) in acc.iter_mut().enumerate() {
                acc[0] = S::load(buffers.out[v + r][panel * 16..].as_ptr());
            }
            for (i, &block) in blocks.iter().enumerate() {
                let values = self.kv.block(block, self.head).add(layout.key + panel * layout.value);
                let weights = buffers.scores[v][i * BLOCK_SIZE..].as_ptr().cast();
                tile::<S, A, R, 1>((weights, stride), (values, 0), layout.value, &mut acc);
            }
            for (r, acc) in acc.iter().enumerate() {
                S::store(buffers.out[v + r][panel * 16..].as_mut_ptr(), acc[0]);
            }
        }
    }
}

/// Copies rows `from(i)` of a matrix.
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
