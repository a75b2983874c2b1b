//! What a model can be refused for.

use std::{io, ops::Range, path::PathBuf};

use crate::weights::TorchError;

/// Result of loading.
pub type Result<T> = std::result::Result<T, LoadError>;

/// Why a model was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file is not the JSON that it should be.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// A GGUF file's own fault.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// A safetensors file that is cut short or wrong.
    #[error("{}: {fault}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        fault: String,
    },
    /// A file of torch that cannot be read.
    #[error("{}: {source}", path.display())]
    Torch {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: TorchError,
    },
    /// A value that we cannot serve exactly.
    #[error("{field} {value} is not supported{}", if known.is_empty() { String::new() } else { format!("; known are {known}") })]
    Unsupported {
        /// The field of the configuration, or the key of the metadata.
        field: String,
        /// Its value.
        value: String,
        /// What would be.
        known: String,
    },
    /// A field of the configuration that is missing, or of another type.
    #[error("{field} is missing or not {expected}")]
    Field {
        /// The field.
        field: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// Sizes that contradict each other.
    #[error("{what}: {got}, expected {expected}")]
    Inconsistent {
        /// What has the size.
        what: &'static str,
        /// The size.
        got: usize,
        /// The size that others imply.
        expected: usize,
    },
    /// No such tensor.
    #[error("tensor {0} is missing")]
    MissingTensor(String),
    /// A tensor that no module of the model takes.
    #[error("tensor {0} belongs to no module of the model")]
    UnknownTensor(String),
    /// A tensor of another shape than the configuration implies.
    #[error("tensor {name} has the shape {got:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        got: Vec<usize>,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// A tensor that is neither a matrix nor a vector.
    #[error("tensor {name} has the shape {got:?}, expected a matrix or a vector")]
    NotAMatrix {
        /// The tensor.
        name: String,
        /// Its shape.
        got: Vec<usize>,
    },
    /// Rows or columns that a tensor does not have.
    #[error("tensor {name} has no rows {rows:?} and columns {cols:?}, its shape is {shape:?}")]
    NoSuchPart {
        /// The tensor.
        name: String,
        /// The rows that were asked for.
        rows: Range<usize>,
        /// The columns that were asked for.
        cols: Range<usize>,
        /// Number of rows and of columns of the whole.
        shape: [usize; 2],
    },
    /// A tensor of a type that we do not read.
    #[error("tensor {name} has the type {dtype}, known are F64, F32, F16 and BF16")]
    TensorType {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// The backend cannot hold it.
    #[error(transparent)]
    Kernels(#[from] kernels::Error),
}

impl LoadError {
    /// With the names of files alone.
    pub(crate) fn without_folder(mut self) -> LoadError {
        let path = match &mut self {
            LoadError::Io { path, .. }
            | LoadError::Json { path, .. }
            | LoadError::Safetensors { path, .. }
            | LoadError::Torch { path, .. } => path,
            LoadError::Gguf(gguf::Error::Io { path, .. }) => path,
            _ => return self,
        };
        *path = path.file_name().map(PathBuf::from).unwrap_or_default();
        self
    }
}
