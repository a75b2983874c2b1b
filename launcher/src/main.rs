//! Starts and supervises shards and the router.

fn main() {}
