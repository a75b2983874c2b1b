//! What an adapter can be refused for.

use kernels::DType;

use super::{CONFIG_FILE, PatternError};
use crate::LoadError;

/// Why an adapter was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A file that cannot be read, is cut short or corrupt.
    #[error(transparent)]
    File(LoadError),
    /// A file that must be there.
    #[error("{0} is missing")]
    NoFile(&'static str),
    /// A field whose value we cannot serve exactly.
    #[error("{CONFIG_FILE}: {field} = {value} is not supported")]
    Unsupported {
        /// The field.
        field: String,
        /// Its value.
        value: String,
    },
    /// A way to initialize that changed the base model's weights, and cannot be repeated.
    #[error(
        "{CONFIG_FILE}: init_lora_weights = {0} is not supported: it changed the weights of the model that the adapter was \
         trained on; save the adapter with `path_initial_model_for_weight_conversion`, which makes plain LoRA of it"
    )]
    Initialization(String),
    /// A field that is missing or of another type.
    #[error("{CONFIG_FILE}: {field} is missing or not {expected}")]
    Field {
        /// The field.
        field: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// A pattern that is no regular expression, is not known here, or takes too long to match.
    #[error("{CONFIG_FILE}: {field}: {source}")]
    Pattern {
        /// The field.
        field: &'static str,
        /// The cause.
        source: PatternError,
    },
    /// A target that this model does not have, or that deltas cannot attach to.
    #[error("{CONFIG_FILE}: target_modules: {0:?} is no projection of this model that an adapter can change")]
    Target(String),
    /// No module of this model is targeted.
    #[error("{CONFIG_FILE}: no module of this model is targeted")]
    NoTarget,
    /// No tensor of the file has to do with the model.
    #[error("no tensor matches a module of this model")]
    NoTensor,
    /// Everything that the adapter brings is zero.
    #[error("the adapter changes nothing: its deltas are all zero")]
    ChangesNothing,
    /// A tensor that belongs to no targeted module.
    #[error("tensor {0} belongs to no targeted module of this model")]
    UnknownTensor(String),
    /// More tokens than there is room for.
    #[error("tensor {name} has rows for {rows} tokens, this server has room for {limit}")]
    TooManyTokens {
        /// The tensor.
        name: String,
        /// Its rows.
        rows: usize,
        /// The rows that there is room for.
        limit: usize,
    },
    /// A tensor that a targeted module needs.
    #[error("the adapter's tensor {0} is missing")]
    MissingTensor(String),
    /// A tensor of another shape than model and configuration imply.
    #[error("tensor {name} has the shape {got:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        got: Vec<usize>,
        /// The expected shape.
        expected: Vec<usize>,
    },
    /// A value that is no number.
    #[error("tensor {0} has NaN or infinite values")]
    NotFinite(String),
    /// An alpha that f32, which deltas are scaled in, cannot hold.
    #[error("{CONFIG_FILE}: the scale of {module} is too large for f32")]
    ScaleTooLarge {
        /// The module.
        module: String,
    },
    /// A value that the type computed with cannot hold.
    #[error("tensor {name} has values that are too large for {dtype:?}")]
    TooLarge {
        /// The tensor.
        name: String,
        /// The type computed with.
        dtype: DType,
    },
}

impl From<LoadError> for AdapterError {
    fn from(error: LoadError) -> AdapterError {
        // Whoever asked for the adapter is told, and is not to learn where this machine keeps its files.
        AdapterError::File(error.without_folder())
    }
}
