//! The client of the Hugging Face Hub, and the cache that it shares with the hub's other clients.

mod adapter;
mod cache;
mod client;
mod commit;
mod download;
mod error;
mod listing;
mod settings;

pub use cache::Cache;
pub(crate) use cache::is_plain;
pub use client::Hub;
pub use commit::Commit;
pub use error::{ErrorCode, HubError};
pub(crate) use settings::flag;
pub use settings::{HubSettings, NoHome};
