//! Several ranks on the CUDA backend. They share one GPU where there are no more, in processes of their own, which take
//! turns there, or as threads with a stream each, whose kernels run side by side: so few blocks at a time that those of
//! all ranks fit.
//!
//! `LORAX_REDUCTIONS` says how many sums [`sums::of_threads`] checks.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "cuda_ranks/fused.rs"]
mod fused;
#[path = "cuda_ranks/library.rs"]
mod library;
#[path = "cuda_ranks/losses.rs"]
mod losses;
#[path = "cuda_ranks/sums.rs"]
mod sums;
#[path = "cuda_ranks/support.rs"]
mod support;
