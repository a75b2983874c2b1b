//! The scheduler against a simulated shard.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fairness;
mod histories;
mod memory;
mod outcomes;
mod shard;
mod slots;
mod steps;
mod tenants;
mod world;
