//! Adapters on a hub.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../fake/mod.rs"]
mod fake;
mod faults;
mod found;
mod official;
mod offline;
mod world;
