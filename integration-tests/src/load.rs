//! Load on an OpenAI-compatible server: what to ask, when to ask it, and what came back.
//!
//! Works against any server that streams `/v1/completions`. Adapters are named by `model`.

pub mod arrivals;
pub mod client;
pub mod plot;
pub mod report;
pub mod run;
pub mod workload;
