//! Tests of the exchange through its public interface, against simulated sources and ranks.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod budgets;
mod credentials;
mod histories;
mod lost_steps;
mod resolution;
mod sessions;
mod simulation;
mod tiers;
mod together;
mod traces;
mod world;
