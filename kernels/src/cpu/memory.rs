//! The memory of the CPU backend: activations, weights as panels, and conversion to bf16.

use std::{
    alloc::{Layout, alloc, alloc_zeroed, dealloc},
    ops::{Deref, DerefMut, Range},
    slice,
    sync::Arc,
};

use half::bf16;

use crate::{DType, Error, HostTensor, Matrix, Result};

/// One cache line: sixteen lanes of f32, or of pairs of bf16.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u32; 16]);

/// Bytes of a huge page.
const HUGE_PAGE: usize = 2 << 20;

/// Memory that was allocated from the system.
#[derive(Debug)]
struct Region {
    memory: *mut Line,
    layout: Layout,
}

// SAFETY: a region only owns memory. The lines that refer to it do not overlap.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Allocates memory that is streamed again and again. It is on huge pages where the system has them, because page
    /// table walks would cost a fifth of the bandwidth. The memory is not initialized.
    fn streamed(bytes: usize, what: &'static str) -> Result<Region> {
        let out_of_memory = Error::OutOfMemory { bytes, what };
        let align = if bytes < HUGE_PAGE { align_of::<Line>() } else { HUGE_PAGE };
        let Ok(layout) = Layout::from_size_align(bytes, align) else { return Err(out_of_memory) };
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc(layout) };
        if memory.is_null() {
            return Err(out_of_memory);
        }
        #[cfg(target_os = "linux")]
        // SAFETY: this is a hint about memory that we own. It does not matter if it is refused.
        unsafe {
            libc::madvise(memory.cast(), bytes, libc::MADV_HUGEPAGE);
        }
        Ok(Region { memory: memory.cast(), layout })
    }

    /// Allocates zeroed memory. The system hands out zeroed pages when they are first touched, so that a KV cache costs
    /// nothing until it is used. For memory with the alignment of a line, the standard library would write the zeros
    /// itself. Therefore the memory is not aligned but one line larger, and the caller aligns it.
    fn zeroed(bytes: usize, what: &'static str) -> Result<Region> {
        let out_of_memory = Error::OutOfMemory { bytes, what };
        let Ok(layout) = Layout::from_size_align(bytes.saturating_add(size_of::<Line>()), 16) else {
            return Err(out_of_memory);
        };
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc_zeroed(layout) };
        if memory.is_null() { Err(out_of_memory) } else { Ok(Region { memory: memory.cast(), layout }) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: from `alloc` with this layout.
        unsafe { dealloc(self.memory.cast(), self.layout) }
    }
}

/// Lines of a region. The region lives as long as any of its lines.
#[derive(Debug)]
pub(super) struct Lines {
    _region: Arc<Region>,
    /// Points into the region, so that reading the lines needs no further pointer.
    first: *mut Line,
    count: usize,
}

// SAFETY: the lines own their part of the region.
unsafe impl Send for Lines {}
// SAFETY: as above.
unsafe impl Sync for Lines {}

impl Lines {
    /// Allocates zeroed lines that cost nothing until they are touched.
    pub(super) fn zeroed(count: usize, what: &'static str) -> Result<Lines> {
        let region = Region::zeroed(count.saturating_mul(size_of::<Line>()), what)?;
        let skip = region.memory.cast::<u8>().align_offset(align_of::<Line>());
        Ok(Lines { first: region.memory.wrapping_byte_add(skip), _region: Arc::new(region), count })
    }
}

impl Deref for Lines {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        // SAFETY: there are `count` initialized lines, which are aligned and belong to nothing else.
        unsafe { slice::from_raw_parts(self.first, self.count) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [Line] {
        // SAFETY: as above.
        unsafe { slice::from_raw_parts_mut(self.first, self.count) }
    }
}

/// Allocates lines one after the other in large regions, so that small weights share huge pages.
#[derive(Debug)]
pub(super) struct Arena {
    /// Bytes of a region, unless a larger one is needed.
    region_bytes: usize,
    /// The present region, and its bytes in use.
    current: Option<(Arc<Region>, usize)>,
}

impl Arena {
    /// Makes an arena that allocates `region_bytes` at a time.
    pub(super) fn new(region_bytes: usize) -> Arena {
        Arena { region_bytes, current: None }
    }

    /// Allocates zeroed lines.
    pub(super) fn lines(&mut self, count: usize, what: &'static str) -> Result<Lines> {
        let bytes = count.saturating_mul(size_of::<Line>());
        let (region, used) = match self.current.take() {
            Some((region, used)) if region.layout.size() - used >= bytes => (region, used),
            _ => (Arc::new(Region::streamed(bytes.max(self.region_bytes).max(size_of::<Line>()), what)?), 0),
        };
        self.current = Some((region.clone(), used + bytes));
        let first = region.memory.wrapping_byte_add(used);
        // SAFETY: there is room, and these bytes belong to nothing else.
        unsafe { first.write_bytes(0, count) };
        Ok(Lines { _region: region, first, count })
    }
}

/// Rounds a value to bf16, to nearest even, and returns its bits. NaN stays NaN. There is no branch, so that loops
/// vectorize.
#[inline]
pub(super) fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if x.is_nan() { bits >> 16 | 0x40 } else { rounded }
}

