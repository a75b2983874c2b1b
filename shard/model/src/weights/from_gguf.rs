//! Tensors of a decoder in a GGUF file, under their Hugging Face names.

#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    path::Path,
};

use gguf::{Gguf, TensorInfo};
use kernels::{DType, Format, WeightPart};

use super::{Source, tensor_file::check_part};
use crate::{
    Decoder, LoadError, Result,
    decoder::{Modules, Stored},
};

/// An open GGUF file.
pub(super) struct GgufSource {
    file: Gguf,
    /// The names of tensors in the file, by their Hugging Face names.
    names: HashMap<String, String>,
    /// Tensors that are read with the configuration.
    factors: &'static [&'static str],
    /// The numbers of query and key heads, if the converter has interleaved their halves.
    interleaved: Option<[usize; 2]>,
}

/// Opens a file. Errors: a tensor belongs to no module, so that the model would be another one without it.
pub(super) fn open(path: &Path) -> Result<(Decoder, GgufSource)> {
    let file = Gguf::open(path)?;
    let decoder = Decoder::from_gguf(&file)?;
    let names: HashMap<String, String> =
        Modules::of(&decoder).iter().flat_map(|module| module.tensors().collect::<Vec<_>>()).collect();
    let (permuted, factors) = match decoder.names.stored {
        Stored::Gguf { permuted, factors } => (permuted, factors),
        Stored::Folder => (false, [].as_slice()),
    };
    let used: HashSet<&str> = names.values().map(String::as_str).chain(factors.iter().copied()).collect();
    if let Some(other) = file.tensors().iter().find(|info| !used.contains(info.name.as_str())) {
        return Err(LoadError::UnknownTensor(other.name.clone()));
    }
    let heads = decoder.heads();
    let interleaved = permuted.then_some([heads.query, heads.kv]);
    Ok((decoder, GgufSource { file, names, factors, interleaved }))
}

/// The row at which the converter has stored row `output` of a q or k projection with heads of `dim` rows. It
/// interleaves the halves of every head for its own form of rotation: its row `2j + h` of a head is row `h · dim / 2 +
/// j` of the original.
fn stored_output(output: usize, dim: usize) -> usize {
    let (head, within) = (output / dim, output % dim);
    let (half, j) = (within / (dim / 2), within % (dim / 2));
    head * dim + 2 * j + half
}

impl GgufSource {
    fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        let found = self.names.get(name).and_then(|ggml| self.file.tensor(ggml));
        found.ok_or_else(|| LoadError::MissingTensor(name.into()))
    }

    /// The number of rows of one head, if the converter has interleaved this tensor's heads. Heads that are not whole
    /// or have an odd size make a wrong shape, which the caller refuses.
    fn interleaved_head(&self, info: &TensorInfo) -> Option<usize> {
        let [query, kv] = self.interleaved?;
        let heads = match info.name.rsplit('.').nth(1) {
            Some("attn_q") => query,
            Some("attn_k") => kv,
            _ => return None,
        };
        let outputs = if is_bias(info) { info.cols() } else { info.rows() };
        (heads > 0 && outputs.is_multiple_of(2 * heads)).then(|| outputs / heads)
    }

    /// Reads the blocks of some rows of a matrix whose heads are interleaved. Blocks do not cross rows, so that the
    /// order of rows is restored without decoding them.
    fn deinterleaved_rows(
        &self,
        info: &TensorInfo,
        part: (Range<usize>, Range<usize>),
        dim: usize,
    ) -> Result<Vec<u8>> {
        let (rows, cols) = part;
        let heads = rows.start / dim * dim..rows.end.next_multiple_of(dim);
        let blocks = self.file.blocks(&info.name, heads.clone(), cols)?;
        let width = blocks.len() / heads.len().max(1);
        let stored = rows.map(|row| stored_output(row, dim) - heads.start);
        Ok(stored.flat_map(|row| &blocks[row * width..][..width]).copied().collect())
    }

    /// Reads some elements of a bias whose heads are interleaved.
    fn deinterleaved_bias(&self, info: &TensorInfo, elements: Range<usize>, dim: usize) -> Result<Vec<u8>> {
        let values = self.file.dequantize(&info.name)?;
        Ok(elements.flat_map(|element| values[stored_output(element, dim)].to_le_bytes()).collect())
    }
}

/// A bias has an element where a weight has a row.
fn is_bias(info: &TensorInfo) -> bool {
    info.name.ends_with(".bias")
}

impl Source for GgufSource {
    fn shape(&self, name: &str) -> Result<[usize; 2]> {
        let info = self.tensor(name)?;
        Ok([info.rows(), info.cols()])
    }

    fn part(&self, name: &str, rows: Range<usize>, cols: Range<usize>) -> Result<WeightPart<'static>> {
        let info = self.tensor(name)?;
        check_part(name, [info.rows(), info.cols()], &rows, &cols)?;
        let mut part = WeightPart {
            format: info.ty.into(),
            rows: rows.len(),
            cols: cols.len(),
            data: Vec::new().into(),
        };
        part.data = match self.interleaved_head(info) {
            Some(dim) if is_bias(info) => {
                part.format = Format::Dense(DType::F32);
                self.deinterleaved_bias(info, cols, dim)?.repeat(rows.len())
            }
            Some(dim) => self.deinterleaved_rows(info, (rows, cols), dim)?,
            None => self.file.blocks(&info.name, rows, cols)?,
        }
        .into();
        Ok(part)
    }

    fn block(&self, name: &str) -> Result<usize> {
        Ok(self.tensor(name)?.ty.block_elements())
    }

    fn bytes(&self, name: &str) -> u64 {
        self.tensor(name).map_or(0, |info| info.bytes() as u64)
    }

    fn total_bytes(&self) -> u64 {
        let loaded = self.file.tensors().iter().filter(|info| !self.factors.contains(&info.name.as_str()));
        loaded.map(|info| info.bytes() as u64).sum()
    }
}
