//! The real binaries together: a harness that starts a whole server, adapters for it, and a load generator.

pub mod adapters;
pub mod load;
pub mod server;
