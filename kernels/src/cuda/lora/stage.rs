//! Staging: where everything of an adapter lies in pinned memory, and reading its matrices into their places.

use super::{
    super::{
        CudaBackend, convert,
        ffi::{LoraEntry, MAX_LORA_RANK, OUT_BLOCK},
        pinned::{PIECE, Pieces},
        unsupported,
    },
    Needs,
};
use crate::{
    DType, LoraPart, LoraShape, LoraSite, LowRank, MatrixSource, ReplacedRows, Result, SiteKind,
    lora::blocks::{Chunk, Unfilled, blocks_of, rows_of},
};

/// Everything of an adapter begins at a multiple of so many bytes.
const ALIGN: usize = 256;

/// Where what an adapter has at one slice lies in its memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    pub(super) shape: LoraShape,
    /// Index of the slice when those of all sites are counted.
    pub(super) slice: usize,
    outputs: usize,
    pub(super) scale: f32,
    /// Columns of A.
    pub(super) a_cols: usize,
    a: usize,
    b: usize,
    gain: usize,
    bias: usize,
    /// None: the replaced rows are the first ones.
    ids: Option<usize>,
    rows: usize,
}

impl Placed {
    /// The entry of an adapter whose memory begins at `base`.
    pub(super) fn entry(&self, base: u64) -> LoraEntry {
        let at = |offset: usize, wanted: bool| if wanted { base + offset as u64 } else { 0 };
        let LoraShape { lora_rank, has_magnitude, has_bias, rows, .. } = self.shape;
        LoraEntry {
            a: at(self.a, lora_rank > 0),
            b: at(self.b, lora_rank > 0),
            gain: at(self.gain, has_magnitude),
            bias: at(self.bias, has_bias),
            ids: at(self.ids.unwrap_or(0), self.ids.is_some()),
            rows: at(self.rows, rows > 0),
            lora_rank: lora_rank as u32,
            scale: self.scale,
            num_rows: rows as u32,
            a_cols: self.a_cols as u32,
        }
    }
}

/// An adapter in pinned memory. For each part: A `[lora_rank, inputs]`; B transposed in blocks of outputs, `[blocks,
/// lora_rank, OUT_BLOCK]`, with zeros behind the last output; magnitude and bias in f32; ids and replaced rows.
pub struct CudaAdapter {
    pub(super) memory: Pieces,
    pub(super) parts: Vec<Placed>,
    pub(super) needs: Needs,
    /// The number of its content.
    pub(super) content: u64,
}

impl CudaAdapter {
    pub(in crate::cuda) fn stage<M: MatrixSource>(
        be: &CudaBackend,
        sites: &[LoraSite],
        parts: &[LoraPart<M>],
    ) -> Result<CudaAdapter, M::Error> {
        parts.iter().try_for_each(|part| part.check(sites))?;
        let shapes: Vec<_> = parts.iter().map(LoraPart::shape).collect();
        let (mut placed, bytes) = layout(be.dtype, sites, &shapes)?;
        let mut memory = be.pinned.take(bytes)?;
        let mut needs = Needs::default();
        let (mut unfilled, mut chunks) = (memory.unfilled(), Vec::new());
        for (part, placed) in parts.iter().zip(&mut placed) {
            placed.divide(be.dtype, part, &mut unfilled, &mut chunks);
            let head = sites[part.site].kind == SiteKind::Head;
            needs = needs
                | Needs {
                    affine: part.magnitude.is_some() || part.bias.is_some(),
                    head_rows: head && part.rows.is_some(),
                };
        }
        be.readers.run(bytes, chunks, |chunk, scratch| chunk.fill(be.dtype, scratch))?;
        let content = parts.first().map_or(0, |part| part.content);
        Ok(CudaAdapter { memory, parts: placed, needs, content })
    }

    pub(in crate::cuda) fn bytes(&self) -> usize {
        self.memory.bytes()
    }
}

