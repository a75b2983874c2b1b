//! Decoder models as sequences of [`kernels`] operations: configuration, weights, the forward pass, and adapters.

pub mod adapter;
pub mod decoder;
mod error;
mod families;
mod files;
mod forward;
mod load;
pub mod testing;
mod weights;

pub use decoder::{ADDED_TOKENS, Decoder, Share};
pub use error::{LoadError, Result};
pub use forward::{KvCache, Model, Pass, Scratch, WeightBytes};
pub use weights::{LoadProgress, TorchError, describe};
