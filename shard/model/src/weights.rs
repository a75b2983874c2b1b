//! Sources of tensors: a folder with safetensors or torch files, or a GGUF file. All of them use Hugging Face's names.

mod folder;
mod from_gguf;
mod safetensors;
pub(crate) mod tensor_file;
mod torch;

use std::{ops::Range, path::Path};

use kernels::{HostTensor, WeightPart};

use crate::{Decoder, LoadError, Result};
use folder::Folder;
pub use torch::TorchError;

/// The progress of loading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes that have been read.
    pub done_bytes: u64,
    /// Bytes of all files' tensors.
    pub total_bytes: u64,
}

/// Tensors of a model by their Hugging Face names.
pub(crate) trait Source {
    /// The numbers of rows and columns of a tensor, from the header of its file. A vector is one row.
    fn shape(&self, name: &str) -> Result<[usize; 2]>;
    /// Reads some rows and columns of a tensor in the format in which it is stored. Nothing else is read if the
    /// elements of a row are contiguous in the file. Columns must be whole blocks of the format.
    fn part(&self, name: &str, rows: Range<usize>, cols: Range<usize>) -> Result<WeightPart<'static>>;
    /// The number of columns of a block of a tensor's format; 1 if every element is stored by itself.
    fn block(&self, name: &str) -> Result<usize>;
    /// Bytes of a tensor in its file; 0 if it is missing.
    fn bytes(&self, name: &str) -> u64;
    /// Bytes of all tensors.
    fn total_bytes(&self) -> u64;

    /// Reads a whole tensor of a shape. Quantized blocks are dequantized, because no backend computes with them yet.
    fn dense(&self, name: &str, shape: [usize; 2]) -> Result<HostTensor<'static>> {
        self.dense_part(name, shape, 0..shape[0], 0..shape[1])
    }

    /// Reads some rows and columns of a tensor of a shape, which need not be whole blocks. A tensor of another shape is not
    /// read, since it may have any size.
    fn dense_part(
        &self,
        name: &str,
        shape: [usize; 2],
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<HostTensor<'static>> {
        let got = self.shape(name)?;
        if got != shape {
            let (got, expected) = (got.into(), shape.into());
            return Err(LoadError::Shape { name: name.into(), got, expected });
        }
        let block = self.block(name)?;
        let blocks = cols.start / block * block..cols.end.next_multiple_of(block).min(shape[1]);
        let first = cols.start - blocks.start;
        let read = self.part(name, rows, blocks)?.into_dense();
        Ok(columns(read, first..first + cols.len()))
    }
}

/// Some columns of a matrix.
pub(crate) fn columns(tensor: HostTensor<'static>, cols: Range<usize>) -> HostTensor<'static> {
    if cols == (0..tensor.cols) {
        return tensor;
    }
    let size = tensor.dtype.size();
    let rows = tensor.data.chunks_exact(tensor.cols * size);
    let data: Vec<u8> = rows.flat_map(|row| &row[cols.start * size..cols.end * size]).copied().collect();
    HostTensor { cols: cols.len(), data: data.into(), ..tensor }
}

/// Some rows of a matrix.
pub(crate) fn rows(tensor: &HostTensor<'_>, rows: &[Range<usize>]) -> HostTensor<'static> {
    let width = tensor.cols * tensor.dtype.size();
    let data: Vec<u8> =
        rows.iter().flat_map(|rows| &tensor.data[rows.start * width..rows.end * width]).copied().collect();
    let count = rows.iter().map(ExactSizeIterator::len).sum();
    HostTensor { dtype: tensor.dtype, rows: count, cols: tensor.cols, data: data.into() }
}

/// Whether two tensors have the same format and the same bytes. They are compared a few rows at a time, because the
/// tables of some models take gigabytes.
pub(crate) fn are_equal(source: &dyn Source, one: &str, other: &str) -> Result<bool> {
    const ROWS: usize = 64;
    let shape = source.shape(one)?;
    if source.shape(other)? != shape {
        return Ok(false);
    }
    for first in (0..shape[0]).step_by(ROWS) {
        let rows = first..shape[0].min(first + ROWS);
        let part = |name| source.part(name, rows.clone(), 0..shape[1]);
        if part(one)? != part(other)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Opens a model: its configuration and its tensors.
pub(crate) fn open(path: &Path) -> Result<(Decoder, Box<dyn Source + Send + Sync>)> {
    if path.is_file() {
        let (decoder, source) = from_gguf::open(path)?;
        return Ok((decoder, Box::new(source)));
    }
    let decoder = Decoder::from_folder(path)?;
    let folder = Folder::open(path, &decoder)?;
    Ok((decoder, Box::new(folder)))
}

/// The description of a GGUF file or of a folder in Hugging Face layout, without its weights.
pub fn describe(path: &Path) -> Result<Decoder> {
    if path.is_file() { Ok(from_gguf::open(path)?.0) } else { Decoder::from_folder(path) }
}
