//! Host tensors to the type that the GPU holds.

pub(super) use crate::tensor::convert;
use crate::{DType, HostTensor};

/// Little-endian elements as f32.
pub(super) fn to_f32(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    HostTensor { dtype, rows: 1, cols: bytes.len() / dtype.size(), data: bytes.into() }.to_f32()
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
