//! Tensors of a Llama in a GGUF file, under their Hugging Face names.

use std::{ops::Range, path::Path};

use gguf::Gguf;
use kernels::{DType, HostTensor};

use super::{
    Source,
    names::{ggml_name, is_ggml_name},
};
use crate::{Config, LoadError, Result, config::ROPE_FACTORS};

/// An open file.
pub(super) struct GgufSource {
    file: Gguf,
    query_heads: usize,
    kv_heads: usize,
}

/// Opens a file. A tensor that no module takes is refused: without it, this would be another model.
pub(super) fn open(path: &Path) -> Result<(Config, GgufSource)> {
    let file = Gguf::open(path)?;
    let config = Config::from_gguf(&file)?;
    let is_used = |name: &str| name == ROPE_FACTORS || is_ggml_name(name, config.layers);
    if let Some(other) = file.tensors().iter().find(|info| !is_used(&info.name)) {
        return Err(LoadError::UnknownTensor(other.name.clone()));
    }
    let (query_heads, kv_heads) = (config.heads.query, config.heads.kv);
    Ok((config, GgufSource { file, query_heads, kv_heads }))
}

/// The converter interleaves the halves of every q and k head for its own form of rotation: row `2j + h` of a head is
/// row `h · dim / 2 + j` of the original.
fn unpermute(values: &[f32], heads: usize, cols: usize) -> Vec<f32> {
    let rows = values.len() / cols;
    let dim = rows / heads;
    let source = |row: usize| {
        let (head, within) = (row / dim, row % dim);
        let (half, j) = (within / (dim / 2), within % (dim / 2));
        head * dim + 2 * j + half
    };
    (0..rows).flat_map(|row| &values[source(row) * cols..][..cols]).copied().collect()
}

impl Source for GgufSource {
    fn tensor(&self, name: &str) -> Result<HostTensor<'static>> {
        let missing = || LoadError::MissingTensor(name.into());
        let ggml = ggml_name(name).ok_or_else(missing)?;
        let info = self.file.tensor(&ggml).ok_or_else(missing)?;
        let cols = info.dims.first().copied().unwrap_or(1);
        let rows: usize = info.dims.iter().skip(1).product();
        let mut values = self.file.dequantize(&ggml)?;
        let heads = match ggml.rsplit('.').nth(1) {
            Some("attn_q") => Some(self.query_heads),
            Some("attn_k") => Some(self.kv_heads),
            _ => None,
        };
        // A bias has an element where a weight has a row.
        let (outputs, width) = if ggml.ends_with(".bias") { (cols, 1) } else { (rows, cols) };
        // Whole heads of an even size; anything else has a wrong shape, which is found out by whoever asked.
        if let Some(heads) = heads.filter(|heads| outputs % (2 * heads) == 0) {
            values = unpermute(&values, heads, width);
        }
        let data: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Ok(HostTensor { dtype: DType::F32, rows, cols, data: data.into() })
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<HostTensor<'static>> {
        let ggml = ggml_name(name).ok_or_else(|| LoadError::MissingTensor(name.into()))?;
        let info = self.file.tensor(&ggml).ok_or_else(|| LoadError::MissingTensor(name.into()))?;
        let shape = [info.rows(), info.dims.first().copied().unwrap_or(1)];
        if rows.end > shape[0] {
            return Err(LoadError::Shape {
                name: name.into(),
                got: shape.into(),
                expected: vec![rows.end, shape[1]],
            });
        }
        let data: Vec<u8> =
            self.file.dequantize_rows(&ggml, rows.clone())?.iter().flat_map(|x| x.to_le_bytes()).collect();
        Ok(HostTensor { dtype: DType::F32, rows: rows.len(), cols: shape[1], data: data.into() })
    }

    fn bytes(&self, name: &str) -> u64 {
        ggml_name(name).and_then(|name| self.file.tensor(&name)).map_or(0, |info| info.bytes() as u64)
    }

    fn total_bytes(&self) -> u64 {
        let loaded = self.file.tensors().iter().filter(|info| info.name != ROPE_FACTORS);
        loaded.map(|info| info.bytes() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_put_back_in_halves() {
        // Two heads of four rows, one column; the converter stored halves interleaved.
        let stored = [0.0, 2.0, 1.0, 3.0, 10.0, 12.0, 11.0, 13.0];
        assert_eq!(unpermute(&stored, 2, 1), [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]);
    }
}
