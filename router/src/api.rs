//! The HTTP interface: what requests and responses look like. `docs/api.md` is its manual.
//!
//! A dialect turns a body into a `group::GroupRequest`, and folds the text events of `text` of every sequence
//! of the group into deltas. A streamed response is the deltas, and a whole response is what they add up to.

pub(crate) mod adapters;
mod deadline;
pub(crate) mod ensemble;
pub(crate) mod error;
mod fold;
pub(crate) mod group;
mod headers;
pub(crate) mod info;
pub(crate) mod json;
pub(crate) mod lorax;
pub(crate) mod merged;
pub(crate) mod openai;
pub(crate) mod openapi;
pub(crate) mod pooled;
pub(crate) mod request;
mod structured;
