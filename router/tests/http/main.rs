//! The router over HTTP, in front of a scripted shard.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../../sources/tests/fake/mod.rs"]
mod fake;
#[path = "../../../sources/tests/fake/s3.rs"]
mod s3;

mod adapter_texts;
mod adapters;
mod base_names;
mod bodies;
mod buckets;
mod cache_salts;
mod choices;
mod clients;
mod connections;
mod contexts;
mod deadlines;
mod detokenize;
mod ensembles;
mod exchange;
mod failures;
mod fairness;
mod fields;
mod folds;
mod generate;
mod grammars;
mod health;
mod http2;
mod hub;
mod keys;
mod killed;
mod logprobs;
mod lost_sessions;
mod managing;
mod merges;
mod metrics;
mod named_metrics;
mod native;
mod openai;
mod openapi;
mod pooled;
mod process;
mod prometheus;
mod prompt_scores;
mod ranks;
mod refusals;
mod request_ids;
mod responses;
mod router;
mod sampling;
mod shapes;
mod shard;
mod sharing;
mod sockets;
mod supervision;
mod tenants;
mod text;
mod tools;
mod vllm_fields;
mod vocabulary;
