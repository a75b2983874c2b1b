//! HTTP, tokens, scheduling.

fn main() {}
