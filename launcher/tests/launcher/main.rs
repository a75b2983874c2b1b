//! The launcher with children and a hub that the tests write.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bucket;
mod cached;
mod children;
mod configuration;
mod download;
mod hub;
mod launcher;
mod migrating;
mod ranks;
#[path = "../../../sources/tests/fake/s3.rs"]
mod s3;
