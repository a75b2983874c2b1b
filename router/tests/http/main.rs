//! The router over HTTP, in front of a scripted shard.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod adapters;
mod clients;
mod failures;
mod fields;
mod generate;
mod keys;
mod openai;
mod process;
mod ranks;
mod refusals;
mod request_ids;
mod router;
mod shard;
mod supervision;
mod tenants;
mod text;
mod vocabulary;
