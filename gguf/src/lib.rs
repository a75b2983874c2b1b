//! Reader of GGUF files, whole or split: metadata, tensor index, dequantization, and the tokens that end a text.
//!
//! The format is the one that ggml documents (versions 2 and 3, little-endian). Nothing in a file is trusted: every
//! length is checked against the bytes that are there before memory is taken for it.

mod dequantize;
mod ends;
mod error;
mod file;
mod reader;
mod tensor;
mod value;

pub use error::{Error, PartOfTensor, Result};
pub use file::Gguf;
pub use tensor::{TensorInfo, TensorType};
pub use value::{FromValue, Value};
