//! The scheduler against a simulated shard.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fairness;
mod histories;
mod memory;
mod shard;
mod slots;
mod steps;
mod tenants;
mod world;
