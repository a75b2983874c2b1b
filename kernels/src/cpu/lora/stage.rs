//! Staging: allocates the lines of an adapter, and reads its matrices into them.

use std::ops::Range;

use super::{
    super::{
        CpuBackend,
        memory::{Arena, Line, Lines, Panels},
    },
    CpuAdapter, LookupDelta, OwnRows, SiteChange, SiteDelta, SliceDelta, SliceVectors, a_elements_per_line,
    a_rows, bytes, line_bytes,
};
use crate::{
    DType, LoraPart, LoraSite, LowRank, MatrixSource, ReplacedRows, Result, SiteKind,
    lora::readers::rows_at_a_time,
};

/// Outputs of a group of panels, whose lines belong together.
const GROUP: usize = 16 * super::super::memory::GROUP;

/// The lines that one part is read into, except for the A of a product.
struct PartLines<'a, M> {
    part: &'a LoraPart<M>,
    /// A of a lookup.
    a: Option<Lines>,
    b: Option<Lines>,
    rows: Option<Lines>,
}

/// The lines that the parts of one site are read into.
struct SiteLines<'a, M> {
    site: &'a LoraSite,
    /// A of all products.
    a: Lines,
    /// The parts by slice.
    parts: Vec<PartLines<'a, M>>,
}

/// How a matrix becomes lines.
#[derive(Debug, Clone, Copy)]
enum Form {
    /// Its rows are those of A, in [`SiteDelta::a`].
    Rows,
    /// Its rows are outputs of panels, behind some outputs that are zero.
    Panels { before: usize },
    /// Its columns are outputs of panels.
    Transposed,
}

/// Some rows of a matrix, and the lines that they become.
struct Chunk<'a, M> {
    matrix: &'a M,
    rows: Range<usize>,
    form: Form,
    lines: &'a mut [Line],
}

impl CpuAdapter {
    pub(crate) fn stage<M: MatrixSource>(
        be: &CpuBackend,
        sites: &[LoraSite],
        parts: &[LoraPart<M>],
    ) -> Result<CpuAdapter, M::Error> {
        let dtype = be.dtype;
        let mut by_site = vec![Vec::new(); sites.len()];
        for part in parts {
            part.check(sites)?;
            by_site[part.site].push(part);
        }
        let shapes: Vec<_> = parts.iter().map(LoraPart::shape).collect();
        let mut arena = Arena::new(line_bytes(dtype, sites, &shapes)?);
        let mut changes = Vec::with_capacity(sites.len());
        for (parts, site) in by_site.iter_mut().zip(sites) {
            parts.sort_by_key(|part| part.slice);
            let lines = || SiteLines::new(&mut arena, dtype, site, parts);
            changes.push((!parts.is_empty()).then(lines).transpose()?);
        }
        let mut chunks = Vec::new();
        changes.iter_mut().flatten().for_each(|change| change.chunks(dtype, &mut chunks));
        let bytes = bytes(dtype, sites, &shapes)?;
        be.readers.run(bytes, chunks, |chunk, scratch| chunk.fill(dtype, scratch))?;
        let changes: Vec<Option<SiteChange>> =
            changes.into_iter().map(|change| change.map(|change| change.done(dtype))).collect();
        let is_partial = |site: &usize| {
            sites[*site].is_partial && changes[*site].as_ref().is_some_and(SiteChange::has_magnitude)
        };
        Ok(CpuAdapter {
            bytes,
            content: parts.first().map_or(0, |part| part.content),
            partial: (0..sites.len()).filter(is_partial).collect(),
            sites: changes,
        })
    }
}

/// The shapes of the panels of a lookup's A and B.
fn lookup_shapes<M: MatrixSource>(LowRank { rank, a, b, .. }: &LowRank<M>) -> [[usize; 2]; 2] {
    [[a.shape()[1], *rank], [*rank, b.shape()[0]]]
}

