//! The reasons for which an adapter is refused.

use kernels::DType;

use super::{CONFIG_FILE, PatternError};
use crate::LoadError;

/// Why an adapter was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A file cannot be read, or is truncated or corrupt.
    #[error(transparent)]
    File(LoadError),
    /// Nobody waits for it any more.
    #[error("reading it was cancelled")]
    Cancelled,
    /// The backend cannot stage it.
    #[error(transparent)]
    Backend(kernels::Error),
    /// A file is missing.
    #[error("{0} is missing")]
    NoFile(&'static str),
    /// The value of a field is not computed exactly as PEFT does.
    #[error("{CONFIG_FILE}: {field} = {value} is not supported")]
    Unsupported {
        /// The field.
        field: String,
        /// Its value.
        value: String,
    },
    /// The initialization changed the base model's weights, and cannot be repeated here.
    #[error(
        "{CONFIG_FILE}: init_lora_weights = {0} is not supported: it changed the weights of the model that the adapter was \
         trained on; save the adapter with `path_initial_model_for_weight_conversion`, which makes plain LoRA of it"
    )]
    Initialization(String),
    /// A field is missing, or has a value of another type or range.
    #[error("{CONFIG_FILE}: {field} is missing or not {expected}")]
    Field {
        /// The field.
        field: &'static str,
        /// The expected kind of value.
        expected: &'static str,
    },
    /// A pattern is no regular expression, is not supported, or takes too long to match.
    #[error("{CONFIG_FILE}: {field}: {source}")]
    Pattern {
        /// The field.
        field: &'static str,
        /// The cause.
        source: PatternError,
    },
    /// A target is no module to which a delta can attach.
    #[error("{CONFIG_FILE}: target_modules: {0:?} is no projection of this model that an adapter can change")]
    Target(String),
    /// No module of this model is targeted.
    #[error("{CONFIG_FILE}: no module of this model is targeted")]
    NoTarget,
    /// No tensor of the file belongs to a module of the model.
    #[error("no tensor matches a module of this model")]
    NoTensor,
    /// All changes of the adapter are zero.
    #[error("the adapter changes nothing: its deltas are all zero")]
    ChangesNothing,
    /// A tensor belongs to no targeted module.
    #[error("tensor {0} belongs to no targeted module of this model")]
    UnknownTensor(String),
    /// A tensor changes a part of the model that is not served.
    #[error("tensor {0} changes a part beside the language model, which is not served")]
    Beside(String),
    /// A table has rows for more tokens than there is room for.
    #[error("tensor {name} has rows for {rows} tokens, this server has room for {limit}")]
    TooManyTokens {
        /// The tensor.
        name: String,
        /// Its rows.
        rows: usize,
        /// The number of rows that there is room for.
        limit: usize,
    },
    /// A tensor that a targeted module needs is missing.
    #[error("the adapter's tensor {0} is missing")]
    MissingTensor(String),
    /// A tensor does not have the shape that the model and the configuration imply.
    #[error("tensor {name} has the shape {got:?}, expected {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape.
        got: Vec<usize>,
        /// The expected shape.
        expected: Vec<usize>,
    },
    /// A tensor has NaN or infinite values.
    #[error("tensor {0} has NaN or infinite values")]
    NotFinite(String),
    /// The scale of a delta is too large for f32.
    #[error("{CONFIG_FILE}: the scale of {module} is too large for f32")]
    ScaleTooLarge {
        /// The module.
        module: String,
    },
    /// A tensor has values that are too large for the type that kernels compute with.
    #[error("tensor {name} has values that are too large for {dtype:?}")]
    TooLarge {
        /// The tensor.
        name: String,
        /// The type.
        dtype: DType,
    },
    /// An adapter that is to be merged has rows of its own in place of the model's, or another number of rows.
    #[error("the rows of {0} differ from the model's, and rows cannot be merged")]
    Rows(String),
    /// An adapter that is to be merged into the model has other tokens than the model.
    #[error("{0} has other tokens than the model, into whose weights it cannot be merged")]
    OtherTokens(String),
    /// An adapter that is to be merged into the model has a bias where the model has none.
    #[error("the bias of {0} cannot be merged into the model, which has none there")]
    NoBias(String),
}

impl From<kernels::Error> for AdapterError {
    fn from(error: kernels::Error) -> AdapterError {
        AdapterError::Backend(error)
    }
}

impl From<LoadError> for AdapterError {
    fn from(error: LoadError) -> AdapterError {
        // Clients see this error, and must not learn where this machine keeps its files.
        AdapterError::File(error.without_folder())
    }
}