/// The lower or upper bf16 of a pair.
#[inline]
pub(super) fn of_pair(pair: u32, upper: bool) -> f32 {
    f32::from_bits(if upper { pair & 0xffff_0000 } else { pair << 16 })
}

/// Activations: f32, row-major. The first row begins on a cache line, and if the number of columns is a multiple of 16,
/// so do all others. So no two cores write to the same line when they compute different panels of outputs.
#[derive(Debug)]
pub struct CpuMat {
    data: Lines,
    /// The number of rows that there is room for.
    capacity: usize,
    rows: usize,
    cols: usize,
}

impl CpuMat {
    pub(super) fn new(rows: usize, cols: usize) -> Result<CpuMat> {
        let data = Lines::zeroed(rows.saturating_mul(cols).div_ceil(16), "activations")?;
        Ok(CpuMat { data, capacity: if cols == 0 { 0 } else { rows }, rows: 0, cols })
    }

    /// The rows in use.
    pub(super) fn used(&self) -> &[f32] {
        // SAFETY: these are words of the lines, all of which are valid f32. `new` made room for `capacity` rows.
        unsafe { slice::from_raw_parts(self.data.as_ptr().cast(), self.rows * self.cols) }
    }

    /// The rows in use.
    pub(super) fn used_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { slice::from_raw_parts_mut(self.data.as_mut_ptr().cast(), self.rows * self.cols) }
    }

    pub(super) fn row(&self, i: usize) -> &[f32] {
        &self.used()[i * self.cols..][..self.cols]
    }

    /// Sets the number of rows in use. Errors: there is no room for as many.
    pub(super) fn resize(&mut self, op: &'static str, rows: usize) -> Result<()> {
        let limit = self.capacity();
        if rows > limit {
            return Err(Error::Index { op, what: "row", index: rows - 1, limit });
        }
        self.rows = rows;
        Ok(())
    }
}

impl Matrix for CpuMat {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn set_rows(&mut self, rows: usize) {
        assert!(rows <= self.capacity(), "{rows} rows do not fit into {}", self.capacity());
        self.rows = rows;
    }
}

/// Reads element `i` of a host tensor's data.
fn element(dtype: DType, data: &[u8], i: usize) -> f32 {
    match dtype {
        DType::F32 => f32::from_le_bytes([data[4 * i], data[4 * i + 1], data[4 * i + 2], data[4 * i + 3]]),
        DType::Bf16 => bf16::from_le_bytes([data[2 * i], data[2 * i + 1]]).to_f32(),
        DType::F16 => half::f16::from_le_bytes([data[2 * i], data[2 * i + 1]]).to_f32(),
    }
}

/// The number of panels whose lines alternate in memory. A tile multiplies as many, so that it reads one stream.
pub(super) const GROUP: usize = 2;

/// A weight `[outputs, inputs]` as panels of 16 outputs. A line of a panel has one input (f32) or two (bf16: lane i is
/// `w[i][2k] | w[i][2k + 1] << 16`) of all 16 outputs. Two panels make a group, which is stored as the first line of
/// each, then the second line of each, and so on, so that a step reads a group once, from front to back. The last panel
/// may be alone. Missing outputs and inputs are zero.
#[derive(Debug, Clone)]
pub struct Panels {
    /// Keeps the lines alive.
    _owner: Arc<Lines>,
    first: *const Line,
    pub(super) dtype: DType,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

// SAFETY: the lines are not written to once they are panels.
unsafe impl Send for Panels {}
// SAFETY: as above.
unsafe impl Sync for Panels {}

/// Panels as a GEMM reads them: everything that it needs, without a further pointer.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) lines: &'a [Line],
    pub(super) dtype: DType,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

impl<'a> View<'a> {
    /// The number of lines of one panel.
    pub(super) fn depth(&self) -> usize {
        Panels::depth(self.dtype, self.inputs)
    }

    pub(super) fn panels(&self) -> usize {
        self.outputs.div_ceil(16)
    }

    /// The index of a panel's first line, and the number of lines to its next one.
    pub(super) fn place(&self, panel: usize) -> (usize, usize) {
        place(panel, self.panels(), self.depth())
    }

    /// The lines of all groups that some panels belong to.
    pub(super) fn groups(&self, panels: &Range<usize>) -> &'a [Line] {
        let end = panels.end.next_multiple_of(GROUP).min(self.panels());
        &self.lines[panels.start / GROUP * GROUP * self.depth()..end * self.depth()]
    }
}

impl Panels {
    /// The number of inputs of a line.
    pub(super) fn inputs_per_line(dtype: DType) -> usize {
        if dtype == DType::F32 { 1 } else { 2 }
    }

