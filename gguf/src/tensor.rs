//! Types and places of tensors.

use crate::{Error, Result};

/// How a tensor's elements are stored. Names and codes are ggml's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it all")]
#[allow(non_camel_case_types, reason = "the names that users know")]
pub enum TensorType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl TensorType {
    pub(crate) fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2_K,
            11 => Self::Q3_K,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            30 => Self::BF16,
            _ => return None,
        })
    }

    /// Elements that are stored together.
    pub fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes that [`Self::block_elements`] elements take.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }
}

/// Where and how one tensor is stored. Checked: it lies within the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Axes, fastest first: a weight `[out, in]` has the dims `[in, out]`.
    pub dims: Vec<usize>,
    /// Type of its elements.
    pub ty: TensorType,
    /// The file that it is in, of those that make up a model.
    pub(crate) file: usize,
    /// Where it begins in the file.
    pub(crate) offset: u64,
    /// Bytes that it takes.
    pub(crate) bytes: usize,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }

    /// Number of rows: runs of elements along the first axis.
    pub fn rows(&self) -> usize {
        self.dims.iter().skip(1).product()
    }

    /// Number of columns: the length of the first axis.
    pub fn cols(&self) -> usize {
        self.dims.first().copied().unwrap_or(1)
    }

    /// Bytes that it takes in the file.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// A tensor as the header describes it, not yet checked.
pub(crate) struct RawTensor {
    pub(crate) name: String,
    pub(crate) dims: Vec<u64>,
    pub(crate) ty: TensorType,
    /// Relative to the data.
    pub(crate) offset: u64,
}

/// The part of a file behind its header.
pub(crate) struct Data {
    pub(crate) start: u64,
    pub(crate) len: u64,
    pub(crate) alignment: u64,
}

impl RawTensor {
    /// The tensor of the file with this index, if its shape is possible and it lies within the data.
    pub(crate) fn check(self, data: &Data, file: usize) -> Result<TensorInfo> {
        let Some(bytes) = self.bytes() else {
            return Err(Error::TensorShape { tensor: self.name, dims: self.dims, ty: self.ty });
        };
        let inside = self.offset.checked_add(bytes).is_some_and(|end| end <= data.len);
        if !inside || !self.offset.is_multiple_of(data.alignment) {
            return Err(Error::TensorBounds {
                tensor: self.name,
                offset: self.offset,
                bytes,
                available: data.len,
                alignment: data.alignment,
            });
        }
        Ok(TensorInfo {
            name: self.name,
            dims: self.dims.iter().map(|d| *d as usize).collect(),
            ty: self.ty,
            file,
            offset: data.start + self.offset,
            bytes: bytes as usize,
        })
    }

    /// Bytes that it takes; none if the shape is not possible. The first axis must be whole blocks.
    fn bytes(&self) -> Option<u64> {
        let row = *self.dims.first()?;
        let block = self.ty.block_elements() as u64;
        let elements = self.dims.iter().try_fold(1u64, |n, d| n.checked_mul(*d))?;
        if elements == 0 || !row.is_multiple_of(block) {
            return None;
        }
        (elements / block).checked_mul(self.ty.block_bytes() as u64)
    }
}
