//! The real binaries together: a harness that starts a whole server, and a load generator.

pub mod load;
pub mod server;
