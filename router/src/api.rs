//! The HTTP interface: what requests and responses look like. `docs/api.md` is its manual.

pub(crate) mod ask;
pub(crate) mod error;
pub(crate) mod generate;
pub(crate) mod openai;
pub(crate) mod run;
