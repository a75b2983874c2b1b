//! Decoder models as sequences of [`kernels`] operations: configuration, weights, the forward pass, and adapters.

pub mod adapter;
mod config;
mod error;
mod files;
mod forward;
pub mod testing;
mod weights;

pub use config::{Config, Rope};
pub use error::{LoadError, Result};
pub use forward::{KvCache, Model, Pass, Scratch};
pub use weights::{LoadProgress, TorchError};
