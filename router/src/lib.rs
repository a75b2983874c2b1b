//! HTTP, tokens, scheduling.
