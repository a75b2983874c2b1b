//! Where tensors come from: a folder of safetensors, or a GGUF file. Both speak the Hugging Face names.

mod folder;
mod from_gguf;
mod names;
pub(crate) mod safetensors;

use std::{ops::Range, path::Path};

use kernels::HostTensor;

use crate::{Config, Result};
use folder::Folder;

/// How far loading is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes that have been read.
    pub done_bytes: u64,
    /// Bytes that there are.
    pub total_bytes: u64,
}

/// Tensors of a model by their Hugging Face names.
pub(crate) trait Source {
    /// A tensor `[rows, cols]`, or a vector as one row.
    fn tensor(&self, name: &str) -> Result<HostTensor<'static>>;
    /// Some rows of a tensor `[rows, cols]` that the model does not keep in an order of its own, without reading the
    /// others.
    fn rows(&self, name: &str, rows: Range<usize>) -> Result<HostTensor<'static>>;
    /// Bytes of a tensor in its file; 0 if it is missing.
    fn bytes(&self, name: &str) -> u64;
    /// Bytes of all tensors.
    fn total_bytes(&self) -> u64;
}

/// Opens a model: its configuration and its tensors.
pub(crate) fn open(path: &Path) -> Result<(Config, Box<dyn Source + Sync>)> {
    if path.is_file() {
        let (config, source) = from_gguf::open(path)?;
        return Ok((config, Box::new(source)));
    }
    let config = Config::from_folder(path)?;
    let folder = Folder::open(path, &config)?;
    Ok((config, Box::new(folder)))
}
