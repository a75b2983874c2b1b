//! Reads the tensors of an adapter's file in the type that kernels compute with.

use std::ops::Range;

use half::{bf16, f16, slice::HalfFloatSliceExt};
use kernels::{DType, HostTensor};

use super::AdapterError;
use crate::weights::tensor_file::TensorFile;

/// Bytes that are read at a time, which are then in the core's cache.
const CHUNK: usize = 64 << 10;
/// The number of elements that are converted at a time.
const AT_A_TIME: usize = 1 << 10;

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
        let count = rows.len();
        let mut data = vec![0; count * cols * self.dtype.size()];
        self.fill((name, rows, 0..cols), self.dtype, &mut data)?;
        Ok(HostTensor { dtype: self.dtype, rows: count, cols, data: data.into() })
    }

    /// Reads some rows and columns of a matrix as elements of a type, and checks them while they are in the core's cache.
    /// Returns whether all of them are 0 or -0.
    pub(super) fn fill(
        &self,
        (name, rows, cols): (&str, Range<usize>, Range<usize>),
        dtype: DType,
        to: &mut [u8],
    ) -> Result<bool, AdapterError> {
        let Some(stored) = self.file.type_of_rows(name) else {
            let whole = self.file.part(name, rows, cols)?.into_dense();
            return converted(name, (whole.dtype, &whole.data), (dtype, to));
        };
        let (mut is_zero, mut scratch) = (true, Vec::new());
        let count = (CHUNK / (cols.len() * stored.size()).max(1)).max(1);
        let chunks = to.chunks_mut((count * cols.len() * dtype.size()).max(1));
        for (first, to) in rows.clone().step_by(count).zip(chunks) {
            let rows = first..rows.end.min(first + count);
            if stored == dtype {
                self.file.read_part(name, rows, cols.clone(), to)?;
                is_zero &= finite(name, dtype, to)?;
            } else {
                scratch.resize(rows.len() * cols.len() * stored.size(), 0);
                self.file.read_part(name, rows, cols.clone(), &mut scratch)?;
                is_zero &= converted(name, (stored, &scratch), (dtype, to))?;
            }
        }
        Ok(is_zero)
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

/// What is known of some elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Checked {
    pub(super) is_finite: bool,
    /// Whether all of them are 0 or -0.
    pub(super) is_zero: bool,
}

/// Checks elements. There is no branch in its loops, so that they are vectorized.
pub(super) fn check(dtype: DType, data: &[u8]) -> Checked {
    // Without the sign, infinity is the smallest pattern of bits that is not finite.
    let (largest, infinity) = match dtype {
        DType::F32 => {
            let magnitudes = data.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes) & 0x7fff_ffff);
            (magnitudes.fold(0, i32::max).unsigned_abs(), 0x7f80_0000)
        }
        DType::Bf16 => (largest_half(data), 0x7f80),
        DType::F16 => (largest_half(data), 0x7c00),
    };
    Checked { is_finite: largest < infinity, is_zero: largest == 0 }
}

/// The largest pattern of bits of elements of 16 bits, without their signs.
fn largest_half(data: &[u8]) -> u32 {
    // Signed, as the oldest vector units know only the larger one of signed numbers.
    let magnitudes = data.as_chunks().0.iter().map(|bytes| i16::from_le_bytes(*bytes) & 0x7fff);
    magnitudes.fold(0, i16::max).unsigned_abs().into()
}

/// Whether all elements are 0 or -0.
pub(super) fn is_zero(tensor: &HostTensor<'_>) -> bool {
    check(tensor.dtype, &tensor.data).is_zero
}

/// Whether all elements are 0 or -0. Errors: one of them is not finite.
fn finite(name: &str, dtype: DType, data: &[u8]) -> Result<bool, AdapterError> {
    let checked = check(dtype, data);
    if checked.is_finite { Ok(checked.is_zero) } else { Err(AdapterError::NotFinite(name.into())) }
}

/// Converts elements to another type, rounding to nearest even. Returns whether all that came of it are 0 or -0.
fn converted(
    name: &str,
    (stored, from): (DType, &[u8]),
    (dtype, to): (DType, &mut [u8]),
) -> Result<bool, AdapterError> {
    let is_zero = finite(name, stored, from)?;
    if stored == dtype {
        to.copy_from_slice(from);
        return Ok(is_zero);
    }
    let chunks = to.chunks_mut(AT_A_TIME * dtype.size());
    for (from, to) in from.chunks(AT_A_TIME * stored.size()).zip(chunks) {
        convert((stored, from), (dtype, to));
    }
    let Checked { is_finite, is_zero } = check(dtype, to);
    if is_finite { Ok(is_zero) } else { Err(AdapterError::TooLarge { name: name.into(), dtype }) }
}

/// Converts at most [`AT_A_TIME`] elements.
fn convert((stored, from): (DType, &[u8]), (dtype, to): (DType, &mut [u8])) {
    let (mut values, mut halves) = ([0.0; AT_A_TIME], [f16::ZERO; AT_A_TIME]);
    let values = &mut values[..from.len() / stored.size()];
    let halves = &mut halves[..values.len()];
    match stored {
        DType::F32 => {
            let words = from.as_chunks().0;
            values.iter_mut().zip(words).for_each(|(x, bytes)| *x = f32::from_le_bytes(*bytes));
        }
        DType::Bf16 => {
            let words = from.as_chunks().0;
            values.iter_mut().zip(words).for_each(|(x, bytes)| *x = bf16::from_le_bytes(*bytes).to_f32());
        }
        DType::F16 => {
            let words = from.as_chunks().0;
            halves.iter_mut().zip(words).for_each(|(x, bytes)| *x = f16::from_le_bytes(*bytes));
            halves.convert_to_f32_slice(values);
        }
    }
    match dtype {
        DType::F32 => {
            let words = to.as_chunks_mut().0;
            words.iter_mut().zip(values).for_each(|(bytes, x)| *bytes = x.to_le_bytes());
        }
        DType::Bf16 => {
            let words = to.as_chunks_mut().0;
            words.iter_mut().zip(values).for_each(|(bytes, x)| *bytes = rounded(*x).to_le_bytes());
        }
        DType::F16 => {
            halves.convert_from_f32_slice(values);
            let words = to.as_chunks_mut().0;
            words.iter_mut().zip(halves).for_each(|(bytes, x)| *bytes = x.to_le_bytes());
        }
    }
}

/// The bits of a finite number that is rounded to bf16, to nearest even.
fn rounded(x: f32) -> u16 {
    let bits = x.to_bits();
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
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
