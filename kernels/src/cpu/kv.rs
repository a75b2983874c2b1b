//! The KV cache, and the operation that stores keys and values in it.
//!
//! A block of one head is stored as panels, so that both GEMMs of attention are those of [`super::gemm`]. The keys are
//! one panel, whose outputs are the 16 positions of the block. The values are panels whose outputs are 16 elements of
//! the head. Beside bf16 weights, elements are f16: they take the same bytes with eight times the precision, and have
//! enough range.

use super::{
    CpuBackend,
    elementwise::{each_row, norm_in_place},
    gemm::{load_some, prefetch},
    memory::{CpuMat, Line, Lines},
    pool::Shards,
    simd::{Kernel, Simd, run},
};
use crate::{BLOCK_SIZE, Batch, DType, Error, Heads, Matrix, NormSpan, QkNorms, Qkv, Result, Rotation};

/// The KV cache of one layer. Each head of each block has its keys, followed by its values.
#[derive(Debug)]
pub struct CpuKv {
    lines: Lines,
    pub(super) heads: Heads,
    pub(super) layout: Layout,
}

/// The layout of one head of a block. Element k of lane i of a panel is its element `16 k + i`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// The type of elements: f32 or f16.
    pub(super) dtype: DType,
    dim: usize,
    /// Lines of the panel of keys, whose inputs are the elements of the head.
    pub(super) key: usize,
    /// Lines of one panel of values, whose inputs are the positions of the block.
    pub(super) value: usize,
}

impl Layout {
    /// The layout beside weights of a type.
    fn new(dtype: DType, dim: usize) -> Layout {
        let (dtype, per_line) = if dtype == DType::F32 { (DType::F32, 1) } else { (DType::F16, 2) };
        Layout { dtype, dim, key: dim.div_ceil(per_line), value: BLOCK_SIZE / per_line }
    }

    /// The number of panels of values.
    pub(super) fn panels(self) -> usize {
        self.dim.div_ceil(16)
    }

    fn lines(self) -> usize {
        self.key + self.panels() * self.value
    }
}

impl CpuKv {
    pub(super) fn new(dtype: DType, blocks: usize, heads: Heads) -> Result<CpuKv> {
        let layout = Layout::new(dtype, heads.dim);
        Ok(CpuKv {
            lines: Lines::zeroed(blocks * heads.kv * layout.lines(), "keys and values")?,
            heads,
            layout,
        })
    }

    pub(super) fn block_bytes(dtype: DType, heads: Heads) -> usize {
        heads.kv * Layout::new(dtype, heads.dim).lines() * size_of::<Line>()
    }

    pub(super) fn blocks(&self) -> usize {
        self.lines.len() / (self.heads.kv * self.layout.lines()).max(1)
    }

    /// The keys of a head of a block, which its values follow.
    pub(super) fn block(&self, block: u32, head: usize) -> *const Line {
        self.lines[(block as usize * self.heads.kv + head) * self.layout.lines()..].as_ptr()
    }
}

pub(super) fn rope_and_store(
    be: &CpuBackend,
    qkv: &mut CpuMat,
    by: Qkv<'_, CpuBackend>,
    batch: &Batch,
    kv: &mut CpuKv,
) -> Result<()> {
    let op = "rope_and_store";
    let heads = by.heads;
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
    if let Some(rope) = &by.rope {
        rope.table.check(op, heads, &batch.positions)?;
    }
    let limit = kv.blocks() * BLOCK_SIZE;
    if let Some(&at) = batch.store_at.iter().find(|&&at| at as usize >= limit) {
        return Err(Error::Index { op, what: "place in KV memory", index: at as usize, limit });
    }
    clamp_and_norm(be, qkv, &by)?;
    let rotate = |head: &mut [f32], i: usize| {
        if let Some(Rotation { table, pairs }) = by.rope {
            table.rotate(pairs, head, batch.positions[i], batch.length(i));
        }
    };
    let layout = kv.layout;
    let memory = Shards(kv.lines.as_mut_ptr());
    let data = Shards(qkv.used_mut().as_mut_ptr());
    let group = heads.query / heads.kv;
    // The rows of one block are one chunk, because the block's first position clears it.
    let block = |i: usize| batch.store_at[i] as usize / BLOCK_SIZE;
    let runs: Vec<usize> = (0..rows).filter(|&i| i == 0 || block(i) != block(i - 1)).collect();
    let chunks = runs.len() * heads.kv;
    be.pool.run(chunks, |chunk| {
        // Prefetches one chunk ahead, because rotating takes less time than memory.
        for next in chunk..(chunk + 2).min(chunks) {
            let lines = (block(runs[next / heads.kv]) * heads.kv + next % heads.kv) * layout.lines();
            (lines..lines + layout.lines()).for_each(|line| prefetch(memory.0.wrapping_add(line)));
        }
        let (first, head) = (runs[chunk / heads.kv], chunk % heads.kv);
        let end = runs.get(chunk / heads.kv + 1).copied().unwrap_or(rows);
        for i in first..end {
            // SAFETY: chunks write to different heads of different rows, and to different blocks: `Batch::check`
            // refuses a step that stores into a block in more than one run of rows.
            unsafe {
                let head_of = |h: usize| data.slice(i * cols + h * dim, dim);
                for q in 0..group {
                    rotate(head_of(head * group + q), i);
                }
                let key = head_of(heads.query + head);
                rotate(key, i);
                let place = memory.slice((block(i) * heads.kv + head) * layout.lines(), layout.lines());
                let offset = batch.store_at[i] as usize % BLOCK_SIZE;
                let value = head_of(heads.query + heads.kv + head);
                run(be.tier, Store { layout, block: place, offset, key, value });
            }
        }
    });
    Ok(())
}

