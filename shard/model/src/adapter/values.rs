//! Reads the tensors of an adapter's file in the type that kernels compute with.

use std::ops::Range;

use half::{bf16, f16};
use kernels::{DType, HostTensor};

use super::AdapterError;
use crate::weights::tensor_file::TensorFile;

/// The number of elements that are converted at a time, so that a tensor is not in memory as f32, too.
const CHUNK: usize = 1 << 14;

/// The tensors of a file.
pub(super) struct Values {
    pub(super) file: TensorFile,
    /// The type that kernels compute with.
    pub(super) dtype: DType,
}

impl Values {
    /// Reads a matrix. A tensor of another shape is refused before it is read, since it may have any size.
    pub(super) fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<HostTensor<'static>, AdapterError> {
        self.expect_shape(name, &shape)?;
        self.rows(name, 0..shape[0])
    }

    /// Reads some rows of a matrix whose shape has been checked.
    pub(super) fn rows(&self, name: &str, rows: Range<usize>) -> Result<HostTensor<'static>, AdapterError> {
        let [_, cols] = self.file.matrix_shape(name)?;
        let stored = self.file.part(name, rows, 0..cols)?.into_dense();
        if !stored.data.chunks_exact(stored.dtype.size()).all(|bytes| is_finite(stored.dtype, bytes)) {
            return Err(AdapterError::NotFinite(name.into()));
        }
        if stored.dtype == self.dtype {
            return Ok(stored);
        }
        let converted = converted(&stored, self.dtype);
        if !converted.data.chunks_exact(self.dtype.size()).all(|bytes| is_finite(self.dtype, bytes)) {
            return Err(AdapterError::TooLarge { name: name.into(), dtype: self.dtype });
        }
        Ok(converted)
    }

    /// Reads a vector.
    pub(super) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, AdapterError> {
        self.expect_shape(name, &[len])?;
        let values = self.file.part(name, 0..1, 0..len)?.into_dense().to_f32();
        if values.iter().any(|x| !x.is_finite()) {
            return Err(AdapterError::NotFinite(name.into()));
        }
        Ok(values)
    }

    pub(super) fn expect_shape(&self, name: &str, expected: &[usize]) -> Result<(), AdapterError> {
        let got = self.file.shape(name)?;
        if got != expected {
            let (got, expected) = (got.into(), expected.into());
            return Err(AdapterError::Shape { name: name.into(), got, expected });
        }
        Ok(())
    }

    /// Bytes that reading a tensor takes beside its result.
    pub(super) fn passing_bytes(&self, name: &str) -> usize {
        // The stored bytes, and a copy of them while rows are brought into order.
        2 * self.file.bytes(name) as usize
    }
}

/// Whether an element is finite.
pub(super) fn is_finite(dtype: DType, bytes: &[u8]) -> bool {
    match (dtype, bytes) {
        (DType::F16, [.., high]) => high & 0x7c != 0x7c,
        (DType::F32 | DType::Bf16, [.., low, high]) => high & 0x7f != 0x7f || low & 0x80 == 0,
        _ => false,
    }
}

/// Whether all elements are 0 or -0.
pub(super) fn is_zero(tensor: &HostTensor<'_>) -> bool {
    let is_zero = |bytes: &[u8]| match bytes {
        [low @ .., high] => high & 0x7f == 0 && low.iter().all(|byte| *byte == 0),
        [] => true,
    };
    tensor.data.chunks_exact(tensor.dtype.size()).all(is_zero)
}

/// Converts a matrix to another type, rounding to nearest even.
fn converted(tensor: &HostTensor<'_>, dtype: DType) -> HostTensor<'static> {
    let size = tensor.dtype.size();
    let mut data = Vec::with_capacity(tensor.data.len() / size * dtype.size());
    for bytes in tensor.data.chunks(CHUNK * size) {
        let chunk = HostTensor { dtype: tensor.dtype, rows: 1, cols: bytes.len() / size, data: bytes.into() };
        encode(&chunk.to_f32(), dtype, &mut data);
    }
    HostTensor { dtype, rows: tensor.rows, cols: tensor.cols, data: data.into() }
}

/// Appends numbers that are rounded to a type.
pub(super) fn encode(values: &[f32], dtype: DType, data: &mut Vec<u8>) {
    match dtype {
        DType::F32 => data.extend(values.iter().flat_map(|x| x.to_le_bytes())),
        DType::Bf16 => data.extend(values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes())),
        DType::F16 => data.extend(values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes())),
    }
}

/// Makes a matrix of numbers that are rounded to a type.
pub(super) fn encoded([rows, cols]: [usize; 2], values: &[f32], dtype: DType) -> HostTensor<'static> {
    let mut data = Vec::with_capacity(values.len() * dtype.size());
    encode(values, dtype, &mut data);
    HostTensor { dtype, rows, cols, data: data.into() }
}
