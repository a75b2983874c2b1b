//! The wire between the router and the shards. Messages only: what they mean is written in `shard/v1/shard.proto`.

/// Generated from `shard/v1/shard.proto` and committed, so that building needs no protobuf compiler.
#[allow(missing_docs, clippy::all, clippy::too_many_lines)]
#[rustfmt::skip]
#[path = "gen/shard.v1.rs"]
mod shard_v1;

pub use shard_v1::*;

/// Bytes of the largest message. Steps are that large which add many sequences with long prompts, biases and bans.
pub const MAX_MESSAGE: usize = 80 << 20;