impl Placed {
    /// Writes the vectors of a part, and divides its matrices into chunks.
    fn divide<'a, M: MatrixSource>(
        &mut self,
        dtype: DType,
        part: &'a LoraPart<M>,
        unfilled: &mut Unfilled<'a>,
        chunks: &mut Vec<Chunk<'a, M>>,
    ) {
        if let Some(LowRank { scale, a, b, .. }) = &part.low_rank {
            (self.scale, self.a_cols) = (*scale, a.shape()[1]);
            unfilled.skip_to(self.a);
            rows_of(dtype, a, unfilled, chunks);
            unfilled.skip_to(self.b);
            blocks_of(dtype, (b, self.outputs), unfilled, chunks);
        }
        for (at, vector, neutral) in [(self.gain, &part.magnitude, 1.0), (self.bias, &part.bias, 0.0)] {
            if let Some(vector) = vector {
                let mut vector = vector.clone();
                vector.resize(self.outputs, neutral);
                unfilled.skip_to(at);
                write(unfilled, &convert::bytes_of(&vector));
            }
        }
        if let Some(ReplacedRows { ids, values }) = &part.rows {
            match (ids, self.ids) {
                (Some(ids), Some(at)) => {
                    unfilled.skip_to(at);
                    write(unfilled, &convert::bytes_of(ids));
                }
                _ => self.ids = None,
            }
            unfilled.skip_to(self.rows);
            rows_of(dtype, values, unfilled, chunks);
        }
    }
}

/// Writes the next bytes.
fn write(unfilled: &mut Unfilled<'_>, mut data: &[u8]) {
    for to in unfilled.take(data.len()) {
        let own;
        (own, data) = data.split_at(to.len());
        to.copy_from_slice(own);
    }
}

/// Where the parts of an adapter lie, and its bytes. Room for ids is kept wherever rows are replaced.
fn layout(dtype: DType, sites: &[LoraSite], shapes: &[LoraShape]) -> Result<(Vec<Placed>, usize)> {
    let (first, mut bytes) = (first_slices(sites), 0);
    let mut reserve = |size: usize| {
        let at = bytes;
        bytes += size.next_multiple_of(ALIGN);
        at
    };
    let mut placed = Vec::with_capacity(shapes.len());
    for &shape in shapes {
        let LoraShape { site, slice, lora_rank, has_magnitude, has_bias, rows } = shape;
        let [inputs, outputs] = shape.of(sites)?;
        if lora_rank > MAX_LORA_RANK {
            return Err(unsupported(format!("an adapter of rank {lora_rank}, above {MAX_LORA_RANK},")));
        }
        let columns = if sites[site].kind == SiteKind::Lookup { outputs } else { inputs };
        let vector = |wanted: bool| if wanted { outputs * size_of::<f32>() } else { 0 };
        placed.push(Placed {
            shape,
            slice: first[site] + slice,
            outputs,
            scale: 1.0,
            a_cols: inputs,
            a: reserve(inputs * lora_rank * dtype.size()),
            b: reserve(outputs.next_multiple_of(OUT_BLOCK) * lora_rank * dtype.size()),
            gain: reserve(vector(has_magnitude)),
            bias: reserve(vector(has_bias)),
            ids: (rows > 0).then(|| reserve(rows * size_of::<u32>())),
            rows: reserve(rows * columns * dtype.size()),
        });
    }
    Ok((placed, bytes))
}

/// Pinned memory that an adapter takes: whole pieces.
pub(in crate::cuda) fn host_bytes(dtype: DType, sites: &[LoraSite], shapes: &[LoraShape]) -> Result<usize> {
    Ok(layout(dtype, sites, shapes)?.1.next_multiple_of(PIECE))
}

/// Index of every site's first slice when all slices are counted.
pub(super) fn first_slices(sites: &[LoraSite]) -> Vec<usize> {
    let slices = sites.iter().map(|site| site.outputs.len());
    slices.scan(0, |next, slices| Some(std::mem::replace(next, *next + slices))).collect()
}
