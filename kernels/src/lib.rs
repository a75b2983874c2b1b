//! Fused operations on row-major matrices, for every device that a model can run on.
//!
//! A [`Backend`] offers exactly the operations that one would write a kernel for; a model is a sequence of them.
//! This crate knows matrices, index arrays and block tables. It has never heard of a layer, a model, the name of an
//! adapter, or a request.

mod backend;
mod batch;
mod comm;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
mod lora;
pub mod reference;
mod sampling;
mod tensor;
pub mod testing;

pub use self::sampling::{MAX_BIASES, MAX_TOP, SampleRow, Sampled};
pub use ::sampling::SamplingParams;
pub use backend::{Attention, Backend, Heads, LinearLora, Projection};
pub use batch::{BLOCK_SIZE, Batch, RowSet, Segment, SequenceRows};
pub use comm::{Comm, Solo};
pub use error::{Error, Result};
pub use lora::{LoraPart, LoraShape, LoraSite};
pub use tensor::{DType, Format, HostTensor, Matrix, WeightPart};
