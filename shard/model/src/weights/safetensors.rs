//! The header of a safetensors file, which is checked against the file before anything else is read.

use std::{collections::BTreeMap, fs::File, os::unix::fs::FileExt, path::Path};

use kernels::DType;
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};

use super::tensor_file::{ElementType, Place};
use crate::{LoadError, Result};

/// The longest header that is read, which is the format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// Reads the header: the places of all tensors of a file.
pub(super) fn places(path: &Path, file: &File) -> Result<BTreeMap<String, Place>> {
    let io = |source| LoadError::Io { path: path.into(), source };
    let bad = |fault: String| LoadError::Safetensors { path: path.into(), fault };
    let size = file.metadata().map_err(io)?.len();
    let mut len = [0; 8];
    if size < 8 {
        return Err(bad(format!("truncated: {size} bytes")));
    }
    file.read_exact_at(&mut len, 0).map_err(io)?;
    let len = u64::from_le_bytes(len);
    if len > MAX_HEADER || len > size - 8 {
        return Err(bad(format!("truncated or corrupt: a header of {len} bytes in a file of {size}")));
    }
    let mut header = vec![0; len as usize];
    file.read_exact_at(&mut header, 8).map_err(io)?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|error| bad(format!("corrupt header: {error}")))?;
    let data = 8 + len;
    let tensors = metadata.tensors();
    let end = tensors.values().map(|info| info.data_offsets.1 as u64).max().unwrap_or(0);
    if end != size - data {
        return Err(bad(format!("truncated: {end} bytes of tensors in {} bytes of data", size - data)));
    }
    Ok(tensors.into_iter().map(|(name, info)| (name, place(info, data))).collect())
}

fn place(info: &TensorInfo, data: u64) -> Place {
    let (begin, end) = info.data_offsets;
    let ty = match info.dtype {
        Dtype::F32 => ElementType::Known(DType::F32),
        Dtype::F16 => ElementType::Known(DType::F16),
        Dtype::BF16 => ElementType::Known(DType::Bf16),
        Dtype::F64 => ElementType::F64,
        other => ElementType::Other(format!("{other:?}")),
    };
    let mut strides = vec![1; info.shape.len()];
    for axis in (1..info.shape.len()).rev() {
        strides[axis - 1] = strides[axis] * info.shape[axis];
    }
    let (offset, bytes) = (data + begin as u64, (end - begin) as u64);
    Place { ty, shape: info.shape.clone(), strides, offset, bytes }
}
