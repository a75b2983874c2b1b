//! What lives on the GPU: activations, weights, vectors, rotary tables, the KV cache.

use super::{CudaBackend, convert, device::DeviceBuf, device::launched, ffi};
use crate::{
    BLOCK_SIZE, DType, Error, Heads, HostTensor, Matrix, Result, RopeSpec, Stretch, ops::TABLE_POSITIONS,
};

/// Activations.
pub struct CudaMat {
    pub(super) buffer: DeviceBuf,
    pub(super) dtype: DType,
    rows: usize,
    cols: usize,
    capacity: usize,
}

impl CudaMat {
    pub(super) fn new(backend: &CudaBackend, dtype: DType, rows: usize, cols: usize) -> Result<CudaMat> {
        let buffer = DeviceBuf::zeroed(&backend.device, rows * cols * dtype.size(), "activations")?;
        Ok(CudaMat { buffer, dtype, rows, cols, capacity: rows })
    }

    pub(super) fn at(&self) -> u64 {
        self.buffer.at()
    }

    /// Whether elements are f32, as an argument of a launcher.
    pub(super) fn wide(&self) -> i32 {
        i32::from(self.dtype == DType::F32)
    }

    /// Sets the rows in use, or refuses.
    pub(super) fn resize(&mut self, op: &'static str, rows: usize) -> Result<()> {
        if rows > self.capacity {
            return Err(Error::Index { op, what: "row", index: rows - 1, limit: self.capacity });
        }
        self.rows = rows;
        Ok(())
    }

    /// Refuses another number of columns.
    pub(super) fn expect_cols(&self, op: &'static str, what: &'static str, expected: usize) -> Result<()> {
        expect(op, what, self.cols, expected)
    }

    /// Refuses a matrix of f32 where the kernels have no instance for it.
    pub(super) fn expect_half(&self, op: &'static str) -> Result<()> {
        if self.dtype == DType::F32 {
            return Err(super::unsupported(format!("{op} of wide activations")));
        }
        Ok(())
    }

    /// Refuses a matrix that is not of f32.
    pub(super) fn expect_wide(&self, op: &'static str) -> Result<()> {
        if self.dtype == DType::F32 {
            return Ok(());
        }
        Err(super::unsupported(format!("{op} of activations that are not wide")))
    }

    pub(super) fn download(&self, backend: &CudaBackend) -> Result<Vec<f32>> {
        let mut bytes = vec![0; self.rows * self.cols * self.dtype.size()];
        backend.finish("download")?;
        // SAFETY: pageable memory: the driver has copied all of it when the call returns.
        unsafe { backend.stream.copy_out(&mut bytes, self.at())? };
        backend.stream.synchronize()?;
        Ok(convert::to_f32(self.dtype, &bytes))
    }

    pub(super) fn fill(&mut self, backend: &CudaBackend, values: &[f32]) -> Result<()> {
        self.resize("fill", values.len().checked_div(self.cols).unwrap_or(0))?;
        expect("fill", "values", values.len(), self.rows * self.cols)?;
        let bytes: &[u8] = &convert::bytes_of(values);
        let (size, dtype) = (self.dtype.size(), self.dtype);
        let mut staging = backend.staging();
        // SAFETY: the matrix has room for the rows that were just set.
        unsafe {
            staging.write(&backend.stream, self.at(), values.len() * size, size, |at, out| {
                let from = at / size * 4;
                convert::convert(DType::F32, &bytes[from..from + out.len() / size * 4], dtype, out);
            })
        }
    }
}

impl Matrix for CudaMat {
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
        assert!(rows <= self.capacity, "{rows} rows, room for {}", self.capacity);
        self.rows = rows;
    }
}

/// Refuses a size that is not the expected one.
pub(super) fn expect(op: &'static str, what: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Shape { op, what, got, expected }) }
}