    pub(super) fn view(&self) -> View<'_> {
        let (dtype, outputs, inputs) = (self.dtype, self.outputs, self.inputs);
        let count = outputs.div_ceil(16) * Self::depth(dtype, inputs);
        // SAFETY: `from_fn` made as many lines, which live as long as their owner.
        View { lines: unsafe { slice::from_raw_parts(self.first, count) }, dtype, outputs, inputs }
    }

    /// Bytes of its lines.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.view().lines)
    }

    /// Makes the weight whose elements are `get(output, input)`.
    pub(super) fn from_fn(
        arena: &mut Arena,
        dtype: DType,
        shape: [usize; 2],
        get: impl Fn(usize, usize) -> f32,
    ) -> Result<Panels> {
        let mut lines = Self::room(arena, dtype, shape)?;
        let bits = |output, k| match dtype {
            DType::F32 => get(output, k).to_bits(),
            _ => round(get(output, k)),
        };
        Self::fill(dtype, shape, &mut lines, bits);
        Ok(Self::of_lines(dtype, shape, lines))
    }

    /// Zeroed lines for a weight `[outputs, inputs]`.
    pub(super) fn room(arena: &mut Arena, dtype: DType, [outputs, inputs]: [usize; 2]) -> Result<Lines> {
        arena.lines(outputs.div_ceil(16) * Self::depth(dtype, inputs), "weights")
    }

    /// The number of lines of one panel.
    pub(super) fn depth(dtype: DType, inputs: usize) -> usize {
        inputs.div_ceil(Self::inputs_per_line(dtype))
    }

    /// Fills the lines of whole groups with the elements whose bits are `bits(output, input)`. Outputs are counted from
    /// the first of these lines.
    pub(super) fn fill(
        dtype: DType,
        [outputs, inputs]: [usize; 2],
        lines: &mut [Line],
        bits: impl Fn(usize, usize) -> u32,
    ) {
        let (per_line, depth) = (Self::inputs_per_line(dtype), Self::depth(dtype, inputs));
        let panels = outputs.div_ceil(16);
        for panel in 0..panels {
            let (first, step) = place(panel, panels, depth);
            for (k, line) in lines[first..].iter_mut().step_by(step).take(depth).enumerate() {
                let k = k * per_line;
                for (word, output) in line.0.iter_mut().zip(panel * 16..outputs) {
                    *word = match dtype {
                        DType::F32 => bits(output, k),
                        _ if k + 1 < inputs => bits(output, k) | bits(output, k + 1) << 16,
                        _ => bits(output, k),
                    };
                }
            }
        }
    }

    /// The weight that lines have been filled with.
    pub(super) fn of_lines(dtype: DType, [outputs, inputs]: [usize; 2], lines: Lines) -> Panels {
        Panels { first: lines.as_ptr(), _owner: Arc::new(lines), dtype, outputs, inputs }
    }

    /// Packs the rows of host tensors, one tensor after the other.
    pub(super) fn pack(arena: &mut Arena, dtype: DType, parts: &[HostTensor<'_>]) -> Result<Panels> {
        let inputs = parts.first().map_or(0, |part| part.cols);
        // The tensor and row of each output.
        let mut rows = Vec::new();
        for part in parts {
            let (got, expected) = (part.data.len(), part.rows * part.cols * part.dtype.size());
            if got != expected {
                return Err(Error::Shape { op: "weight", what: "bytes of data", got, expected });
            }
            if part.cols != inputs {
                return Err(Error::Shape { op: "weight", what: "columns", got: part.cols, expected: inputs });
            }
            let bytes = part.cols * part.dtype.size();
            rows.extend((0..part.rows).map(|row| (part.dtype, &part.data[row * bytes..][..bytes])));
        }
        Self::from_fn(arena, dtype, [rows.len(), inputs], |output, k| {
            element(rows[output].0, rows[output].1, k)
        })
    }

    /// Reads one output's weights.
    pub(super) fn read_row(&self, output: usize, out: &mut [f32]) {
        self.each_of_row(output, out.len(), |k, x| out[k] = x);
    }

    /// Calls `f` with the index and the value of each of the first `count` weights of an output.
    pub(super) fn each_of_row(&self, output: usize, count: usize, mut f: impl FnMut(usize, f32)) {
        let view = self.view();
        let (first, step) = view.place(output / 16);
        let lane = output % 16;
        for k in 0..count {
            f(
                k,
                match self.dtype {
                    DType::F32 => f32::from_bits(view.lines[first + k * step].0[lane]),
                    _ => of_pair(view.lines[first + k / 2 * step].0[lane], !k.is_multiple_of(2)),
                },
            );
        }
    }
}

/// For one of `panels` panels of `depth` lines: the index of its first line, and the number of lines to its next one.
fn place(panel: usize, panels: usize, depth: usize) -> (usize, usize) {
    let group = panel / GROUP * GROUP;
    (group * depth + panel % GROUP, GROUP.min(panels - group))
}
