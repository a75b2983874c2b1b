//! Where tensors come from: a folder of safetensors, or a GGUF file. Both speak the Hugging Face names.

mod from_gguf;
pub(crate) mod safetensors;

use std::{collections::BTreeMap, fs, path::Path};

use kernels::HostTensor;
use serde::Deserialize;

use crate::{Config, LoadError, Result};
use safetensors::TensorFile;

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
    Ok((Config::from_folder(path)?, Box::new(Folder::open(path)?)))
}

/// Safetensors files, and which of them has which tensor.
struct Folder {
    files: Vec<TensorFile>,
    /// Index of each tensor's file.
    places: BTreeMap<String, usize>,
}

impl Folder {
    fn open(folder: &Path) -> Result<Folder> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let index = folder.join("model.safetensors.index.json");
        let names = if index.exists() {
            let text = fs::read(&index).map_err(|source| LoadError::Io { path: index.clone(), source })?;
            let parsed: Index =
                serde_json::from_slice(&text).map_err(|source| LoadError::Json { path: index, source })?;
            let mut names: Vec<String> = parsed.weight_map.into_values().collect();
            names.sort();
            names.dedup();
            names
        } else {
            vec!["model.safetensors".into()]
        };
        let files =
            names.iter().map(|name| TensorFile::open(&folder.join(name))).collect::<Result<Vec<_>>>()?;
        let places =
            files.iter().enumerate().flat_map(|(i, file)| file.names().map(move |name| (name.to_owned(), i)));
        Ok(Folder { places: places.collect(), files })
    }

    fn file(&self, name: &str) -> Option<&TensorFile> {
        self.places.get(name).map(|i| &self.files[*i])
    }
}

impl Source for Folder {
    fn tensor(&self, name: &str) -> Result<HostTensor<'static>> {
        let file = self.file(name).ok_or_else(|| LoadError::MissingTensor(name.into()))?;
        let (rows, cols) = match *file.shape(name)? {
            [cols] => (1, cols),
            [rows, cols] => (rows, cols),
            ref other => {
                let got = other.to_vec();
                return Err(LoadError::Shape { name: name.into(), got, expected: vec![0, 0] });
            }
        };
        let (dtype, data) = file.read(name)?;
        Ok(HostTensor { dtype, rows, cols, data: data.into() })
    }

    fn bytes(&self, name: &str) -> u64 {
        self.file(name).map_or(0, |file| file.bytes(name))
    }

    fn total_bytes(&self) -> u64 {
        self.places.iter().map(|(name, i)| self.files[*i].bytes(name)).sum()
    }
}
