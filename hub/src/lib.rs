//! Files from the Hugging Face Hub, in the cache that all of its clients share, and models that are on this machine.
//!
//! [`find`] leads from what a user names to the files of a model. Below it, a [`Hub`] tells the [`Commit`] that a
//! revision leads to and fetches its files into the [`Cache`]. Why this is not the crate `hf-hub` is told in
//! `docs/decisions/0014-the-hub-client-is-our-own.md`.

mod cache;
mod error;
mod fetch;
mod model;
mod name;
mod settings;

pub use cache::Cache;
pub use error::HubError;
pub use fetch::{Commit, Hub};
pub use model::{ModelError, ModelFiles, find};
pub use settings::{NoHome, Settings};
