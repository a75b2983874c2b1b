//! Where models and adapters come from: folders on this machine, the Hugging Face Hub, buckets, and Predibase.
//!
//! [`Sources`] answers which version of an adapter a [`Reference`] leads to, whether a credential may read it, and
//! fetches its files. [`find_model`] leads from what an operator names to the files of the base model. Why the client of
//! the hub is not the crate `hf-hub` is told in `docs/decisions/0014-the-hub-client-is-our-own.md`.

mod adapter_files;
mod bucket;
mod error;
mod found;
mod http;
mod hub;
mod local;
mod model;
mod model_name;
mod predibase;
mod reference;
mod retry;
mod settings;
mod sources;

pub use adapter_files::{TEXT_FILES, is_of_text};
pub use bucket::{BucketError, BucketPrefix, BucketSettings, Variables};
pub use error::{Denial, SourceError};
pub use found::{AdapterFile, Destination, Found, Stamp};
pub use hub::{Cache, Commit, ErrorCode, Hub, HubError, HubSettings, NoHome};
pub use model::{ModelError, ModelFiles, find_model};
pub use reference::{NameError, Reference, SourceKind};
pub use settings::{SettingsError, SourceSettings};
pub use sources::Sources;