/// A weight `[outputs, inputs]`, row-major.
pub struct CudaWeight {
    pub(super) buffer: DeviceBuf,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

impl CudaWeight {
    pub(super) fn new(backend: &CudaBackend, parts: &[HostTensor<'_>]) -> Result<CudaWeight> {
        let op = "weight";
        let inputs = parts.first().map_or(0, |p| p.cols);
        let outputs = parts.iter().map(|p| p.rows).sum();
        let size = backend.dtype.size();
        let buffer = DeviceBuf::new(&backend.device, outputs * inputs * size, "weights")?;
        let mut to = buffer.at();
        for part in parts {
            expect(op, "columns", part.cols, inputs)?;
            expect(op, "bytes of data", part.data.len(), part.rows * part.cols * part.dtype.size())?;
            let bytes = part.rows * part.cols * size;
            let mut staging = backend.weight_staging();
            // SAFETY: the buffer was sized for all parts.
            unsafe {
                staging.write(&backend.stream, to, bytes, size, |at, out| {
                    let (from, count) = (at / size * part.dtype.size(), out.len() / size * part.dtype.size());
                    convert::convert(part.dtype, &part.data[from..from + count], backend.dtype, out);
                })?;
            }
            to += bytes as u64;
        }
        Ok(CudaWeight { buffer, outputs, inputs })
    }
}

/// A vector of f32.
pub struct CudaVector {
    pub(super) buffer: DeviceBuf,
    pub(super) len: usize,
}

impl CudaVector {
    pub(super) fn new(backend: &CudaBackend, values: &[f32]) -> Result<CudaVector> {
        let buffer = DeviceBuf::new(&backend.device, size_of_val(values), "a vector")?;
        let bytes = convert::bytes_of(values);
        // SAFETY: just sized.
        unsafe { backend.staging().copy(&backend.stream, buffer.at(), &bytes)? };
        Ok(CudaVector { buffer, len: values.len() })
    }
}

/// The angles of a rotary embedding.
pub struct CudaRope {
    /// Cosines and sines, `[positions, pairs]` twice f32; for LongRoPE those of longer sequences behind them. Empty where
    /// the kernel computes angles row by row.
    pub(super) table: DeviceBuf,
    pub(super) inv_freq: CudaVector,
    pub(super) positions: usize,
    pub(super) pairs: usize,
    pub(super) scale: f32,
    /// The longest sequence that is not stretched, and the factor of [`Stretch::Dynamic`].
    pub(super) original: u32,
    pub(super) factor: f32,
    /// `Stretch` in `rope.cu`.
    pub(super) stretch: i32,
}

impl CudaRope {
    pub(super) fn new(backend: &CudaBackend, spec: &RopeSpec) -> Result<CudaRope> {
        let RopeSpec { inv_freq, scale, positions, stretch } = spec;
        let (pairs, positions, scale) = (inv_freq.len(), *positions, *scale);
        let mut tables = vec![inv_freq];
        let (stretch, original, factor) = match stretch {
            // Computed row by row, as the next kind is, but never stretched.
            Stretch::None if positions > TABLE_POSITIONS => {
                tables.clear();
                (2, u32::MAX, 1.0)
            }
            Stretch::None => (0, u32::MAX, 1.0),
            Stretch::Long { original, inv_freq } => {
                expect("rope", "frequencies of long sequences", inv_freq.len(), pairs)?;
                tables.push(inv_freq);
                (1, *original, 1.0)
            }
            Stretch::Dynamic { original, factor } => {
                tables.clear();
                (2, *original, *factor)
            }
        };
        let table_bytes = positions * pairs * 8;
        let table = DeviceBuf::new(&backend.device, tables.len() * table_bytes, "the rotary table")?;
        for (i, inv_freq) in tables.into_iter().enumerate().filter(|_| table_bytes > 0) {
            let frequencies = CudaVector::new(backend, inv_freq)?;
            let to = table.at() + (i * table_bytes) as u64;
            let (from, stream) = (frequencies.buffer.at(), backend.stream.raw());
            // SAFETY: both buffers have the sizes that the launcher is told.
            launched("rope", unsafe {
                ffi::lorax_rope_table(from, to, positions as i32, pairs as i32, scale, stream)
            })?;
            // The frequencies are freed.
            backend.stream.synchronize()?;
        }
        let inv_freq = CudaVector::new(backend, inv_freq)?;
        Ok(CudaRope { table, inv_freq, positions, pairs, scale, original, factor, stretch })
    }
}

/// Keys, then values, of one layer: `[blocks, kv heads, BLOCK_SIZE, dim]` each.
pub struct CudaKv {
    pub(super) buffer: DeviceBuf,
    pub(super) blocks: usize,
    pub(super) heads: Heads,
    plane: usize,
}

impl CudaKv {
    pub(super) fn new(backend: &CudaBackend, blocks: usize, heads: Heads) -> Result<CudaKv> {
        super::attention::check_heads(heads)?;
        backend.remember(heads);
        let plane = blocks * heads.kv * BLOCK_SIZE * heads.dim * backend.dtype.size();
        let buffer = DeviceBuf::zeroed(&backend.device, 2 * plane, "KV memory")?;
        Ok(CudaKv { buffer, blocks, heads, plane })
    }

    pub(super) fn k(&self) -> u64 {
        self.buffer.at()
    }

    pub(super) fn v(&self) -> u64 {
        self.buffer.at() + self.plane as u64
    }
}
