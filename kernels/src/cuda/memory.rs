//! What lives on the card: activations, weights, vectors, rotary tables, KV memory.

use super::{CudaBackend, convert, device::DeviceBuf, device::launched, ffi};
use crate::{BLOCK_SIZE, DType, Error, Heads, HostTensor, Matrix, Result};

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
        backend.stream.synchronize()?;
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

/// Cosines and sines, `[positions, dim / 2]` pairs of f32.
pub struct CudaRope {
    pub(super) buffer: DeviceBuf,
    pub(super) positions: usize,
    pub(super) half: usize,
}

impl CudaRope {
    pub(super) fn new(
        backend: &CudaBackend,
        inv_freq: &[f32],
        positions: usize,
        scale: f32,
    ) -> Result<CudaRope> {
        let half = inv_freq.len();
        let buffer = DeviceBuf::new(&backend.device, positions * half * 8, "the rotary table")?;
        let frequencies = CudaVector::new(backend, inv_freq)?;
        if positions * half > 0 {
            // SAFETY: both buffers have the sizes that the launcher is told.
            launched("rope", unsafe {
                ffi::lorax_rope_table(
                    frequencies.buffer.at(),
                    buffer.at(),
                    positions as i32,
                    half as i32,
                    scale,
                    backend.stream.raw(),
                )
            })?;
        }
        backend.stream.synchronize()?;
        Ok(CudaRope { buffer, positions, half })
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
