//! The operations of a forward pass on row-major matrices, for every device that a model can run on.
//!
//! A [`Backend`] has the operations for which kernels are written, and a model is a sequence of them. This crate knows
//! matrices, index arrays and block tables. It knows nothing of layers, models, names of adapters, or requests.

mod backend;
mod batch;
pub mod compose;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
pub mod group;
mod lora;
mod ops;
pub mod reference;
mod sampling;
mod tensor;
pub mod testing;

/// The traits of a backend, whose methods code needs that uses a backend by its name.
pub mod prelude {
    pub use crate::{Adapters, Backend, Memory, Ops, Sampling};
}

pub use self::sampling::{MAX_BIASES, MAX_TOP, SampleRow, Sampled, TokenMask};
pub use ::sampling::{Ban, SamplingParams};
pub use backend::{Adapters, Backend, CapturedStep, Memory, Ops, Sampling};
pub use batch::{BLOCK_SIZE, Batch, MAX_MEMBER_RANKS, MAX_MEMBERS, RANK_STEP, RowSet, Segment, SequenceRows};
pub use error::{Error, PeerFault, Result};
pub use group::Group;
pub use lora::{LoraPart, LoraShape, LoraSite, LowRank, MatrixSource, ReplacedRows, SiteKind};
pub use ops::{
    Activation, Attention, AttentionShape, Branch, Embedding, Heads, LinearLora, LogitShape, Norm, NormKind,
    NormSpan, Output, Pairs, Projection, QkNorms, Qkv, Residual, RopeSpec, Rotation, Span, Stretch,
};
pub use tensor::{DType, Format, HostTensor, Matrix, WeightPart};
