//! The reasons for which a model is refused.

use std::{io, ops::Range, path::PathBuf};

use crate::{adapter::AdapterError, weights::TorchError};

/// Result of loading.
pub type Result<T> = std::result::Result<T, LoadError>;

/// Why a model was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file is not valid JSON, or not of the expected form.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// A GGUF file is broken.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// A safetensors file is truncated or broken.
    #[error("{}: {fault}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The fault.
        fault: String,
    },
    /// A file that torch has written could not be read.
    #[error("{}: {source}", path.display())]
    Torch {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: TorchError,
    },
    /// A value that is not computed exactly as the reference does.
    #[error("{field} {value} is not supported{}", if known.is_empty() { String::new() } else { format!("; known are {known}") })]
    Unsupported {
        /// The field of the configuration, or the key of the metadata.
        field: String,
        /// Its value.
        value: String,
        /// The values that are supported.
        known: String,
    },
    /// A field of the configuration is missing, or has a value of another type or range.
    #[error("{field} is missing or not {expected}")]
    Field {
        /// The field.
        field: &'static str,
        /// The expected kind of value.
        expected: &'static str,
    },
    /// Sizes contradict each other.
    #[error("{what}: {got}, expected {expected}")]
    Inconsistent {
        /// What the size is of.
        what: &'static str,
        /// The size.
        got: usize,
        /// The size that the others imply.
        expected: usize,
    },
    /// The model cannot be divided among as many ranks.
    #[error("{size} {what} cannot be divided among {ranks} ranks")]
    Share {
        /// What there is too little of, or what does not divide.
        what: &'static str,
        /// How many there are.
        size: usize,
        /// The number of ranks.
        ranks: usize,
    },
    /// A tensor is missing.
    #[error("tensor {0} is missing")]
    MissingTensor(String),
    /// A tensor belongs to no module of the model.
    #[error("tensor {0} belongs to no module of the model")]
    UnknownTensor(String),
    /// A tensor does not have the shape that the configuration implies.
    #[error("tensor {name} has the shape {got:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        got: Vec<usize>,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// A tensor is neither a matrix nor a vector.
    #[error("tensor {name} has the shape {got:?}, expected a matrix or a vector")]
    NotAMatrix {
        /// The tensor.
        name: String,
        /// Its shape.
        got: Vec<usize>,
    },
    /// A tensor does not have the rows or columns that were asked for.
    #[error("tensor {name} has no rows {rows:?} and columns {cols:?}, its shape is {shape:?}")]
    NoSuchPart {
        /// The tensor.
        name: String,
        /// The rows that were asked for.
        rows: Range<usize>,
        /// The columns that were asked for.
        cols: Range<usize>,
        /// The numbers of rows and columns of the whole tensor.
        shape: [usize; 2],
    },
    /// The type of a tensor's elements is not supported.
    #[error("tensor {name} has the type {dtype}, known are F64, F32, F16 and BF16")]
    TensorType {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// An adapter cannot be merged into the model.
    #[error("the adapter that is to be merged into the model: {0}")]
    Merged(Box<AdapterError>),
    /// The backend refused it, or has no memory for it.
    #[error(transparent)]
    Kernels(#[from] kernels::Error),
}

impl LoadError {
    /// Leaves only the last part of paths, for messages to clients.
    pub(crate) fn without_folder(mut self) -> LoadError {
        let path = match &mut self {
            LoadError::Io { path, .. }
            | LoadError::Json { path, .. }
            | LoadError::Safetensors { path, .. }
            | LoadError::Torch { path, .. } => path,
            LoadError::Gguf(gguf::Error::Io { path, .. } | gguf::Error::Part { path, .. }) => path,
            _ => return self,
        };
        *path = path.file_name().map(PathBuf::from).unwrap_or_default();
        self
    }
}