/// Clamps queries, keys and values, and norms queries and keys.
fn clamp_and_norm(be: &CpuBackend, qkv: &mut CpuMat, by: &Qkv<'_, CpuBackend>) -> Result<()> {
    let (rows, cols, Heads { query, kv, dim }) = (qkv.rows(), qkv.cols(), by.heads);
    if by.clamp.is_none() && by.norms.is_none() {
        return Ok(());
    }
    if let Some(QkNorms { query: of_query, key, over }) = &by.norms {
        for (norm, heads) in [(of_query, query), (key, kv)] {
            let (op, what, expected) = ("rope_and_store", "weights of a norm", heads * dim);
            let got = norm.weight.len();
            if got != expected && (*over == NormSpan::Row || got != dim) {
                return Err(Error::Shape { op, what, got, expected });
            }
            if let Some(bias) = norm.bias.filter(|bias| bias.len() != got) {
                return Err(Error::Shape { op, what: "biases of a norm", got: bias.len(), expected: got });
            }
        }
    }
    let data = Shards(qkv.used_mut().as_mut_ptr());
    each_row(be, rows, cols, |i| {
        // SAFETY: row i is this call's own.
        let row = unsafe { data.slice(i * cols, cols) };
        if let Some(most) = by.clamp {
            row.iter_mut().for_each(|x| *x = x.clamp(-most, most));
        }
        let Some(QkNorms { query: of_query, key, over }) = &by.norms else { return };
        let (queries, rest) = row.split_at_mut(query * dim);
        for (norm, part) in [(of_query, queries), (key, &mut rest[..kv * dim])] {
            let width = if *over == NormSpan::Row { part.len() } else { dim };
            for (i, part) in part.chunks_mut(width).enumerate() {
                // If all heads share a weight, it has the elements of one head.
                norm_in_place(be, norm, i * width % norm.weight.len(), part);
            }
        }
    });
    Ok(())
}

/// The kernel that writes the key and value at `offset` of a block. The first position clears the block: values of
/// another sequence must not have an effect, and even a weight of zero would pass on their infinities and NaNs.
struct Store<'a> {
    layout: Layout,
    block: &'a mut [Line],
    offset: usize,
    key: &'a [f32],
    value: &'a [f32],
}

impl Kernel for Store<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        if self.offset == 0 {
            self.block.fill(Line([0; 16]));
        }
        let (keys, values) = self.block.split_at_mut(self.layout.key);
        // SAFETY: the caller's promise. The panel of keys has 16 lanes of `dim` elements, and each panel of values has
        // 16 lanes of 16.
        unsafe {
            match self.layout.dtype {
                DType::F32 => {
                    let keys = keys.as_mut_ptr().cast::<f32>().add(self.offset);
                    for (j, x) in self.key.iter().enumerate() {
                        keys.add(16 * j).write(*x);
                    }
                    for (panel, x) in self.value.chunks(16).enumerate() {
                        let place = values.as_mut_ptr().add(panel * self.layout.value).cast::<f32>();
                        S::store(place.add(16 * self.offset), load_some::<S>(x));
                    }
                }
                _ => {
                    let keys = keys.as_mut_ptr().cast::<u16>().add(self.offset);
                    for (panel, x) in self.key.chunks(16).enumerate() {
                        let mut halves = [0; 16];
                        S::store_half(halves.as_mut_ptr(), saturated::<S>(load_some::<S>(x)));
                        for (j, half) in halves.iter().enumerate().take(x.len()) {
                            keys.add(16 * (16 * panel + j)).write(*half);
                        }
                    }
                    for (panel, x) in self.value.chunks(16).enumerate() {
                        let place = values.as_mut_ptr().add(panel * self.layout.value).cast::<u16>();
                        S::store_half(place.add(16 * self.offset), saturated::<S>(load_some::<S>(x)));
                    }
                }
            }
        }
    }
}

/// Clamps values to the range of f16. NaN stays NaN.
#[inline(always)]
unsafe fn saturated<S: Simd>(x: S::V) -> S::V {
    const LARGEST: f32 = 65504.0;
    // SAFETY: no memory is touched.
    unsafe { S::min(S::splat(LARGEST), S::max(S::splat(-LARGEST), x)) }
}
