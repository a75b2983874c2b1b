//! One rank of a model behind gRPC: applies steps in the order they come and decides nothing.

pub mod adapters;
pub mod agreement;
pub mod choices;
pub mod cpus;
pub mod engine;
pub mod memory;
pub mod pump;
pub mod server;
mod service;
pub mod step;
mod wire;
