//! Element types, tensors in host memory, and the sizes of a device's matrices.

use std::borrow::Cow;

use gguf::TensorType;

/// An element type in memory. Arithmetic always accumulates in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// The upper half of an IEEE single.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 | DType::F16 => 2,
        }
    }
}

/// A row-major matrix `[rows, cols]` in host memory, little-endian, as it comes from a weights file.
#[derive(Debug, Clone)]
pub struct HostTensor<'a> {
    /// Type of `data`'s elements.
    pub dtype: DType,
    /// Number of rows; 1 for a vector.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// `rows · cols · dtype.size()` bytes.
    pub data: Cow<'a, [u8]>,
}

impl HostTensor<'_> {
    /// All elements, row-major. Bytes after the last whole element are ignored.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            DType::F32 => {
                self.data.chunks_exact(4).map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]])).collect()
            }
            DType::Bf16 => {
                self.data.chunks_exact(2).map(|x| half::bf16::from_le_bytes([x[0], x[1]]).to_f32()).collect()
            }
            DType::F16 => {
                self.data.chunks_exact(2).map(|x| half::f16::from_le_bytes([x[0], x[1]]).to_f32()).collect()
            }
        }
    }
}

fn read(dtype: DType, bytes: &[u8]) -> f32 {
    match (dtype, bytes) {
        (DType::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        (DType::Bf16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
        (DType::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
        _ => f32::NAN,
    }
}

/// Writes one element.
fn write(dtype: DType, x: f32, to: &mut [u8]) {
    match dtype {
        DType::F32 => to.copy_from_slice(&x.to_le_bytes()),
        DType::Bf16 => to.copy_from_slice(&half::bf16::from_f32(x).to_le_bytes()),
        DType::F16 => to.copy_from_slice(&half::f16::from_f32(x).to_le_bytes()),
    }
}

/// Converts little-endian elements; `to` has room for as many as `from` holds.
pub(crate) fn convert(from_type: DType, from: &[u8], to_type: DType, to: &mut [u8]) {
    if from_type == to_type {
        to.copy_from_slice(from);
        return;
    }
    for (from, to) in from.chunks_exact(from_type.size()).zip(to.chunks_exact_mut(to_type.size())) {
        write(to_type, read(from_type, from), to);
    }
}

/// How the elements of a weight are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Every element is stored by itself.
    Dense(DType),
    /// Elements are stored as quantized blocks along a row, in one of ggml's types.
    Ggml(TensorType),
}

impl From<TensorType> for Format {
    fn from(ty: TensorType) -> Format {
        match ty {
            TensorType::F32 => Format::Dense(DType::F32),
            TensorType::F16 => Format::Dense(DType::F16),
            TensorType::BF16 => Format::Dense(DType::Bf16),
            quantized => Format::Ggml(quantized),
        }
    }
}

/// Some rows and columns of a weight, in the format in which the weight is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightPart<'a> {
    /// The format of `data`.
    pub format: Format,
    /// Number of rows; 1 for a vector.
    pub rows: usize,
    /// Number of columns, which are whole blocks of the format.
    pub cols: usize,
    /// The elements or blocks, row after row, little-endian.
    pub data: Cow<'a, [u8]>,
}

impl<'a> WeightPart<'a> {
    /// Dequantizes blocks to f32. Dense elements stay as they are.
    pub fn into_dense(self) -> HostTensor<'a> {
        /// The number of blocks that are dequantized at a time, so that not all values are in memory twice.
        const BLOCKS: usize = 256;
        let WeightPart { format, rows, cols, data } = self;
        match format {
            Format::Dense(dtype) => HostTensor { dtype, rows, cols, data },
            Format::Ggml(ty) => {
                let mut dense = Vec::with_capacity(rows * cols * DType::F32.size());
                for blocks in data.chunks(BLOCKS * ty.block_bytes()) {
                    dense.extend(ty.dequantize(blocks).into_iter().flat_map(f32::to_le_bytes));
                }
                HostTensor { dtype: DType::F32, rows, cols, data: dense.into() }
            }
        }
    }
}

/// A matrix of activations `[rows, cols]` on a device. Its capacity is fixed when it is made, while the number of rows
/// in use changes from step to step.
pub trait Matrix {
    /// The number of rows in use.
    fn rows(&self) -> usize;
    /// The number of columns.
    fn cols(&self) -> usize;
    /// The number of rows that there is room for.
    fn capacity(&self) -> usize;
    /// Sets the number of rows in use. Panics above the capacity.
    fn set_rows(&mut self, rows: usize);
}
