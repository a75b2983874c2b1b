//! The scheduler against a simulated shard.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod ensembles;
mod fairness;
mod groups;
mod histories;
mod memory;
mod outcomes;
mod rope;
mod shard;
mod slots;
mod steps;
mod swaps;
mod tenants;
mod windows;
mod world;
