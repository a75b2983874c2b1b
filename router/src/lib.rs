//! The HTTP side of the server: tokens in and out, admission, scheduling, and the shards behind it.

pub mod api;
mod chat;
mod decoder;
mod engine;
mod generation;
mod ranks;
pub mod server;

pub mod tokenizer;
mod wire;

pub use server::{App, StartError};
