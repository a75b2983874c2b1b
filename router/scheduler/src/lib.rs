//! Decides what every step computes: which rows of which sequences, in which blocks of KV memory, and which adapters
//! move into which slots.
//!
//! A pure state machine: time is an argument, plans and events are values, and the same history gives the same plans.
//! `docs/scheduling.md` states the policy and its bounds.
//!
//! ```
//! # use std::time::Duration;
//! # use scheduler::{Event, Finish, Limits, Request, RequestId, Scheduler, SubmitError};
//! # fn main() -> Result<(), SubmitError> {
//! # let limits = Limits {
//! #     num_blocks: 64, block_size: 16, num_slots: 4, adapter_bytes: 0, max_rows: 64, max_sequences: 8,
//! #     max_logit_rows: 64, max_prefill_rows: None, prefix_caching: true,
//! # };
//! # let now = Duration::ZERO;
//! let mut scheduler = Scheduler::new(limits);
//! let (id, prompt, stop_ids) = (RequestId(7), vec![1, 2, 3], [0].into());
//! let request = Request { id, prompt, max_new_tokens: 10, stop_ids, adapter: None, prompt_logprobs: false };
//! scheduler.submit(request, now)?;
//! if let Some(plan) = scheduler.next_step(now) {
//!     assert_eq!((plan.rows[0].position, plan.rows[0].rows, plan.rows[0].sample), (0, 3, true));
//!     // The shard runs the step and samples token 0.
//!     let events = scheduler.complete(plan.id, &[(id, 0)]);
//!     assert_eq!(events[1], Event::Token { id, token: 0, finish: Some(Finish::StopToken) });
//! }
//! # Ok(())
//! # }
//! ```

mod blocks;
mod event;
mod queues;
mod request;
mod scheduler;
mod sequence;
mod slots;
mod step;

pub use event::{Event, FailReason, Finish, Stats};
pub use queues::OVERDUE;
pub use request::{Adapter, AdapterKey, Limits, Request, RequestId, SubmitError};
pub use scheduler::{MAX_IN_FLIGHT, Scheduler};
pub use step::{Added, RowsPlan, StepPlan};
