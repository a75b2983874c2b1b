//! The store as its users see it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod damage;
mod publish;
mod room;
mod support;
