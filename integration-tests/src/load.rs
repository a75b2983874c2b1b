//! Load on an OpenAI-compatible server: workloads, schedules, and reports.
//!
//! Works against any server that streams `/v1/completions`. Adapters are named by `model`.

pub mod arrivals;
pub mod client;
pub mod plot;
pub mod report;
pub mod run;
pub mod workload;
