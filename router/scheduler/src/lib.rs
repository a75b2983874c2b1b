//! Decides what every step computes: which rows of which sequences, in which blocks of KV memory, and which adapters
//! move into which slots.
//!
//! The scheduler is a pure state machine: time is an argument, plans and events are values, and the same history gives
//! the same plans. `docs/scheduling.md` states the policy and its bounds.
//!
//! ```
//! # use std::time::Duration;
//! # use scheduler::{
//! #     CacheSalt, Event, Finish, Limits, Request, RequestId, RopeScaling, Sampled, Scheduler, SubmitError,
//! #     Tenant,
//! # };
//! # fn main() -> Result<(), SubmitError> {
//! # let limits = Limits {
//! #     num_blocks: 64, block_size: 16, num_slots: 4, adapter_bytes: 0, max_rows: 64, max_sequences: 8,
//! #     max_logit_rows: 64, max_added_tokens: 1000, max_prefill_rows: None, prefix_caching: true,
//! #     kv_window: 0, rope: RopeScaling::Fixed, bidirectional: false, adapter_cycle_time: Duration::from_secs(2),
//! # };
//! # let now = Duration::ZERO;
//! let mut scheduler = Scheduler::new(limits, &[]);
//! let id = RequestId(7);
//! let request = Request {
//!     id,
//!     tenant: Tenant { id: 0, weight: 1 },
//!     adapters: None.into(),
//!     adapters_from: 0,
//!     salt: CacheSalt::default(),
//!     prompt: [1, 2, 3].into(),
//!     max_new_tokens: 10,
//!     stop_ids: [0].into(),
//!     prompt_logprobs: false,
//!     group: None,
//!     hidden_states: false,
//!     payload: "how it samples",
//! };
//! scheduler.submit(request, now)?;
//! if let Some(plan) = scheduler.next_step(now) {
//!     assert_eq!(plan.added[0].payload, "how it samples");
//!     assert_eq!((plan.rows[0].position, plan.rows[0].rows, plan.rows[0].sample), (0, 3, true));
//!     // The shard runs the step and samples token 0.
//!     let events = scheduler.complete(plan.id, &[Sampled { id, token: 0 }], &[]);
//!     let finish = Some(Finish::StopToken);
//!     assert_eq!(events[1], Event::Token { id, index: 0, token: 0, finish });
//! }
//! # Ok(())
//! # }
//! ```

mod blocks;
mod event;
mod flows;
mod groups;
mod request;
mod rope;
mod scheduler;
mod sequence;
mod slots;
mod step;
mod table;

pub use event::{Event, FailReason, Finish, Sampled, Stats};
pub use flows::{AGED_SHARE, AGED_SLOTS, OVERDUE};
pub use request::{
    Adapter, AdapterKey, Adapters, CacheSalt, GroupId, Limits, Request, RequestId, SubmitError, Tenant,
    kv_positions,
};
pub use rope::RopeScaling;
pub use scheduler::{MAX_IN_FLIGHT, Scheduler};
pub use step::{Added, RowsPlan, StepPlan};
