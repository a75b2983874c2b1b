//! Adapters in buckets.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../fake/mod.rs"]
mod fake;
mod faults;
mod found;
mod predibase;
mod world;
