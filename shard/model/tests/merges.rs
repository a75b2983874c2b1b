//! Merges of adapters: that they are PEFT's, and which are refused with which words.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "merges/goldens.rs"]
mod goldens;
#[path = "merges/refused.rs"]
mod refused;
#[path = "merges/results.rs"]
mod results;
#[path = "merges/support.rs"]
mod support;
