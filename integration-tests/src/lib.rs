//! A harness for tests of whole servers: it starts the real programs, writes adapters for them, and puts load on them.

pub mod adapters;
pub mod load;
pub mod server;
