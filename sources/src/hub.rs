//! The client of the Hugging Face Hub, and the cache that it shares with the hub's other clients.

mod cache;
mod error;
mod fetch;
mod settings;

pub use cache::Cache;
pub(crate) use cache::is_plain;
pub use error::HubError;
pub use fetch::{Commit, Hub};
pub use settings::{HubSettings, NoHome};
