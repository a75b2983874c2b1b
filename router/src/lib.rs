//! The HTTP side of the server: tokens in and out, admission, scheduling, and the shards behind it.

mod adapter;
mod adapters;
pub mod admission;
pub mod api;
mod base_model;
pub mod chat;
mod chat_events;
mod embedding;
mod engine;
mod fair;
mod generation;
mod grammar;
mod json_file;
pub mod keys;
mod metrics;
mod permits;
pub mod principal;
mod ranks;
mod registry;
mod run;
pub mod server;
mod text;
mod text_side;
pub mod tokenizer;
mod wire;
mod workers;

pub use registry::{ManifestError, RegistryStartError};
pub use run::{RunError, run};
pub use server::{App, StartError};
