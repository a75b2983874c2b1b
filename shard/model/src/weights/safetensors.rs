//! One safetensors file. The header is checked against the file before anything is read.

use std::{
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use kernels::{DType, HostTensor};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};

use crate::{LoadError, Result, files};

/// Longest header that is read; the format's own bound.
const MAX_HEADER: u64 = 100_000_000;

/// An open file.
pub(crate) struct TensorFile {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    /// Where the data begins.
    data: u64,
}

impl TensorFile {
    /// Opens a file and reads its header.
    pub(crate) fn open(path: &Path) -> Result<TensorFile> {
        let io = |source| LoadError::Io { path: path.into(), source };
        let bad = |fault: String| LoadError::Safetensors { path: path.into(), fault };
        let file = files::open(path)?;
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
        let end = metadata.tensors().values().map(|info| info.data_offsets.1 as u64).max().unwrap_or(0);
        if end != size - data {
            return Err(bad(format!("truncated: {end} bytes of tensors in {} bytes of data", size - data)));
        }
        Ok(TensorFile { path: path.into(), file, metadata, data })
    }

    /// Names of all tensors.
    pub(crate) fn names(&self) -> impl Iterator<Item = String> {
        self.metadata.tensors().into_keys()
    }

    /// Bytes of a tensor; 0 if it is missing.
    pub(crate) fn bytes(&self, name: &str) -> u64 {
        self.metadata.info(name).map_or(0, |info| (info.data_offsets.1 - info.data_offsets.0) as u64)
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.metadata.info(name).ok_or_else(|| LoadError::MissingTensor(name.into()))
    }

    /// Shape of a tensor, from the header.
    pub(crate) fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.info(name)?.shape)
    }

    /// Type and bytes of a tensor. Whoever has a use for one shape alone compares that first.
    pub(crate) fn read(&self, name: &str) -> Result<(DType, Vec<u8>)> {
        let (begin, end) = self.info(name)?.data_offsets;
        self.read_bytes(name, 0..end - begin)
    }

    /// Some rows of a tensor `[rows, cols]`.
    pub(crate) fn rows(&self, name: &str, rows: Range<usize>) -> Result<HostTensor<'static>> {
        let info = self.info(name)?;
        let &[count, cols] = &info.shape[..] else {
            return Err(LoadError::Shape {
                name: name.into(),
                got: info.shape.clone(),
                expected: vec![0, 0],
            });
        };
        if rows.end > count {
            let expected = vec![rows.end, cols];
            return Err(LoadError::Shape { name: name.into(), got: info.shape.clone(), expected });
        }
        let row = (info.data_offsets.1 - info.data_offsets.0) / count;
        let (dtype, data) = self.read_bytes(name, rows.start * row..rows.end * row)?;
        Ok(HostTensor { dtype, rows: rows.len(), cols, data: data.into() })
    }

    /// A range of a tensor's bytes.
    fn read_bytes(&self, name: &str, bytes: Range<usize>) -> Result<(DType, Vec<u8>)> {
        let info = self.info(name)?;
        let dtype = match info.dtype {
            // No backend computes in 64 bits.
            Dtype::F32 | Dtype::F64 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::Bf16,
            other => return Err(LoadError::TensorType { name: name.into(), dtype: format!("{other:?}") }),
        };
        let mut data = vec![0; bytes.len()];
        let at = self.data + (info.data_offsets.0 + bytes.start) as u64;
        let read = self.file.read_exact_at(&mut data, at);
        read.map_err(|source| LoadError::Io { path: self.path.clone(), source })?;
        if info.dtype == Dtype::F64 {
            let values = data.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes) as f32);
            data = values.flat_map(f32::to_le_bytes).collect();
        }
        Ok((dtype, data))
    }
}
