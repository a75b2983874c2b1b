//! Adapters in buckets.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../fake/mod.rs"]
mod fake;
mod faults;
mod found;
mod predibase;
#[path = "../fake/s3.rs"]
mod s3;
mod world;