impl<'a, M: MatrixSource> SiteLines<'a, M> {
    fn new(
        arena: &mut Arena,
        dtype: DType,
        site: &'a LoraSite,
        parts: &[&'a LoraPart<M>],
    ) -> Result<SiteLines<'a, M>> {
        let is_lookup = site.kind == SiteKind::Lookup;
        let ranks = parts.iter().filter(|_| !is_lookup).map(|part| a_rows(dtype, part.shape().lora_rank));
        let depth = site.inputs.div_ceil(a_elements_per_line(dtype));
        let a = arena.lines(ranks.sum::<usize>() * depth, "an adapter")?;
        let mut lines = SiteLines { site, a, parts: Vec::with_capacity(parts.len()) };
        for &part in parts {
            let mut room = PartLines { part, a: None, b: None, rows: None };
            if let Some(low_rank) = &part.low_rank {
                let [a, mut b] = lookup_shapes(low_rank);
                if is_lookup {
                    room.a = Some(Panels::room(arena, dtype, a)?);
                } else {
                    b = lines.b_shape(part.slice, low_rank);
                }
                room.b = Some(Panels::room(arena, dtype, b)?);
            }
            if let Some(rows) = &part.rows {
                room.rows = Some(Panels::room(arena, dtype, rows.values.shape())?);
            }
            lines.parts.push(room);
        }
        Ok(lines)
    }

    /// Outputs of a slice's first panel that are before the slice.
    fn before(&self, slice: usize) -> usize {
        self.site.columns(slice).start % 16
    }

    /// The shape of the panels of a product's B. An output projection may have more columns of logits than the base
    /// weight and its delta have rows.
    fn b_shape(&self, slice: usize, low_rank: &LowRank<M>) -> [usize; 2] {
        [self.before(slice) + low_rank.b.shape()[0], low_rank.rank]
    }

    /// Divides what is to be read.
    fn chunks<'b>(&'b mut self, dtype: DType, chunks: &mut Vec<Chunk<'b, M>>)
    where
        'a: 'b,
    {
        let (site, depth) = (self.site, self.site.inputs.div_ceil(a_elements_per_line(dtype)));
        let mut rest = &mut self.a[..];
        for PartLines { part, a: lookup_a, b: b_lines, rows: own_lines } in &mut self.parts {
            let before = site.columns(part.slice).start % 16;
            if let (Some(LowRank { rank, a, b, .. }), Some(b_lines)) = (&part.low_rank, b_lines) {
                match lookup_a {
                    Some(a_lines) => {
                        let transposed = |matrix: &'b M, lines| {
                            let rows = 0..matrix.shape()[0];
                            Chunk { matrix, rows, form: Form::Transposed, lines }
                        };
                        chunks.extend([transposed(a, a_lines), transposed(b, b_lines)]);
                    }
                    None => {
                        let own;
                        (own, rest) = std::mem::take(&mut rest).split_at_mut(a_rows(dtype, *rank) * depth);
                        rows_of(dtype, a, &mut own[..rank * depth], chunks);
                        panels_of(dtype, (b, before), b_lines, chunks);
                    }
                }
            }
            if let (Some(rows), Some(lines)) = (&part.rows, own_lines) {
                panels_of(dtype, (&rows.values, 0), lines, chunks);
            }
        }
    }

    /// The change, when all lines have been filled.
    fn done(self, dtype: DType) -> SiteChange {
        let (mut lookup, mut rows, mut vectors) = (None, None, Vec::new());
        let (mut slices, mut scales, mut first) = (Vec::new(), Vec::new(), 0);
        let shapes = self.parts.iter().map(|PartLines { part, .. }| {
            part.low_rank.as_ref().map_or([0, 0], |low_rank| self.b_shape(part.slice, low_rank))
        });
        let shapes: Vec<_> = shapes.collect();
        for (PartLines { part, a: a_lines, b: b_lines, rows: own_lines }, shape) in
            self.parts.into_iter().zip(shapes)
        {
            let columns = self.site.columns(part.slice);
            if part.magnitude.is_some() || part.bias.is_some() {
                let (columns, magnitude, bias) = (columns.clone(), part.magnitude.clone(), part.bias.clone());
                vectors.push(SliceVectors { columns, magnitude, bias });
            }
            if let (Some(ReplacedRows { ids, values }), Some(lines)) = (&part.rows, own_lines) {
                let values = Panels::of_lines(dtype, values.shape(), lines);
                rows = Some(OwnRows { ids: ids.clone(), values });
            }
            let (Some(low_rank), Some(lines)) = (&part.low_rank, b_lines) else { continue };
            let scale = low_rank.scale;
            if let Some(a_lines) = a_lines {
                let [a, b] = lookup_shapes(low_rank);
                let (a, b) = (Panels::of_lines(dtype, a, a_lines), Panels::of_lines(dtype, b, lines));
                lookup = Some(LookupDelta { scale, a, b });
                continue;
            }
            let b = Panels::of_lines(dtype, shape, lines);
            slices.push(SliceDelta { first, column: columns.start, b });
            first += a_rows(dtype, low_rank.rank);
            scales.resize(first, scale);
        }
        let depth = self.site.inputs.div_ceil(a_elements_per_line(dtype));
        let delta = SiteDelta { a: self.a, depth, scales, slices };
        let (squares, gains) = Default::default();
        SiteChange { delta, lookup, vectors, rows, squares, gains }
    }
}

