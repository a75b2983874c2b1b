//! The wire between router and shard.
