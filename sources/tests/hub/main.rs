//! Adapters on a hub.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod faults;
mod found;
#[path = "../hub_server/mod.rs"]
mod hub_server;
mod official;
mod offline;
mod world;
