//! The step loop on a small model: what it answers, and which steps it refuses.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod ensembles;
#[path = "../support/fake.rs"]
mod fake;
mod faults;
mod given;
mod harness;
mod masks;
mod pooling;
mod refusals;
mod sessions;
mod steps;
#[path = "../support/tiny.rs"]
mod tiny;
mod vocabularies;
mod windows;