/// Chunks of a matrix whose rows become lines.
fn rows_of<'a, M: MatrixSource>(
    dtype: DType,
    matrix: &'a M,
    lines: &'a mut [Line],
    chunks: &mut Vec<Chunk<'a, M>>,
) {
    let [rows, cols] = matrix.shape();
    let (count, depth) = (rows_at_a_time(dtype, matrix, 1), cols.div_ceil(a_elements_per_line(dtype)));
    for (first, lines) in (0..rows).step_by(count).zip(lines.chunks_mut((count * depth).max(1))) {
        chunks.push(Chunk { matrix, rows: first..rows.min(first + count), form: Form::Rows, lines });
    }
}

/// Chunks of a matrix whose rows become outputs of panels, behind `before` outputs that are zero.
fn panels_of<'a, M: MatrixSource>(
    dtype: DType,
    (matrix, before): (&'a M, usize),
    lines: &'a mut [Line],
    chunks: &mut Vec<Chunk<'a, M>>,
) {
    let [rows, cols] = matrix.shape();
    let count = rows_at_a_time(dtype, matrix, GROUP);
    let lines = lines.chunks_mut((count / 16 * Panels::depth(dtype, cols)).max(1));
    for (first, lines) in (0..before + rows).step_by(count).zip(lines) {
        let own = first.saturating_sub(before)..rows.min(first + count - before);
        // The outputs before the matrix are within the first group.
        let form = Form::Panels { before: before.saturating_sub(first) };
        chunks.push(Chunk { matrix, rows: own, form, lines });
    }
}

impl<M: MatrixSource> Chunk<'_, M> {
    fn fill(self, dtype: DType, scratch: &mut Vec<u8>) -> Result<(), M::Error> {
        let Chunk { matrix, rows, form, lines } = self;
        let (cols, count, size) = (matrix.shape()[1], rows.len(), dtype.size());
        let bytes = count * cols * size;
        if scratch.len() < bytes {
            scratch.resize(bytes, 0);
        }
        let read = &mut scratch[..bytes];
        matrix.read(rows, dtype, read)?;
        match dtype {
            DType::F32 => {
                let words = read.as_chunks().0;
                pack(dtype, form, [count, cols], lines, |i: usize| u32::from_le_bytes(words[i]));
            }
            DType::Bf16 | DType::F16 => {
                let words = read.as_chunks().0;
                pack(dtype, form, [count, cols], lines, |i: usize| u16::from_le_bytes(words[i]).into());
            }
        }
        Ok(())
    }
}

/// Packs rows of a matrix, of which element i has the bits `bits(i)`.
fn pack(dtype: DType, form: Form, [rows, cols]: [usize; 2], lines: &mut [Line], bits: impl Fn(usize) -> u32) {
    match form {
        Form::Rows => {
            let depth = cols.div_ceil(a_elements_per_line(dtype));
            for (row, lines) in lines.chunks_exact_mut(depth.max(1)).enumerate() {
                pack_row(dtype, cols, lines, |k| bits(row * cols + k));
            }
        }
        Form::Panels { before } => Panels::fill(dtype, [before + rows, cols], lines, |output, k| {
            output.checked_sub(before).map_or(0, |output| bits(output * cols + k))
        }),
        Form::Transposed => {
            Panels::fill(dtype, [cols, rows], lines, |output, k| bits(k * cols + output));
        }
    }
}

/// Packs one row of A.
fn pack_row(dtype: DType, cols: usize, lines: &mut [Line], bits: impl Fn(usize) -> u32) {
    let get = |k: usize| if k < cols { bits(k) } else { 0 };
    for (k, line) in lines.iter_mut().enumerate() {
        let first = k * a_elements_per_line(dtype);
        for (lane, word) in line.0.iter_mut().enumerate() {
            *word = match dtype {
                DType::F32 => get(first + lane),
                _ => get(first + lane) | get(first + 16 + lane) << 16,
            };
        }
    }
}
