//! Host tensors to the type that the GPU holds.

use half::{bf16, f16};

use crate::DType;

fn read(dtype: DType, bytes: &[u8]) -> f32 {
    match (dtype, bytes) {
        (DType::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        (DType::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
        (DType::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
        _ => f32::NAN,
    }
}

/// Writes one element.
fn write(dtype: DType, x: f32, to: &mut [u8]) {
    match dtype {
        DType::F32 => to.copy_from_slice(&x.to_le_bytes()),
        DType::Bf16 => to.copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
        DType::F16 => to.copy_from_slice(&f16::from_f32(x).to_le_bytes()),
    }
}

/// Converts little-endian elements; `to` has room for as many as `from` holds.
pub(super) fn convert(from_type: DType, from: &[u8], to_type: DType, to: &mut [u8]) {
    if from_type == to_type {
        to.copy_from_slice(from);
        return;
    }
    for (from, to) in from.chunks_exact(from_type.size()).zip(to.chunks_exact_mut(to_type.size())) {
        write(to_type, read(from_type, from), to);
    }
}

/// Little-endian elements as f32.
pub(super) fn to_f32(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(dtype.size()).map(|b| read(dtype, b)).collect()
}

/// Values as little-endian elements.
pub(super) fn from_f32(dtype: DType, values: impl Iterator<Item = f32>) -> Vec<u8> {
    match dtype {
        DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
        DType::Bf16 => values.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        DType::F16 => values.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
    }
}

/// The bytes of values that are sent to the GPU as they are.
pub(super) trait Plain: Copy {
    /// Appends the little-endian bytes.
    fn put(self, to: &mut Vec<u8>);
}

impl Plain for u32 {
    fn put(self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.to_le_bytes());
    }
}

impl Plain for i32 {
    fn put(self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.to_le_bytes());
    }
}

impl Plain for u64 {
    fn put(self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.to_le_bytes());
    }
}

impl Plain for f32 {
    fn put(self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.to_le_bytes());
    }
}

/// The bytes of a slice.
pub(super) fn bytes_of<P: Plain>(values: &[P]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of_val(values));
    values.iter().for_each(|v| v.put(&mut bytes));
    bytes
}
