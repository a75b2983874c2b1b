//! Decides what every step computes: which rows of which sequences, in which blocks of KV memory, and which adapters
//! move into which slots.
//!
//! A pure state machine: time is an argument, plans and events are values, and the same history gives the same plans.
//! `docs/scheduling.md` states the policy and its bounds.

mod event;
mod request;
mod step;

pub use event::{Event, FailReason, Finish, Stats};
pub use request::{Adapter, AdapterKey, Limits, Request, RequestId, SubmitError};
pub use step::{Added, RowsPlan, StepPlan};
